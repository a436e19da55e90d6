"""Chunked, split log-probabilities and entropies equal torch's distributions, value and gradient, in less memory."""

import pytest
import torch
from engine.layouts import topology
from ranks import run_ranks
from torch import Tensor

from rto_megatron.models import token_entropy
from rto_megatron.models.token_logprobs import token_logprobs
from rto_megatron.models.weight_map import padded_vocab
from rto_megatron.types import BannedTargets

ROWS, LENGTH = 2, 5
BANNED_IDS = (2, 90)
CASES = [  # (vocabulary, temperature, whether tokens are banned, positions of a chunk)
    (97, 1.0, False, 1024),
    (97, 0.7, True, 4),
    (96, 1.5, True, 3),
    (3, 1.0, False, 4),  # the second shard is padding alone
]


def _inputs(vocab_size: int) -> tuple[Tensor, Tensor, Tensor, BannedTargets]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, LENGTH, vocab_size, generator=generator) * 5
    targets = torch.randint(vocab_size, (ROWS, LENGTH), generator=generator)
    targets[0, 0], targets[0, 1] = vocab_size - 1, 0
    is_banned = torch.tensor([True, True, False, False, True, False, True, True, False, False])
    is_banned &= ~torch.isin(targets.flatten(), torch.tensor(BANNED_IDS))
    weights_2T = torch.randn(2, ROWS * LENGTH, generator=generator)
    return logits, targets, weights_2T, BannedTargets(BANNED_IDS, is_banned)


def _of_rank(layout: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    place = topology(layout)
    found = []
    for vocab_size, temperature, has_ban, chunk in CASES:
        token_entropy._CHUNK = chunk
        logits, targets, weights_2T, banned = _inputs(vocab_size)
        ban = banned if has_ban else None
        columns = padded_vocab(vocab_size, place.tensor_size) // place.tensor_size
        padded = torch.full((ROWS, LENGTH, columns * place.tensor_size), 50.0)
        padded[..., :vocab_size] = logits
        own = padded[..., place.tensor_rank * columns : (place.tensor_rank + 1) * columns].to(dtype)
        own = own.contiguous().requires_grad_()
        outputs_2T = token_entropy.token_entropies(
            own, targets, vocab_size, place.tensor_rank, place.tensor_group(), temperature, ban
        )
        assert outputs_2T.dtype == torch.float32
        (outputs_2T * weights_2T).sum().backward()
        same = token_logprobs(
            own.detach(), targets, vocab_size, place.tensor_rank, place.tensor_group(), ban, temperature
        ).flatten()
        torch.testing.assert_close(outputs_2T[0].detach(), same, atol=2e-6, rtol=1e-6)
        found.append((outputs_2T.detach(), own.grad.flatten(0, 1).float()))
    return found


@pytest.mark.parametrize("layout", ["one", "tp2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_to_torchs_distribution(layout: str, dtype: torch.dtype) -> None:
    ranks = run_ranks(1 if layout == "one" else 2, _of_rank, layout, dtype)
    for case, (vocab_size, temperature, has_ban, _) in enumerate(CASES):
        logits, targets, weights_2T, banned = _inputs(vocab_size)
        logits_TV = logits.to(dtype).double().flatten(0, 1).requires_grad_()
        expected = []
        for at, target in enumerate(targets.flatten().tolist()):  # over what is left of the vocabulary
            is_out = has_ban and bool(banned.is_banned_T[at])
            left = [token for token in range(vocab_size) if not (is_out and token in BANNED_IDS)]
            what = torch.distributions.Categorical(logits=logits_TV[at, left] / temperature)
            expected.append(torch.stack([what.log_prob(torch.tensor(left.index(target))), what.entropy()]))
        expected_2T = torch.stack(expected, 1)
        (expected_2T * weights_2T).sum().backward()
        for found in ranks:
            torch.testing.assert_close(found[case][0].double(), expected_2T.detach(), atol=5e-6, rtol=1e-6)
        gradient = torch.cat([found[case][1] for found in ranks], -1)
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            gradient[:, :vocab_size].double(), logits_TV.grad, atol=tolerance, rtol=tolerance
        )
        assert not gradient[:, vocab_size:].any()


def _large_tensors(chunk: int) -> int:
    """Results of a forward and a backward pass that are as large as the logits."""
    place = topology("one")
    token_entropy._CHUNK = chunk
    logits = torch.randn(1, 512, 4096, requires_grad=True)
    targets = torch.zeros(1, 512, dtype=torch.int64)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() * out.element_size() if isinstance(out, Tensor) else 0)
            return out

    with Sizes():
        token_entropy.token_entropies(
            logits, targets, 4096, place.tensor_rank, place.tensor_group()
        ).sum().backward()
    return sum(size >= logits.numel() * 4 for size in sizes)


def test_no_copy_of_all_positions_is_made_but_the_gradient() -> None:
    (num_chunked,) = run_ranks(1, _large_tensors, 64)
    (num_at_once,) = run_ranks(1, _large_tensors, 512)
    # The logits without their batch, the gradient, and its two views.
    assert num_chunked == 4 < num_at_once
