"""Quantises a Hugging Face folder after training with NVIDIA ModelOpt, and proves what it wrote.

The folder is what vLLM serves: weights in FP8 (or FP4) with scales, quantization_config in config.json.
"""

import contextlib
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from modelopt.torch.export import export_hf_checkpoint
from torch import Tensor

from rto_megatron.convert import fake_quantized, quantized_folder
from rto_megatron.convert.calibration import Prompts, random_prompts, read_prompts
from rto_megatron.convert.conversion import Proofs, convert_to_hf, silent
from rto_megatron.convert.conversion_options import Options
from rto_megatron.convert.logits_error import LogitsError, compare, outputs
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.data.tokenizer_files import carry
from rto_megatron.errors import ConversionError
from rto_megatron.models.hf_config import HfConfig, read_config
from rto_megatron.models.weight_map import dtype_name
from rto_megatron.platform.fresh_folder import fresh_folder
from rto_megatron.storage.hf_folder import HfFolder

REPORT = "quantization_report.json"
_PACKAGES = ("nvidia-modelopt", "torch", "transformers", "safetensors", "rto-megatron")
# Written weights may be this much further from the original than those of the quantised model: ModelOpt rounds a bf16
# quotient before it rounds to FP8, which costs some percent.
_MAX_LOSS_RATIO = 1.25
_MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Choices:
    """What a user may choose.

    Attributes:
        format: fp8 or nvfp4.
        prompts: a data file; null: random tokens.
        num_prompts: sequences that calibrate the input scales.
        max_length: tokens of a sequence.
        seed: of random tokens.

    Example:
        Choices(format="fp8", prompts="prompts.jsonl", num_prompts=128, max_length=512, seed=0)
    """

    format: str
    prompts: str | None
    num_prompts: int
    max_length: int
    seed: int


@dataclass(frozen=True)
class QuantizationReport:
    """What was written and how far it is from the source.

    Attributes:
        inputs_and_weights: the quantised model against the original, before the export.
        weights_before: the same with exact inputs.
        weights_after: the weights of the folder, read back without ModelOpt, against the original.
        template_date: that the chat template printed into the prompts; None: none.
        before_to_after: the last two against each other; next to nothing where the model is float32.

    Example:
        report.bytes_after / report.bytes_before
    """

    source: str
    format: str
    dtype: str
    prompts: str
    prompts_sha256: str
    template_date: str | None
    num_calibration: int
    num_held_out: int
    bytes_before: int
    bytes_after: int
    coverage: quantized_folder.QuantizedMatrices
    inputs_and_weights: LogitsError
    weights_before: LogitsError
    weights_after: LogitsError
    before_to_after: LogitsError
    files: dict[str, str]
    versions: dict[str, str]
    not_checked: str = "loading in vLLM: FP8 and FP4 need its CUDA build"


def quantize_checkpoint(source: Path, target: Path, choices: Choices) -> QuantizationReport:
    """Quantises `source` into the fresh folder `target`.

    Args:
        source: a Hugging Face folder, or what `open_megatron` takes: a run, a converted or a Megatron-LM checkpoint.

    Raises:
        UserError: the target exists, the source or the prompts cannot be used, or the written folder is not what the
            quantised model is.
    """
    with _hugging_face_folder(source, target) as folder:
        return _quantize(folder, target, choices, str(source))


def _quantize(folder: Path, target: Path, choices: Choices, source: str) -> QuantizationReport:
    config = _readable_config(folder, choices)
    prompts = _prompts(folder, config, choices)
    tensors = HfFolder(folder)
    model = fake_quantized.build(folder, config, {name: tensors.tensor(name) for name in tensors.tensors})
    dtype = dtype_name(model.dtype)
    original = outputs(model, prompts.held_out)
    with contextlib.redirect_stdout(sys.stderr), fresh_folder(target) as partial:
        fake_quantized.calibrate(model, choices.format, prompts)
        quantized = outputs(model, prompts.held_out)
        with fake_quantized.exact_inputs(model):
            weights_only = outputs(model, prompts.held_out)
        scales = fake_quantized.input_scales(model, choices.format)
        export_hf_checkpoint(model, export_dir=partial)
        del model
        files = carry(folder, partial)
        coverage, read_back = _prove(folder, config, partial, scales, prompts)
        report = QuantizationReport(
            source=source,
            format=choices.format,
            dtype=dtype,
            prompts=prompts.origin,
            prompts_sha256=prompts.sha256(),
            template_date=prompts.template_date,
            num_calibration=len(prompts.calibration),
            num_held_out=len(prompts.held_out),
            bytes_before=_weight_bytes(folder),
            bytes_after=_weight_bytes(partial),
            coverage=coverage,
            inputs_and_weights=compare(original, quantized),
            weights_before=compare(original, weights_only),
            weights_after=compare(original, read_back),
            before_to_after=compare(weights_only, read_back),
            files=files,
            versions={package: version(package) for package in _PACKAGES},
        )
        _require_faithful(report)
        (partial / REPORT).write_text(json.dumps(asdict(report), indent=1))
    return report


@contextlib.contextmanager
def _hugging_face_folder(source: Path, target: Path) -> Iterator[Path]:
    """The Hugging Face folder to quantise; a Megatron checkpoint is converted into one beside the target."""
    if (source / "config.json").is_file():
        yield source
        return
    opened = open_megatron(source, None, None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}_hf_") as place:
        folder = Path(place) / "hf"
        options, proofs = Options(None, _MAX_FILE_BYTES, None), Proofs(digest=True, logits=None)
        convert_to_hf(opened, folder, options, proofs, silent, dry_run=False)
        yield folder


def _readable_config(folder: Path, choices: Choices) -> HfConfig:
    config = read_config(folder)
    if "quantization_config" in config.values:
        config.refuse("the model is quantised already; give the folder that it was made from")
    config.require("architectures", "vocab_size", "max_position_embeddings")
    longest = config.values["max_position_embeddings"]
    if choices.max_length > longest:
        config.refuse(
            f"max_position_embeddings={longest} is below --max-length {choices.max_length}; lower that"
        )
    return config


def _prompts(folder: Path, config: HfConfig, choices: Choices) -> Prompts:
    vocab_size = config.values["vocab_size"]
    if choices.prompts is None:
        return random_prompts(vocab_size, choices.num_prompts, choices.max_length, choices.seed)
    return read_prompts(choices.prompts, folder, vocab_size, choices.num_prompts, choices.max_length)


def _prove(
    folder: Path, config: HfConfig, written: Path, scales: Collection[float], prompts: Prompts
) -> tuple[quantized_folder.QuantizedMatrices, list[Tensor]]:
    """Reads the written folder back: names, scales and values, and the outputs of its weights in transformers."""
    source = HfFolder(folder)  # opened again: the model was built over the pages of the first
    tensors = quantized_folder.read_tensors(written)
    coverage = quantized_folder.prove(source, tensors, scales)
    model = fake_quantized.build(folder, config, quantized_folder.dequantized(tensors, source))
    return coverage, outputs(model, prompts.held_out)


def _require_faithful(report: QuantizationReport) -> None:
    before, after = report.weights_before.mean_abs, report.weights_after.mean_abs
    # Written so that a NaN is refused.
    if not after <= _MAX_LOSS_RATIO * before:
        raise ConversionError(
            f"the written weights move the outputs by {after:g} in the mean, those of the quantised model by "
            f"{before:g}; expected at most {_MAX_LOSS_RATIO:g} times that. The target was not made; its files are "
            "beside it as .partial_*"
        )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
