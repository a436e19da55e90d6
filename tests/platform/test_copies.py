"""Host memory that is pinned, of which torch takes the next power of two."""

from itertools import pairwise

import pytest
import torch

from rto_megatron.platform.copies import HostPool, host_pieces

MIB = 1 << 20


@pytest.mark.parametrize(
    "num_bytes", [0, 1, 16 * MIB, 16 * MIB + 1, 33 * MIB + 7, 127 * MIB + 4095, 129 * MIB]
)
def test_pieces_of_powers_of_two_waste_less_than_the_smallest_of_them(num_bytes: int) -> None:
    sizes = [piece.numel() for piece in host_pieces(num_bytes, is_pinned=False)]
    assert sum(sizes) == num_bytes
    taken = sum(1 << (size - 1).bit_length() for size in sizes)  # as CachingHostAllocator.h rounds up
    assert taken - num_bytes < 16 * MIB
    assert all(first > second for first, second in pairwise(sizes))


def test_tensors_of_a_pool_waste_little_and_share_no_byte() -> None:
    # Of Qwen2-7B, whose feed-forward matrices are a little more than a power of two, at a sixteenth of its width.
    shapes = [(1184, 224), (1184, 224), (224, 1184), (224, 224), (3,), (0, 4), ()] * 28
    num_bytes = sum(2 * torch.Size(shape).numel() for shape in shapes)
    pool = HostPool(num_bytes, is_pinned=False)
    taken = [pool.take(shape, torch.bfloat16).fill_(number) for number, shape in enumerate(shapes)]
    for number, (tensor, shape) in enumerate(zip(taken, shapes, strict=True)):
        assert tuple(tensor.shape) == shape and tensor.is_contiguous() and not (tensor != number).any()
    pieces = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in taken
        if tensor.numel()
    }
    assert all(size.bit_count() == 1 for size in pieces.values())
    assert sum(pieces.values()) < 2 * num_bytes


def test_a_pool_has_pieces_for_more_than_it_was_made_for() -> None:
    pool = HostPool(1000, is_pinned=False)
    first, second = (pool.take((1024,), torch.float32) for _ in range(2))
    first.fill_(1)
    second.fill_(2)
    assert first.sum() == 1024 and second.sum() == 2048
