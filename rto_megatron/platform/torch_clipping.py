"""Norm and clipping of gradients in place and in few kernels, with torch alone: numbered patches, on GPUs too.

megatron-core 0.19.2 without TransformerEngine and apex reads the norm of every gradient to the host, where a GPU waits
for each, and makes a copy of every gradient that it clips.
"""

from collections.abc import Callable, Sequence, Set

import torch
from torch import Tensor

from rto_megatron.platform.patches import apply_missing, replace

_applied: set[str] = set()


def g1_norms_at_once() -> None:
    """All norms stay on their device until one of them is read.

    Call site: get_grad_norm_fp32 of optimizer/clip_grads.py.
    """
    from megatron.core.optimizer import clip_grads

    def l2_norm(
        chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], per_tensor: bool
    ) -> tuple[Tensor, None]:
        (gradients,) = lists
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).reshape(1), None

    replace(clip_grads, "l2_norm_impl", l2_norm)


def g2_clip_in_place() -> None:
    """Gradients that are clipped are multiplied where they are.

    Call site: clip_grad_by_total_norm_fp32 of optimizer/clip_grads.py, which gives the same list as source and target.
    """
    from megatron.core.optimizer import clip_grads

    def scale(chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], factor: float) -> None:
        source, target = lists
        assert source is target
        torch._foreach_mul_(target, factor)

    replace(clip_grads, "multi_tensor_scale_impl", scale)


PATCHES: dict[str, Callable[[], None]] = {"G1": g1_norms_at_once, "G2": g2_clip_in_place}


def install(skip: Set[str] = frozenset()) -> None:
    """Applies the patches that this process does not have yet.

    Args:
        skip: names of patches to leave out, for the tests that show what each one is for.
    """
    apply_missing(PATCHES, _applied, skip)
