"""Packed sequences are rotated at once, on GPUs too: megatron-core 0.19.2 turns them one by one."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rto_megatron.platform.patches import replace

type Rotate = Callable[..., Tensor]


def install() -> None:
    """Replaces the rotation of packed sequences in megatron.core; a second call changes nothing.

    Call site: apply_rotary_pos_emb of models/common/embeddings/rope_utils.py, where nothing is fused.
    """
    from megatron.core.models.common.embeddings import rope_utils

    rotate: Rotate = rope_utils._apply_rotary_pos_emb_thd
    if not hasattr(rotate, "__wrapped__"):
        replace(rope_utils, "_apply_rotary_pos_emb_thd", _all_at_once(rotate))


def _all_at_once(one_by_one: Rotate) -> Rotate:
    """Hands each token the frequencies of its position: then all rows are rotated alike, bit for bit as one by one."""

    @functools.wraps(one_by_one)
    def rotate(tokens: Tensor, cu_seqlens: Tensor, freqs: Tensor, **options: object) -> Tensor:
        group = options.get("cp_group")
        assert isinstance(group, torch.distributed.ProcessGroup)
        num_tokens = len(tokens)
        if (
            group.size() == 1 and len(freqs) != num_tokens
        ):  # else they are those of the tokens already, or cut up
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
            freqs = freqs[torch.arange(num_tokens, device=freqs.device) - starts]
            cu_seqlens = cu_seqlens[[0, -1]]
        return one_by_one(tokens, cu_seqlens, freqs, **options)

    return rotate
