"""config.json beside converted weights."""

import json
from pathlib import Path
from typing import Any

from rto_megatron.convert.report import Report
from rto_megatron.models.config_files import as_exported


def write_config(values: dict[str, Any], report: Report, head_bias: float, folder: Path) -> None:
    """Writes the source's config.json with the dtype and architecture of what was written.

    Args:
        head_bias: a constant b of the scalar head; (w h + b - mean) / std has it in the mean.
    """
    dtype = str(report.dtype).removeprefix("torch.")
    config = as_exported(values, report.shape.family, report.has_scalar_head, dtype)
    if head_bias:
        config.update(mean=(config.get("mean") or 0.0) - head_bias, std=config.get("std") or 1.0)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
