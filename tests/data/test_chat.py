import copy

import pytest
from transformers import PreTrainedTokenizerBase

from rto_megatron.data import chat
from rto_megatron.data.chat import Exchange
from rto_megatron.data.messages import Conversation, Message
from rto_megatron.data.template import ChatTemplate, TemplateOptions
from rto_megatron.errors import DataError

QUESTION = [Message("user", "the fox")]
BOS, EOS = 1, 2
STRICT = TemplateOptions()
APART = TemplateOptions(allow_non_prefix=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> tuple[int, ...]:
    return chat.encode_prompt(ChatTemplate(tokenizer), Conversation(tuple(messages)), where).ids


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    answer: str,
    where: str,
    options: TemplateOptions = STRICT,
) -> Exchange:
    whole = Conversation((*messages, Message("assistant", answer)))
    return chat.encode_exchange(ChatTemplate(tokenizer, options), whole, where)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("answer", ["the dog", " two  spaces", "x\n", "東京 😀", "{% raw %}"])
def test_prompt_ids_are_a_strict_prefix_of_the_conversation(
    tokenizer: PreTrainedTokenizerBase, answer: str
) -> None:
    exchange = encode_exchange(tokenizer, QUESTION, answer, "here")
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert [*exchange.prompt_ids, *exchange.answer_ids] == whole
    assert exchange.prompt_ids == encode_prompt(tokenizer, QUESTION, "here")
    assert exchange.prompt_ids.count(BOS) == exchange.answer_ids.count(EOS) == 1


MERGING = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} t{% endif %}"


def test_a_template_that_is_no_prefix_is_tokenized_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    merging = with_template(tokenizer, MERGING)
    with pytest.raises(DataError, match=r"here: .*renders the prompt.*data\.allow_non_prefix=true"):
        encode_exchange(merging, QUESTION, "he dog", "here")
    exchange = encode_exchange(merging, QUESTION, "he dog", "here", APART)
    assert exchange.is_apart
    assert exchange.prompt_ids == tuple(tokenizer.encode("the fox t"))
    assert exchange.answer_ids == (*tokenizer.encode("he dog"), EOS)


GLUED = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_ids_that_merge_across_the_border_are_tokenized_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    question = [Message("user", "x th")]
    whole = tokenizer.encode("x the fox")
    prompt = tokenizer.encode("x th")
    assert whole[: len(prompt)] != prompt
    exchange = encode_exchange(with_template(tokenizer, GLUED), question, "e fox", "here")
    assert exchange.prompt_ids == tuple(prompt)
    assert exchange.answer_ids == (*tokenizer.encode("e fox"), EOS)


def test_what_a_template_writes_after_the_end_is_no_part_of_the_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    changed = with_template(
        tokenizer, str(tokenizer.chat_template).replace("{{ eos_token }}", "{{ eos_token + '\\n' }}")
    )
    exchange = encode_exchange(changed, QUESTION, "the dog", "here")
    assert exchange.answer_ids == encode_exchange(tokenizer, QUESTION, "the dog", "here").answer_ids
    assert exchange.num_cut_tokens == 0


def test_a_doubled_start_token_is_written_once(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = with_template(tokenizer, "{{ bos_token }}" + str(tokenizer.chat_template))
    assert encode_prompt(changed, QUESTION, "here") == encode_prompt(tokenizer, QUESTION, "here")


def test_a_start_token_that_only_the_tokenizer_adds_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    changed = with_template(tokenizer, str(tokenizer.chat_template).replace("{{ bos_token }}", ""))
    assert encode_prompt(changed, QUESTION, "here")[0] != BOS
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    assert encode_prompt(changed, QUESTION, "here") == encode_prompt(tokenizer, QUESTION, "here")


def test_a_template_that_refuses_roles_is_an_error_with_a_place(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = with_template(tokenizer, "{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"data\.jsonl:4: .*\['user'\] \(no system role\)"):
        encode_prompt(changed, QUESTION, "data.jsonl:4")
