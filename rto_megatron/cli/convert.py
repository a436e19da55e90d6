"""`rto convert`: checkpoints from and to Hugging Face format, proved."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from rich.table import Table

    from rto_megatron.convert.conversion import Proofs
    from rto_megatron.convert.conversion_options import Advance, Options
    from rto_megatron.convert.conversion_report import LogitsProof

app = typer.Typer(
    name="convert",
    help="Convert checkpoints between Hugging Face and Megatron format, and prove that both hold the same model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Verify = Annotated[
    Literal["none", "digest", "logits"],
    typer.Option(
        help="digest: read both folders again, every tensor bit-equal there and back. logits: that, and the outputs of "
        "Megatron ranks at --tensor x --pipeline against transformers' in float32 (both models in memory)."
    ),
]
Head = Annotated[
    Literal["auto", "language", "scalar"],
    typer.Option(help="A language model, or a reward model or critic; auto: what the source is."),
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Of the weights written; auto: the source's, the wider one where it is mixed."),
]
ShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest file, as 5GB, 500MB or 2GiB; one tensor may be larger.")
]
Tensor = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of --verify logits.")]
Pipeline = Annotated[int, typer.Option(min=1, help="Pipeline stages of --verify logits.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be written.")]
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@app.command("hf-to-megatron")
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder with safetensors.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="New folder to write.", show_default=False)],
    verify: Verify = "digest",
    dtype: Dtype = "auto",
    max_shard_size: ShardSize = "5GB",
    head: Head = "auto",
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    dry_run: DryRun = False,
) -> None:
    """Write a Megatron-LM checkpoint: a recipe can name it, and Megatron-LM loads it at any TP x PP x EP.

    Needs no GPU and no TransformerEngine, and holds one parameter in memory. The folder appears when it is proved,
    with conversion_report.json inside; after a kill, run the same command again.
    """
    from rto_megatron.convert.conversion import convert_to_megatron

    options = _options(dtype, max_shard_size, head)
    proofs = _proofs(verify, tensor, pipeline)
    _show(convert_to_megatron(source, target, options, proofs, bar, dry_run), target, dry_run)


@app.command("megatron-to-hf")
def megatron_to_hf(
    source: Annotated[
        Path,
        typer.Argument(
            help="Run folder, one checkpoint of it, or a Megatron-LM checkpoint (torch_dist).",
            show_default=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(help="New folder to write.", show_default=False)],
    verify: Verify = "digest",
    dtype: Dtype = "auto",
    max_shard_size: ShardSize = "5GB",
    head: Head = "auto",
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    hf_files: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the config.json and tokenizer of the model; default: those beside the checkpoint, or a "
            "config.json made from Megatron-LM's arguments."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load; a reward model becomes a one-label classifier."""
    from rto_megatron.convert.conversion import convert_to_hf
    from rto_megatron.convert.megatron_source import open_megatron

    options = _options(dtype, max_shard_size, head)
    opened = open_megatron(source, hf_files, options.has_scalar_head)
    proofs = _proofs(verify, tensor, pipeline)
    _show(convert_to_hf(opened, target, options, proofs, bar, dry_run), target, dry_run)


@app.command("verify")
def verify_command(
    hf: Annotated[Path, typer.Argument(help="Hugging Face folder.", show_default=False)],
    megatron: Annotated[Path, typer.Argument(help="Megatron checkpoint.", show_default=False)],
    verify: Annotated[Literal["digest", "logits"], Verify.__metadata__[0]] = "digest",
    head: Head = "auto",
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
) -> None:
    """Prove that a Hugging Face folder and a Megatron checkpoint hold one model; names every tensor that differs."""
    from rto_megatron.convert.conversion import verify_pair

    shown = verify_pair(hf, megatron, _is_scalar(head), _proofs(verify, tensor, pipeline), bar)
    _console().print(shown)


@app.command("gguf-to-hf")
def gguf_to_hf(
    source: Annotated[
        Path, typer.Argument(help="One .gguf file, of a family that is trained here.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(help="New folder to write.", show_default=False)],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights written.")] = "bf16",
) -> None:
    """Write a Hugging Face folder from llama.cpp's file: a starting point for training, with what packing lost lost.

    Needs the package gguf. Every tensor is read back bit-equal, and two greedy answers are shown beside the file's own.
    """
    import torch

    from rto_megatron.convert.gguf_to_hf import convert_gguf
    from rto_megatron.reporting.progress import say

    report = convert_gguf(source, target, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    say(f"{target}: {report.model_type}, {report.num_tensors} tensors in {report.dtype}, bit-equal", True)
    for one in report.answers:
        say(
            f"  {one.question} -> {one.answer!r} ({one.num_alike} of {one.num_tokens} tokens as the file's)",
            True,
        )


@app.command("outputs", hidden=True)
def outputs(
    megatron: Path,
    hf_files: Path,
    tokens: Path,
    target: Path,
    tensor: Annotated[int, typer.Option()],
    pipeline: Annotated[int, typer.Option()],
    head: Annotated[Literal["language", "scalar"], typer.Option()],
) -> None:
    """One rank of --verify logits, started by torchrun."""
    from rto_megatron.convert.logits import write_outputs

    write_outputs(megatron, hf_files, tokens, target, tensor, pipeline, head == "scalar")


def _options(dtype: str, max_shard_size: str, head: str) -> "Options":
    import torch

    from rto_megatron.convert.conversion_options import Options

    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", max_shard_size.upper())
    if match is None or float(match[1]) <= 0:
        raise RecipeError(f"--max-shard-size {max_shard_size}: expected a size such as 5GB, 500MB or 2GiB")
    return Options(dtypes[dtype], int(float(match[1]) * _UNITS[match[2]]), _is_scalar(head))


def _is_scalar(head: str) -> bool | None:
    return None if head == "auto" else head == "scalar"


def _proofs(verify: str, tensor: int, pipeline: int) -> "Proofs":
    from rto_megatron.convert.conversion import Proofs

    if verify != "logits":
        if (tensor, pipeline) != (1, 1):
            raise RecipeError(
                f"--tensor {tensor} --pipeline {pipeline} are of --verify logits alone; what is written loads at "
                "any layout"
            )
        return Proofs(digest=verify == "digest", logits=None)

    def logits(hf_folder: Path, megatron: Path, scalar: bool) -> "LogitsProof":
        from rto_megatron.convert.logits import prove_logits
        from rto_megatron.launching.torchrun import run_ranks

        return prove_logits(hf_folder, megatron, scalar, tensor, pipeline, run_ranks)

    return Proofs(digest=True, logits=logits, layout=(tensor, pipeline))


@contextmanager
def bar(title: str, size: int) -> "Iterator[Advance]":
    """Shows the progress of a conversion by its bytes."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=size)
        yield lambda nbytes: progress.advance(task, nbytes)


def _console() -> Console:
    return Console() if Console().is_terminal else Console(width=140)


def _show(shown: "Table", target: Path, dry_run: bool) -> None:
    console = _console()
    console.print(shown)
    console.print(
        f"{target}: {'nothing was written (--dry-run)' if dry_run else 'written'}",
        markup=False,
        highlight=False,
    )
