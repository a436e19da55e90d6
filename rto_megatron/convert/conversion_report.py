"""What a conversion is to do, and what it did and how it was proved: conversion_report.json and a short table."""

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from rto_megatron.errors import ConversionError
from rto_megatron.models.config_files import architecture
from rto_megatron.models.parameters import hf_shapes, stored_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import dtype_name
from rto_megatron.storage.megatron_folder import REPORT
from rto_megatron.storage.not_finite import described

_PACKAGES = ("megatron-core", "torch", "transformers", "safetensors", "rto-megatron")
_SHOWN = 3


def recorded_digests(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """sha256 by name that the conversion which made `folder` noted; none without one, or of another dtype.

    Raises:
        ConversionError: the report is damaged.
    """
    path = folder / REPORT
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
        tensors = {name: record["sha256"] for name, record in values["tensors"].items()}
        is_same = values["dtype"] == dtype_name(dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} is damaged ({error}); convert the model again, or remove it"
        ) from error
    return {name: digest for name, digest in tensors.items() if digest is not None and is_same}


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion whose source was checked: every tensor of the model is there, and nothing else but `left_aside`.

    Example:
        for label, value in plan.rows(): print(label, value)
    """

    direction: str
    source: Path
    target: Path
    shape: ModelShape
    has_scalar_head: bool
    source_dtype: torch.dtype
    dtype: torch.dtype
    num_stored: int  # tensors or entries of the source
    left_aside: dict[str, str]  # of them, no weights of the model -> reason
    notes: tuple[str, ...]

    def dtypes(self) -> dict[str, torch.dtype]:
        """Hugging Face name -> dtype in which it is written, in the order of the forward pass."""
        parameters = stored_parameters(self.shape, self.has_scalar_head)
        return {name: p.dtype(self.dtype) for p in parameters for name in p.hf}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape."""
        return hf_shapes(stored_parameters(self.shape, self.has_scalar_head))

    def size(self) -> int:
        """Bytes of the tensors as they are written."""
        dtypes = self.dtypes()
        return sum(math.prod(shape) * dtypes[name].itemsize for name, shape in self.shapes().items())

    def rows(self) -> list[tuple[str, str]]:
        """For a table on a terminal."""
        return [
            ("model", architecture(self.shape.family, self.has_scalar_head)),
            ("tensors", f"{len(self.shapes())}, every one mapped, none missing, none left over"),
            ("dtype", dtype_name(self.dtype)),
            ("bytes", f"{self.size():,}"),
            *(("left aside", f"{name}: {why}") for name, why in list(self.left_aside.items())[:_SHOWN]),
            *(("note", note) for note in self.notes),
        ]


@dataclass(frozen=True)
class WrittenFolder:
    """What stands in the new folder beside weights.

    Example:
        WrittenFolder(tokenizer_files=digests, notes=(), not_finite={}, seconds=12.5)
    """

    tokenizer_files: dict[str, str]  # name -> sha256
    notes: tuple[str, ...]
    not_finite: dict[str, int]  # name of a tensor -> how many of its numbers are NaN or infinite
    seconds: float


@dataclass(frozen=True)
class LogitsProof:
    """The largest difference between Megatron's outputs and transformers', both in float32.

    Example:
        proof.max_difference["logits"] < proof.tolerance
    """

    tensor_parallel: int
    pipeline_parallel: int
    num_tokens: dict[str, int]  # random and real text -> tokens
    max_difference: dict[str, float]
    largest_output: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"logits: at most {max(self.max_difference.values()):.1e} from transformers at TP{self.tensor_parallel} x "
            f"PP{self.pipeline_parallel}, float32"
        )


@dataclass(frozen=True)
class Proof:
    """What was shown, in words, and the sha256 of every tensor by name where they were compared.

    Example:
        Proof(digests=digests, logits=None, sentences=("all tensors are equal",))
    """

    digests: dict[str, str]
    logits: LogitsProof | None
    sentences: tuple[str, ...]


def write_report(path: Path, plan: ConversionPlan, written: WrittenFolder, proof: Proof) -> None:
    """Writes conversion_report.json."""
    dtypes = plan.dtypes()
    tensors = {
        name: {"shape": shape, "dtype": dtype_name(dtypes[name]), "sha256": proof.digests.get(name)}
        for name, shape in plan.shapes().items()
    }
    values = {
        "direction": plan.direction,
        "source": str(plan.source),
        "target": str(plan.target),
        "model_type": plan.shape.family,
        "architecture": architecture(plan.shape.family, plan.has_scalar_head),
        "dtype": dtype_name(plan.dtype),
        "source_dtype": dtype_name(plan.source_dtype),
        "proved": proof.sentences,
        "logits": vars(proof.logits) if proof.logits else None,
        "coverage": {"stored": plan.num_stored, "written": len(tensors), "left_aside": plan.left_aside},
        "notes": (*plan.notes, *written.notes),
        "not_finite": written.not_finite,
        "tokenizer_files": written.tokenizer_files,
        "seconds": written.seconds,
        "versions": {package: version(package) for package in _PACKAGES},
        "tensors": tensors,
    }
    path.write_text(json.dumps(values, indent=1))


def table(plan: ConversionPlan, written: WrittenFolder | None, proof: Proof | None) -> Table:
    """The short form; without `written` and `proof` of a dry run."""
    shown = Table(title=plan.direction, show_header=False)
    rows = plan.rows()
    if written is not None:
        rate = plan.size() / 1e9 / written.seconds
        rows.append(("written", f"in {written.seconds:.1f} s, {rate:.2f} GB/s"))
        rows += [("note", note) for note in written.notes]
        if written.not_finite:
            rows.append(("warning", f"{described(written.not_finite)}; outputs that meet them are NaN"))
        rows.append(("tokenizer", ", ".join(written.tokenizer_files) or "none"))
    if proof is not None:
        rows += [("proved", sentence) for sentence in proof.sentences or ("nothing",)]
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown
