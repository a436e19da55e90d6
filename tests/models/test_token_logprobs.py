"""Log-probabilities over a split, padded vocabulary equal torch's log-softmax, value and gradient."""

import pytest
import torch
from engine.layouts import topology
from ranks import run_ranks
from torch import Tensor

from rto_megatron.models.token_logprobs import token_logprobs
from rto_megatron.models.weight_map import padded_vocab
from rto_megatron.types import BannedTargets

ROWS, LENGTH = 2, 5


def _inputs(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, LENGTH, vocab_size, generator=generator) * 5
    targets = torch.randint(vocab_size, (ROWS, LENGTH), generator=generator)
    targets[0, 0], targets[0, 1] = vocab_size - 1, 0
    return logits, targets, torch.randn(ROWS, LENGTH, generator=generator)


def _of_rank(
    layout: str, vocab_size: int, dtype: torch.dtype, banned: BannedTargets | None = None
) -> tuple[Tensor, Tensor]:
    place = topology(layout)
    logits, targets, weights = _inputs(vocab_size)
    columns = padded_vocab(vocab_size, place.tensor_size) // place.tensor_size
    # Padding columns hold what a step may leave there: large numbers that must not count.
    padded = torch.full((ROWS, LENGTH, columns * place.tensor_size), 50.0)
    padded[..., :vocab_size] = logits
    own = padded[..., place.tensor_rank * columns : (place.tensor_rank + 1) * columns].to(dtype)
    own.requires_grad_()
    logprobs = token_logprobs(own, targets, vocab_size, place.tensor_rank, place.tensor_group(), banned)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), own.grad.float()


@pytest.mark.parametrize(("layout", "vocab_size"), [("one", 97), ("tp2", 97), ("tp2", 96), ("tp2", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_to_log_softmax(layout: str, vocab_size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(1 if layout == "one" else 2, _of_rank, layout, vocab_size, dtype)
    logits, targets, weights = _inputs(vocab_size)
    logits = logits.to(dtype).float().requires_grad_()
    want = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (want * weights).sum().backward()
    for logprobs, _ in ranks:
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, want.detach(), atol=2e-6, rtol=1e-6)
    gradient = torch.cat([grad for _, grad in ranks], -1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient[..., :vocab_size], logits.grad, atol=tolerance, rtol=tolerance)
    assert not gradient[..., vocab_size:].any()


@pytest.mark.parametrize(
    ("layout", "ids"), [("one", (2, 95)), ("tp2", (2, 95)), ("tp2", (2,)), ("tp2", (95, 96))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_banned_tokens_get_no_probability_and_no_gradient(
    layout: str, ids: tuple[int, ...], dtype: torch.dtype
) -> None:
    vocab_size = 97
    logits, targets, weights = _inputs(vocab_size)
    is_banned = torch.tensor([[True, True, False, False, True], [False, True, True, False, False]])
    is_banned &= ~torch.isin(targets, torch.tensor(ids))
    assert is_banned.sum() >= 3
    banned = BannedTargets(ids, is_banned.flatten())
    ranks = run_ranks(1 if layout == "one" else 2, _of_rank, layout, vocab_size, dtype, banned)
    logits = logits.to(dtype).float().requires_grad_()
    want = torch.zeros(ROWS, LENGTH)
    for row in range(ROWS):  # the definition: log-softmax over what is left of the vocabulary
        for at in range(LENGTH):
            left = [token for token in range(vocab_size) if not (is_banned[row, at] and token in ids)]
            place = left.index(int(targets[row, at]))
            want[row, at] = logits[row, at, left].log_softmax(-1)[place]
    (want * weights).sum().backward()
    for logprobs, _ in ranks:
        torch.testing.assert_close(logprobs, want.detach(), atol=2e-6, rtol=1e-6)
    gradient = torch.cat([grad for _, grad in ranks], -1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient[..., :vocab_size], logits.grad, atol=tolerance, rtol=tolerance)
    assert not gradient[..., list(ids)][is_banned].any()
