"""config.json and tokenizer beside converted weights."""

import json
from pathlib import Path
from typing import Any

from rto_megatron.convert.conversion_report import ConversionPlan
from rto_megatron.data.score_place import read_elsewhere
from rto_megatron.data.tokenizer import has_sentencepiece_alone, has_tokenizer, load_plain_tokenizer
from rto_megatron.data.vocabulary import Embedding, spare_tokens, vocabulary_problems
from rto_megatron.errors import UserError
from rto_megatron.models.config_files import as_exported
from rto_megatron.models.weight_map import dtype_name


def vocabulary_notes(folder: Path | None, vocab_size: int, is_scalar: bool) -> tuple[str, ...]:
    """Where a tokenizer, which is carried as it is, does not fit the model: ids without a row, scores read elsewhere.

    Args:
        folder: of the tokenizer; null: there is none.
        is_scalar: the model is a reward model or critic.
    """
    if folder is None or not has_tokenizer(folder):
        return ()
    try:
        tokenizer = load_plain_tokenizer(folder)
    except UserError as error:
        return (f"the tokenizer is carried unread: {error}",)
    embedding = Embedding("the model", vocab_size)
    spare = spare_tokens(tokenizer, embedding)
    notes = [*vocabulary_problems(tokenizer, embedding), *([spare] if spare else [])]
    if is_scalar and (where := read_elsewhere(folder, tokenizer)) is not None:
        notes.append(
            f"transformers reads scores {where}; this program reads them at that token, where its stages train them"
        )
    return tuple(notes)


def tokenizer_notes(folder: Path) -> tuple[str, ...]:
    """What users of other programs should know about a tokenizer that was carried."""
    if not has_sentencepiece_alone(folder):
        return ()
    return (
        "SentencePiece's tokenizer.model has no tokenizer.json beside it: this program reads it exactly, "
        "transformers 5 and vLLM may guess other ids from it",
    )


def write_config(values: dict[str, object], plan: ConversionPlan, head_bias: float, folder: Path) -> None:
    """Writes the source's config.json with the dtype and architecture of what was written.

    Args:
        head_bias: a constant b of the scalar head; (w h + b - mean) / std has it in the mean.
    """
    config: dict[str, Any] = as_exported(
        values, plan.shape.family, plan.has_scalar_head, dtype_name(plan.dtype)
    )
    if head_bias:
        config.update(mean=(config.get("mean") or 0.0) - head_bias, std=config.get("std") or 1.0)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
