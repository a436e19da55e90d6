"""Packed sequences are rotated at once, on GPUs too: megatron-core 0.19.2 turns them one by one.

Over context ranks a row is cut into equal runs of tokens, where Megatron cuts every sequence (`parallel/context.py`).
"""

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
    from megatron.core.models.common.embeddings import rope_utils

    @functools.wraps(one_by_one)
    def rotate(
        tokens: Tensor,
        cu_seqlens: Tensor,
        freqs: Tensor,
        *,
        cp_group: torch.distributed.ProcessGroup,
        **options: object,
    ) -> Tensor:
        num_tokens = len(tokens) * cp_group.size()  # of the whole row, as the offsets are
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
        positions = torch.arange(num_tokens, device=freqs.device) - starts
        own = positions.chunk(cp_group.size())[cp_group.rank()]
        rotated: Tensor = rope_utils._apply_rotary_pos_emb_bshd(tokens[:, None], freqs[own], **options)
        return rotated.squeeze(1)

    return rotate
