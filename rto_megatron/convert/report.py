"""What a conversion did and what was proved about it: conversion_report.json and a short table."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from rto_megatron.convert.options import dtype_name, write_dtype
from rto_megatron.errors import UserError
from rto_megatron.models.config_files import architecture
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter
from rto_megatron.storage.megatron_folder import REPORT

_PACKAGES = ("megatron-core", "torch", "transformers", "safetensors", "rto-megatron")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor by its Hugging Face name, as it was written."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str | None  # of dtype, shape and bytes


def planned(parameters: Sequence[MappedParameter], dtype: torch.dtype) -> dict[str, TensorRecord]:
    """What will be written, in the order in which it will be."""
    return {
        name: TensorRecord(size, dtype_name(write_dtype(p.is_float32, dtype)), None)
        for p in parameters
        for name, size in zip(p.hf, p.hf_shapes, strict=True)
    }


def recorded_digests(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """sha256 by name that the conversion which made `folder` noted; none without one, or of another dtype.

    Raises:
        UserError: the report is damaged.
    """
    path = folder / REPORT
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
        tensors = {name: record["sha256"] for name, record in values["tensors"].items()}
        is_same = values["dtype"] == dtype_name(dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the model again, or remove it") from error
    return {name: digest for name, digest in tensors.items() if digest is not None and is_same}


@dataclass(frozen=True)
class LogitsProof:
    """The largest difference between Megatron's outputs and transformers', both in float32."""

    tensor_parallel: int
    pipeline_parallel: int
    num_tokens: dict[str, int]  # random and real text -> tokens
    max_difference: dict[str, float]
    largest_output: float
    tolerance: float


@dataclass
class Report:
    """A conversion; `verified` says how it was proved."""

    direction: str
    source: str
    target: str
    shape: ModelShape
    has_scalar_head: bool
    dtype: torch.dtype
    tensors: dict[str, TensorRecord]
    left_aside: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    verified: list[str] = field(default_factory=list)
    logits: LogitsProof | None = None

    def size(self) -> int:
        """Bytes of the tensors as they are written."""
        return sum(
            math.prod(record.shape) * getattr(torch, record.dtype).itemsize
            for record in self.tensors.values()
        )

    def write(self, path: Path) -> None:
        """As JSON."""
        values = asdict(self)
        values.update(
            dtype=dtype_name(self.dtype),
            architecture=architecture(self.shape.family, self.has_scalar_head),
            coverage={"missing": [], "left_over": [], "left_aside": self.left_aside},
            verified=self.verified or ["nothing: --verify none"],
            versions={package: version(package) for package in _PACKAGES},
        )
        del values["left_aside"]
        path.write_text(json.dumps(values, indent=1))

    def table(self) -> Table:
        """The short form for a terminal."""
        rate = self.size() / 1e9 / self.seconds if self.seconds else 0.0
        table = Table(title=self.direction, show_header=False)
        for row in (
            ("model", architecture(self.shape.family, self.has_scalar_head)),
            ("tensors", f"{len(self.tensors)}, every one mapped, none missing, none left over"),
            ("dtype", dtype_name(self.dtype)),
            (
                "bytes",
                f"{self.size():,}" + (f" in {self.seconds:.1f} s, {rate:.2f} GB/s" if self.seconds else ""),
            ),
            *(("left aside", f"{name}: {reason}") for name, reason in list(self.left_aside.items())[:3]),
            *(("note", note) for note in self.notes),
            ("tokenizer", ", ".join(self.tokenizer_files) or "none"),
            *(("proved", proof) for proof in self.verified or ["nothing"]),
        ):
            table.add_row(*map(escape, row))
        return table
