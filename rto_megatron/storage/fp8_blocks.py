"""DeepSeek's FP8 weights: a float8 matrix and one inverse scale for every block of 128 x 128."""

import torch
from torch import Tensor

from rto_megatron.models.hf_config import HfConfig

SCALE_SUFFIX = "_scale_inv"
_BLOCK = 128


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The bfloat16 matrix.

    Args:
        weight: float8_e4m3fn [r, c].
        scale: float32 [ceil(r / 128), ceil(c / 128)], by which the numbers of a block are multiplied.

    Source: DeepSeek-V3, inference/kernel.py:weight_dequant.
    """
    rows, columns = weight.shape
    spread = scale.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]
    return (weight.float() * spread).to(torch.bfloat16)


def scale_shape(size: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix of this size."""
    return tuple(-(-count // _BLOCK) for count in size)


def require_known(config: HfConfig) -> None:
    """Refuses quantised weights other than these.

    Raises:
        UserError: config.json names another quantisation.
    """
    quantization = config.values.get("quantization_config")
    if quantization is None:
        return
    if quantization.get("quant_method") != "fp8" or quantization.get("weight_block_size") != [_BLOCK, _BLOCK]:
        config.refuse(
            f"quantization_config is {quantization}; expected plain weights, or FP8 in blocks of {_BLOCK} x {_BLOCK}. "
            "Take the model's unquantised release"
        )
