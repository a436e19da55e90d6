"""config.json and tokenizer beside converted weights."""

import json
from pathlib import Path
from typing import Any

from rto_megatron.convert.options import dtype_name
from rto_megatron.convert.report import Report
from rto_megatron.data.tokenizer import SENTENCEPIECE_FILE
from rto_megatron.data.tokenizer_files import carry
from rto_megatron.models.config_files import as_exported

_TWINS = {"tokenizer.json", "vocab.json", "tekken.json"}


def carry_tokenizer(source: Path, folder: Path, report: Report) -> None:
    """Copies the tokenizer's files byte for byte and records their hashes.

    Raises:
        UserError: a file leads out of the source.
    """
    report.tokenizer_files = carry(source, folder)
    if SENTENCEPIECE_FILE in report.tokenizer_files and not _TWINS & report.tokenizer_files.keys():
        report.notes.append(
            "SentencePiece's tokenizer.model has no tokenizer.json beside it: this program reads it exactly, "
            "transformers 5 and vLLM may guess other ids from it"
        )


def write_config(values: dict[str, Any], report: Report, head_bias: float, folder: Path) -> None:
    """Writes the source's config.json with the dtype and architecture of what was written.

    Args:
        head_bias: a constant b of the scalar head; (w h + b - mean) / std has it in the mean.
    """
    dtype = dtype_name(report.dtype)
    config = as_exported(values, report.shape.family, report.has_scalar_head, dtype)
    if head_bias:
        config.update(mean=(config.get("mean") or 0.0) - head_bias, std=config.get("std") or 1.0)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
