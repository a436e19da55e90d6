"""Norm and clipping of gradients in place and in few kernels, with torch alone: a patch, on GPUs too.

megatron-core 0.19.2 without TransformerEngine and apex reads the norm of every gradient to the host, where a GPU waits
for each, and makes a copy of every gradient that it clips.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rto_megatron.platform.patches import replace


def install() -> None:
    """All norms stay on their device until one number is read; what is clipped is multiplied where it is.

    Call sites: get_grad_norm_fp32 and clip_grad_by_total_norm_fp32 of optimizer/clip_grads.py.
    """
    from megatron.core.optimizer import clip_grads

    replace(clip_grads, "l2_norm_impl", _l2_norm)
    replace(clip_grads, "multi_tensor_scale_impl", _scale)


def _l2_norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    (gradients,) = lists
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).reshape(1), None


def _scale(chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], factor: float) -> None:
    source, target = lists
    assert source is target  # as Megatron clips
    torch._foreach_mul_(target, factor)
