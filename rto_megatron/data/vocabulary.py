"""Ids that an embedding has no row for: named, with what puts them there, before a model reads them.

Cut over tensor ranks, Megatron's embedding masks such an id and reads it as zeros without a word; on one rank it fails
in a kernel.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.batches import Fingerprinted
from rto_megatron.data.chat import encode_text
from rto_megatron.data.messages import Conversation, Message
from rto_megatron.data.template import ChatTemplate
from rto_megatron.errors import DataError, UserError, refuse_if
from rto_megatron.types import Demonstration, Example, JudgedResponse, PreferencePair, Prompt

_PROBE = "a"
_SHOWN = 3
_TEMPLATE = "which the chat template writes"


@dataclass(frozen=True)
class Embedding:
    """The smallest of the embeddings that read a stage's ids.

    Example:
        Embedding("models.policy", num_rows=32000).lacks(32001)
    """

    where: str  # as messages name its model
    num_rows: int  # vocab_size

    def lacks(self, token: int) -> bool:
        """Whether it has no row for the id."""
        return token >= self.num_rows


def smallest_embedding(vocab_sizes: Mapping[str, int]) -> Embedding:
    """The embedding that decides, of models by the names that messages give them."""
    where = min(vocab_sizes, key=lambda name: vocab_sizes[name])
    return Embedding(where, vocab_sizes[where])


def token_ids(example: Example) -> tuple[int, ...]:
    """Every id of an example."""
    match example:
        case Prompt():
            return example.token_ids
        case Demonstration():
            return example.prompt_ids + example.response_ids
        case PreferencePair():
            return example.prompt_ids + example.chosen_ids + example.rejected_ids
        case JudgedResponse():
            return example.prompt_ids + example.response_ids + example.unrelated_ids


def vocabulary_of(examples: Sequence[Example]) -> frozenset[int]:
    """Every id that stands in one of the examples."""
    if isinstance(examples, Fingerprinted):
        return examples.vocabulary
    return frozenset(chain.from_iterable(map(token_ids, examples)))


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the chat template, or of all of them where there are several; empty without one."""
    templates = tokenizer.chat_template or ""
    return templates if isinstance(templates, str) else "\n".join(map(str, templates.values()))


def written_ids(tokenizer: PreTrainedTokenizerBase, before: Sequence[Message] = ()) -> dict[int, str]:
    """Id -> what writes it, of ids that stand in examples whatever their texts say.

    Args:
        before: turns before the user's; a template that refuses them writes nothing.
    """
    written: dict[int, str] = {}
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer)
        whole = Conversation((*before, Message("user", _PROBE), Message("assistant", _PROBE)))
        # Rows are rendered later, and an error then names the row.
        with suppress(UserError):
            for text in (
                template.text(whole.prompt, True, _TEMPLATE),
                template.text(whole, False, _TEMPLATE),
            ):
                written |= dict.fromkeys(encode_text(tokenizer, text), _TEMPLATE)
    written |= dict.fromkeys(encode_text(tokenizer, ""), "which the tokenizer puts before every text")
    written[tokenizer.eos_token_id] = "the end-of-sequence token"
    return written


def vocabulary_problems(tokenizer: PreTrainedTokenizerBase, embedding: Embedding) -> list[str]:
    """One sentence for each id that every stage would read and that has no row."""
    return [
        f"{embedding.where}: the token {_named(tokenizer, token)}, {writer}, has no row in the embedding "
        f"(vocab_size={embedding.num_rows}); {_remedy([token], embedding)}"
        for token, writer in sorted(written_ids(tokenizer).items())
        if embedding.lacks(token)
    ]


def spare_tokens(tokenizer: PreTrainedTokenizerBase, embedding: Embedding) -> str | None:
    """Words about tokens without a row that nothing writes by itself; None where there are none."""
    spare = sorted({*tokenizer.get_vocab().values()} - written_ids(tokenizer).keys())
    spare = [token for token in spare if embedding.lacks(token)]
    if not spare:
        return None
    padding = " (the padding token)" if tokenizer.pad_token_id in spare else ""
    return (
        f"{embedding.where}: the embedding (vocab_size={embedding.num_rows}) has no row for {_listed(tokenizer, spare)}"
        f"{padding} of the tokenizer; no plain conversation holds that, and data that do are refused"
    )


def require_rows(
    source: str,
    rows: Iterable[tuple[str, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    embedding: Embedding,
) -> None:
    """Refuses data in which an id has no row in the embedding.

    Args:
        source: of the data, for the message.
        rows: the name of each and its ids, in tokens.

    Raises:
        UserError: names every such token, its text, what writes it, and the first row that holds it.
    """
    first: dict[int, str] = {}
    for name, ids in rows:
        if embedding.lacks(max(ids, default=0)):
            for token in filter(embedding.lacks, ids):
                first.setdefault(token, name)
    if not first:
        return
    written = {**_spelt_in_template(tokenizer, first), **written_ids(tokenizer)}
    heading = (
        f"{source}: {embedding.where} has no row in the embedding (vocab_size={embedding.num_rows}) for tokens of the "
        f"data; {_remedy(first, embedding)}, or leave out what holds them"
    )
    refuse_if(
        [
            f"{_named(tokenizer, token)}, {written.get(token, 'which the text spells')}: first in {first[token]}"
            for token in sorted(first)
        ],
        heading,
        DataError,
    )


def _spelt_in_template(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> dict[int, str]:
    """Finds what `written_ids` does, for tokens that the template writes for some conversations."""
    template = template_text(tokenizer)
    spelt = [token for token in tokens if str(tokenizer.convert_ids_to_tokens(token)) in template]
    return dict.fromkeys(spelt, _TEMPLATE)


def _named(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return f"{str(tokenizer.convert_ids_to_tokens(token))!r} (id {token})"


def _listed(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return ", ".join(_shown(tokenizer, tokens))


def _shown(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Iterator[str]:
    yield from (_named(tokenizer, token) for token in tokens[:_SHOWN])
    if len(tokens) > _SHOWN:
        yield f"and {len(tokens) - _SHOWN} more"


def _remedy(tokens: Iterable[int], embedding: Embedding) -> str:
    rows = max(tokens, default=0) + 1
    return (
        f"resize that embedding to {rows} rows or more (transformers' resize_token_embeddings), or use a tokenizer "
        f"whose ids stay below {embedding.num_rows}"
    )
