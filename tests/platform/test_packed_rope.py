"""Packed sequences are rotated at once as megatron.core rotates them one by one, bit for bit, gradients too."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rope_utils
from ranks import run_ranks
from torch import Tensor


def _both(lengths: tuple[int, ...], width: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients by the program, and by megatron's own function, of 3 heads of 8."""
    dist.init_process_group("gloo")
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randn(sum(lengths), 3, 8, generator=chance)
    freqs = torch.randn(max(lengths), 1, 1, width, generator=chance)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    found = []
    for rotate in (
        rope_utils._apply_rotary_pos_emb_thd,
        rope_utils._apply_rotary_pos_emb_thd.__wrapped__,
    ):
        own = tokens.clone().requires_grad_()
        out = rotate(own, ends, freqs, mscale=1.25, cp_group=dist.group.WORLD)
        (out * out.detach().cos()).sum().backward()
        found.append([out.detach(), own.grad])
    return found[0], found[1]


@pytest.mark.parametrize("lengths", [(5, 3, 7), (4,), (1, 1, 6), (3, 3)])
@pytest.mark.parametrize("width", [8, 4])  # a part of each head, as some families rotate
def test_all_at_once_is_one_by_one(lengths: tuple[int, ...], width: int) -> None:
    ((ours, theirs),) = run_ranks(1, _both, lengths, width)
    assert not torch.equal(ours[0], torch.zeros_like(ours[0]))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
