"""The digest against a slow loop of its definition, and the accidents it must notice."""

import pytest
import torch

from rto_megatron.weight_sync.manifest import digest

GOLDEN = 0x9E3779B97F4A7C15


def random_bytes(num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_equals_the_loop_of_its_definition() -> None:
    raw = random_bytes(8 * 40)
    total = 0
    for index, word in enumerate(raw.view(torch.int64).tolist()):
        chunk, within = divmod(index, 16)
        total += word * (((within + 1) * GOLDEN) | 1) * (2 * chunk + 1)
    expected = total % 2**64
    assert digest(raw, words_per_chunk=16) == (expected - 2**64 if expected >= 2**63 else expected)


def test_one_flipped_bit_is_noticed_anywhere() -> None:
    raw = random_bytes(4096)
    before = digest(raw)
    for byte in (0, 7, 8, 2000, 4095):
        for bit in (1, 128):
            raw[byte] ^= bit
            assert digest(raw) != before
            raw[byte] ^= bit
    assert digest(raw) == before


def test_exchanged_words_are_noticed() -> None:
    raw = random_bytes(4096)
    before = digest(raw)
    words = raw.view(torch.int64)
    words[[3, 9]] = words[[9, 3]]
    assert digest(raw) != before


def test_exchanged_chunks_are_noticed() -> None:
    raw = random_bytes(1024)
    before = digest(raw, words_per_chunk=64)
    assert digest(torch.cat([raw[512:], raw[:512]]), words_per_chunk=64) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_number() -> None:
    raw = random_bytes(24 << 20)
    assert digest(raw.cuda()) == digest(raw)
