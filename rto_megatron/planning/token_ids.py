"""Whether the models of a stage have a row for every id that it reads or may sample."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from rto_megatron.config.checks import refuse
from rto_megatron.config.facts import facts_of
from rto_megatron.config.schema import Stage
from rto_megatron.data.load_report import Loaded
from rto_megatron.data.tokenizer import has_tokenizer, load_plain_tokenizer
from rto_megatron.data.vocabulary import (
    Embedding,
    require_rows,
    smallest_embedding,
    spare_tokens,
    token_ids,
    vocabulary_of,
    vocabulary_problems,
)
from rto_megatron.models.layout_checks import check_sampled_ids
from rto_megatron.types import Example

if TYPE_CHECKING:
    from rto_megatron.engine.source import WeightSource
    from rto_megatron.planning.shapes import FoundShape


def token_warnings(config: Stage, shapes: "Mapping[str, FoundShape]") -> list[str]:
    """Tokens without a row that nothing writes but a text that spells one; nothing where the policy is not here.

    Args:
        shapes: role -> what is known of its model.

    Raises:
        UserError: a model lacks ids that every run of the stage reads, or may sample.
    """
    here = {f"models.{role}": found for role, found in shapes.items() if found.folder is not None}
    policy = here.get("models.policy")
    if policy is None or policy.folder is None:
        return []
    sizes = {where: found.shape.vocab_size for where, found in here.items()}
    tokenizer = load_plain_tokenizer(policy.folder) if has_tokenizer(policy.folder) else None
    refuse(_absent_ids(config, sizes, tokenizer))
    return [] if tokenizer is None else _spare(tokenizer, smallest_embedding(sizes))


def embedding_problems(config: Stage, sources: "Mapping[str, WeightSource]") -> list[str]:
    """Ids that every run of the stage would read, or may sample, and that a model has no row for."""
    # Only the policy's tokenizer turns text into ids.
    return _absent_ids(config, _vocab_sizes(sources), load_plain_tokenizer(sources["policy"].hf_folder))


def spare_token_warnings(
    tokenizer: PreTrainedTokenizerBase, sources: "Mapping[str, WeightSource]"
) -> list[str]:
    """Tokens without a row that no run reads unless its data spell them; one sentence or none."""
    return _spare(tokenizer, _smallest(sources))


def require_embedded(
    loaded: Loaded[Example], tokenizer: PreTrainedTokenizerBase, sources: "Mapping[str, WeightSource]"
) -> None:
    """Refuses loaded data with an id that a model of the stage has no row for.

    Raises:
        UserError: on every rank; see `vocabulary.require_rows`.
    """
    smallest = _smallest(sources)
    if smallest.lacks(max(vocabulary_of(loaded.items), default=0)):
        rows = ((example.id, token_ids(example)) for example in loaded.items)
        require_rows(loaded.report.source, rows, tokenizer, smallest)


def _absent_ids(
    config: Stage, sizes: Mapping[str, int], tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    sampled = check_sampled_ids(sizes) if facts_of(config).pool is not None else []
    read = [] if tokenizer is None else vocabulary_problems(tokenizer, smallest_embedding(sizes))
    return [*sampled, *read]


def _spare(tokenizer: PreTrainedTokenizerBase, embedding: Embedding) -> list[str]:
    spare = spare_tokens(tokenizer, embedding)
    return [] if spare is None else [spare]


def _smallest(sources: "Mapping[str, WeightSource]") -> Embedding:
    # Every model of a stage reads the same ids; texts beside a policy's loss are the policy's alone, and no other
    # model of such a stage may be smaller.
    return smallest_embedding(_vocab_sizes(sources))


def _vocab_sizes(sources: "Mapping[str, WeightSource]") -> dict[str, int]:
    return {f"models.{role}": source.shape().vocab_size for role, source in sources.items()}
