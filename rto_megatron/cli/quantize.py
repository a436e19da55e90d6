"""`rto quantize`: a checkpoint in FP8 or FP4 for serving in vLLM, proved."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rto_megatron.errors import MachineError, ModelFolderError

if TYPE_CHECKING:
    from rich.table import Table

    from rto_megatron.convert.quantize import QuantizationReport


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(quantize)


def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            help="Policy or reward model: a Hugging Face folder, a run folder, or a Megatron-LM checkpoint.",
            show_default=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; never overwritten.", show_default=False)],
    form: Annotated[
        Literal["fp8", "nvfp4"],
        typer.Option(
            "--format",
            help="fp8: E4M3, one scale a matrix, made anywhere. nvfp4: made on a CUDA device only.",
        ),
    ] = "fp8",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: .jsonl, .jsonl.gz, .parquet or owner/name:split with a column prompt, "
            "messages, chosen, text, response or completion. Without it: random tokens, fit for tests only.",
            show_default=False,
        ),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that calibrate; 8 more are held out to measure the error.")
    ] = 128,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt; longer ones are cut.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 42,
) -> None:
    """Quantise a model with NVIDIA ModelOpt, and prove what was written.

    TARGET holds weights in FP8 or FP4 with their scales, the tokenizer's files byte for byte, and
    quantization_report.json. Embeddings, output heads and routers stay as they are.

    The folder is read back without ModelOpt: every matrix must be there once, with the scale that its weights give
    and values that rounding explains; its dequantised weights run in transformers, and their logits are compared with
    the original's on held-out prompts. `vllm serve TARGET` finds the format in config.json. vLLM itself was not tried:
    its CPU build loads the tensors and stops for want of a CUDA kernel (static_scaled_fp8_quant).
    """
    from rto_megatron.data.sources import read_rows
    from rto_megatron.models.model_folder import misnamed
    from rto_megatron.platform.fresh_folder import require_absent

    # Before ModelOpt is imported, which takes up to a minute.
    require_absent(target)
    if not source.exists():
        raise ModelFolderError(misnamed(source))
    if prompts is not None:
        next(read_rows(prompts), None)  # a source that cannot be read says so at its first row
    if form == "nvfp4":
        _require_cuda()
    from rich.console import Console

    from rto_megatron.convert.quantize import Choices, quantize_checkpoint

    report = quantize_checkpoint(source, target, Choices(form, prompts, num_prompts, max_length, seed))
    Console().print(_table(report))


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "--format nvfp4 needs a CUDA device: ModelOpt quantises FP4 inputs with CUDA kernels, and none was found; "
            "use --format fp8 or a machine with a GPU"
        )


def _table(report: "QuantizationReport") -> "Table":
    from rich.table import Table

    table = Table(title=f"{report.source} -> {report.format}", show_header=False)
    kept = report.coverage.kept
    rows = [
        (
            "matrices",
            f"{report.coverage.num_quantized} quantised; {len(kept)} left alone: {', '.join(kept[:4])}",
        ),
        ("bytes", f"{report.bytes_before:,} -> {report.bytes_after:,}"),
        ("prompts", report.prompts),
    ]
    for title, error in (
        ("inputs and weights", report.inputs_and_weights),
        ("weights alone", report.weights_before),
        ("weights, read back", report.weights_after),
        ("the last two", report.before_to_after),
    ):
        text = f"mean |diff| {error.mean_abs:.3g}, max {error.max_abs:.3g}"
        if error.mean_kl_nats is not None and error.top1_agreement is not None:
            text += (
                f", KL {error.mean_kl_nats:.3g} nats a token, same first choice {error.top1_agreement:.1%}"
            )
        rows.append((title, text))
    rows.append(("not checked", report.not_checked))
    for row in rows:
        table.add_row(*row)
    return table
