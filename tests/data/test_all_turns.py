"""`data.loss_on: all`: what is learnt of a conversation is what transformers' own mask says."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from data.test_left_out import OPENS_AND_KEEPS, with_template
from data.written_rows import assistant, user, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.data.batches import digest
from rto_megatron.data.cut import Layout
from rto_megatron.data.limits import Limits
from rto_megatron.data.load_report import Loaded
from rto_megatron.data.loader import load_demonstrations
from rto_megatron.data.packing import supervised_microbatches
from rto_megatron.data.template import TemplateOptions
from rto_megatron.errors import DataError
from rto_megatron.types import Demonstration

LIMITS = Limits(max_prompt_tokens=200, max_length=400, overlong="error", loss_on="all")
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %} "
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{{ '\n' }}{% else %} {{ m.content }}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Content alone is marked: nothing says where a turn ends.
CONTENT = MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
# As Qwen3's: a thought only in the last turn, and one without words where there is none.
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}{% endgeneration %}"
    "{% else %} {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "be short"},
    user("the fox"), assistant("the dog; a 東京 dog"), user("and add(a, b)?"),
    assistant("x = 1\n\n  y"), user("Привет"), assistant(" sum "),
]  # fmt: skip


def load(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    rows: Sequence[Mapping[str, object]],
    limits: Limits = LIMITS,
) -> Loaded[Demonstration]:
    return load_demonstrations(write_lines(folder / "rows.jsonl", rows), tokenizer, limits)


def mask_of(item: Demonstration) -> list[int]:
    """1 on what the loss is taken on, of prompt and response."""
    learnt = [1] * len(item.response_ids)
    for first, end in item.skipped:
        learnt[first:end] = [0] * (end - first)
    return [0] * len(item.prompt_ids) + learnt


def hugging_face(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, object]], template: str | None = None
) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(
        turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


@pytest.mark.parametrize("template", [MARKED, CONTENT, THINKS])
def test_a_marked_template_is_learnt_as_transformers_masks_it(
    template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    marked = with_template(tokenizer, template)
    (item,) = load(marked, tmp_path, [{"messages": TALK}]).items
    ids, mask = hugging_face(marked, TALK)
    size = len(mask_of(item))
    assert (*item.prompt_ids, *item.response_ids) == tuple(ids[:size])
    assert mask_of(item) == mask[:size] and not any(mask[size:])
    assert item.num_learnt == sum(mask) > 0


def test_a_template_without_marks_is_learnt_as_its_twin_with_marks(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plain, words = with_template(tokenizer, UNMARKED), ["fox", "the dog", "東京", " x", "naïve ", "1"]
    draw = Random(7)
    talks = [
        [turn(" ".join(draw.choices(words, k=3))) for _ in range(number) for turn in (user, assistant)]
        for number in (1, 2, 3, 4)
    ]
    loaded = load(plain, tmp_path, [{"messages": talk} for talk in [TALK, *talks]])
    for item, talk in zip(loaded.items, [TALK, *talks], strict=True):
        ids, mask = hugging_face(plain, talk, MARKED)
        size = len(mask_of(item))
        assert (*item.prompt_ids, *item.response_ids) == tuple(ids[:size])
        assert mask_of(item) == mask[:size] and not any(mask[size:])


def test_one_turn_is_learnt_alike_either_way(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "the fox", "response": "the dog\n"}, {"prompt": "a", "response": " 東京"}]
    every = load(tokenizer, tmp_path, rows).items
    assert every == load(tokenizer, tmp_path, rows, replace(LIMITS, loss_on="last")).items
    assert digest(every) == digest([Demonstration(i.id, i.prompt_ids, i.response_ids) for i in every])


def test_turns_of_weight_0_are_not_learnt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for template in (MARKED, UNMARKED):
        turns = [
            {**turn, "weight": int(number != 2)} if turn["role"] == "assistant" else turn
            for number, turn in enumerate(TALK)
        ]
        (item,) = load(with_template(tokenizer, template), tmp_path, [{"messages": turns}]).items
        whole, learnt = (*item.prompt_ids, *item.response_ids), mask_of(item)
        said = tokenizer.decode([token for token, mark in zip(whole, learnt, strict=True) if mark])
        assert said == " x = 1\n\n  y</s>  sum </s>"


def test_a_turn_that_is_rendered_otherwise_in_its_place_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    unmarked = with_template(
        tokenizer, THINKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* renders message 2 .* data\.loss_on=last"):
        load(unmarked, tmp_path, [{"messages": TALK}])


def test_a_turn_that_spells_the_end_and_a_row_without_learnt_turns_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    spelt = [user("a"), assistant("b</s> c"), user("d"), assistant("e")]
    silent = [user("a"), {**assistant("b"), "weight": 0}]
    with pytest.raises(DataError) as caught:
        load(tokenizer, tmp_path, [{"messages": spelt}, {"messages": silent}])
    assert "rows.jsonl:1: message 1 spells the end-of-sequence token" in str(caught.value)
    assert "rows.jsonl:2: no token of the assistant's turns is learnt" in str(caught.value)


def test_a_long_conversation_is_cut_behind_a_learnt_token(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plain = with_template(tokenizer, UNMARKED)
    (whole,) = load(plain, tmp_path, [{"messages": TALK}]).items
    length = len(whole.prompt_ids) + whole.skipped[0][1] - 1  # in what the user says second
    loaded = load(plain, tmp_path, [{"messages": TALK}], replace(LIMITS, max_length=length))
    (cut,) = loaded.items
    assert cut.skipped == () and cut.response_ids == whole.response_ids[: whole.skipped[0][0]]
    assert loaded.report.truncated_answers == 1


def test_turns_without_an_end_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert (
        load(with_template(tokenizer, CONTENT), tmp_path, [{"messages": TALK}]).report.turns_without_end == 3
    )
    endless = with_template(tokenizer, UNMARKED.replace("{{ eos_token }}", ""))
    loaded = load(endless, tmp_path, [{"messages": TALK}])
    assert loaded.report.turns_without_end == 2
    assert loaded.items[0].response_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_a_thought_without_words_is_learnt_or_skipped(
    loss_on: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    thinks, rows = with_template(tokenizer, THINKS), [{"prompt": "a", "response": "b"}]
    limits = replace(LIMITS, loss_on=loss_on)
    (learnt,) = load(thinks, tmp_path, rows, limits).items
    (skipped,) = load(thinks, tmp_path, rows, replace(limits, empty_thoughts="skip")).items
    assert tokenizer.decode(learnt.response_ids) == "<think>\n\n</think>\n\nb</s>"
    assert tokenizer.decode(skipped.response_ids) == "b</s>"
    assert (*learnt.prompt_ids, *learnt.response_ids) == (*skipped.prompt_ids, *skipped.response_ids)
    thought = [{"prompt": "a", "response": "<think>\nadd\n</think>\n\nb"}]
    kept = load(thinks, tmp_path, thought, replace(limits, empty_thoughts="skip")).items
    assert kept == load(thinks, tmp_path, thought, limits).items


@pytest.mark.parametrize("loss_on", ["last", "all"])
@pytest.mark.parametrize("place", [1, 3])
def test_a_turn_that_leaves_the_opened_thought_open_is_refused_or_kept(
    loss_on: str, place: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    opens, limits = with_template(tokenizer, OPENS_AND_KEEPS), replace(LIMITS, loss_on=loss_on)
    closed = [
        user("a"),
        assistant("<think>\nso\n</think>\n\nb"),
        user("c"),
        assistant("<think>\nso\n</think>\n\nd"),
    ]
    assert load(opens, tmp_path, [{"messages": closed}], limits).report.thoughts_left_open == 0
    is_trained = place == 3 or loss_on == "all"
    turns = [*closed[:place], assistant("<think>\nso b"), *closed[place + 1 :]]
    if is_trained:
        with pytest.raises(DataError, match=r"opens a thought that the answer does not close"):
            load(opens, tmp_path, [{"messages": turns}], limits)
    kept = replace(limits, template=TemplateOptions(open_thought="keep"))
    loaded = load(opens, tmp_path, [{"messages": turns}], kept)
    assert loaded.report.thoughts_left_open == is_trained
    (item,) = loaded.items
    ids = (*item.prompt_ids, *item.response_ids)
    learnt = [token for token, is_learnt in zip(ids, mask_of(item), strict=True) if is_learnt]
    assert ("so b</s>" in tokenizer.decode(learnt)) == is_trained


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_mean_over_learnt_tokens(
    packed: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"messages": TALK}, {"prompt": "the fox", "response": "the dog"}, {"messages": TALK[1:5]}]
    items = load(with_template(tokenizer, UNMARKED), tmp_path, rows).items
    layout = Layout(2, packed, 4, torch.device("cpu"))
    draw = torch.Generator().manual_seed(5)
    logits = [torch.randn(len(mask_of(item)), 500, generator=draw) for item in items]
    expected = total = 0.0
    for item, logits_LV in zip(items, logits, strict=True):
        labels = torch.tensor([*item.prompt_ids, *item.response_ids])
        labels[torch.tensor(mask_of(item)) == 0] = -100  # as transformers leaves out
        expected += float(torch.nn.functional.cross_entropy(logits_LV[:-1], labels[1:], reduction="sum"))
        total += item.num_learnt
    loss = 0.0
    for number, micro in enumerate(supervised_microbatches(items, total, layout)):
        logp_T = torch.zeros(len(micro.batch.tokens_T))
        for start, item, logits_LV in zip(
            micro.batch.cu_seqlens, items[2 * number :], logits[2 * number :], strict=False
        ):
            size = len(mask_of(item))
            if start + size <= len(logp_T):
                ids = torch.tensor([*item.prompt_ids, *item.response_ids])
                logp_T[start : start + size - 1] = logits_LV.log_softmax(-1)[:-1].gather(1, ids[1:, None])[
                    :, 0
                ]
        loss += float(SFT(Config()).loss(logp_T, micro).loss)
    assert loss == pytest.approx(expected / total, rel=1e-5)
