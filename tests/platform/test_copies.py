"""Host memory that is pinned, of which torch takes the next power of two."""

from itertools import pairwise

import pytest

from rto_megatron.platform.copies import host_pieces

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
