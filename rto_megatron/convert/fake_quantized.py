"""A transformers model with ModelOpt's quantisers in it: it computes in its own dtype with rounded numbers."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from modelopt.torch import quantization
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rto_megatron.convert.calibration import Prompts
from rto_megatron.convert.logits_error import outputs
from rto_megatron.convert.quantized_folder import FP4_MAX, FP8_MAX
from rto_megatron.errors import ConversionError
from rto_megatron.models.hf_config import HfConfig

# format -> (ModelOpt's settings, largest input / scale)
_FORMATS = {
    "fp8": (quantization.FP8_DEFAULT_CFG, FP8_MAX),
    "nvfp4": (quantization.NVFP4_DEFAULT_CFG, FP8_MAX * FP4_MAX),
}


def build(folder: Path, config: HfConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model of a folder's config.json, every parameter filled from `weights`."""
    is_reward = config.values["architectures"][0].endswith("ForSequenceClassification")
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # only to learn the class, which alone takes a state dict without a folder
        kind = type(auto.from_config(settings))  # type: ignore[no-untyped-call]  # transformers left it so
    how = {"dtype": "auto", "attn_implementation": "eager"}  # torch's kernels leave out a soft cap of scores
    model, loading = kind.from_pretrained(
        None, config=settings, state_dict=weights, output_loading_info=True, **how
    )
    wrong = {what: sorted(loading[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ConversionError(f"{folder}: transformers cannot fill {kind.__name__} from its tensors: {wrong}")
    placed: PreTrainedModel = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return placed


@torch.no_grad()
def calibrate(model: PreTrainedModel, form: str, prompts: Prompts) -> None:
    """Puts quantisers into the model, in place, and measures the inputs of every matrix."""
    settings = copy.deepcopy(_FORMATS[form][0])
    # The scalar head of a reward model is one row: nothing to gain, and its precision is the reward's.
    settings["quant_cfg"].append({"quantizer_name": "*score*", "enable": False})
    quantization.quantize(model, settings, lambda _: outputs(model, prompts.calibration))


def _input_quantizers(model: PreTrainedModel) -> list[TensorQuantizer]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and name.endswith("input_quantizer") and module.is_enabled
    ]


@contextlib.contextmanager
def exact_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Inside, only weights are quantised."""
    quantizers = _input_quantizers(model)
    for quantizer in quantizers:
        quantizer.disable()
    yield
    for quantizer in quantizers:
        quantizer.enable()


def input_scales(model: PreTrainedModel, form: str) -> set[float]:
    """What ModelOpt will write as input scales, by its calibration."""
    return {float(quantizer.amax) / _FORMATS[form][1] for quantizer in _input_quantizers(model)}
