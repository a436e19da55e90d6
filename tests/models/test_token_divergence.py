"""Chunked, split log-probabilities and divergences equal a dense loop of the definition, in less memory."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from algorithms.grids import GOLDEN, grid, ragged_batch, to_positions
from engine.layouts import topology
from ranks import run_ranks
from torch import Tensor

from rto_megatron.algorithms.tdpo import TDPO, Config
from rto_megatron.models.token_divergence import token_divergence
from rto_megatron.models.token_logprobs import token_logprobs
from rto_megatron.models.weight_map import padded_vocab
from rto_megatron.types import PairMicrobatch

ROWS, LENGTH, HIDDEN = 2, 5, 8
POSITIONS = ROWS * LENGTH
PADDING = 50.0  # what a step may leave in padding columns: large numbers that must not count
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def _inputs(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [b, s, V], hidden [T, h], weight [V, h], targets [b, s], and weights of the outputs [3, T]."""
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator)
    logits, hidden, weight = (
        random(ROWS, LENGTH, vocab_size) * 5,
        random(POSITIONS, HIDDEN),
        random(vocab_size, HIDDEN),
    )
    targets = torch.randint(vocab_size, (ROWS, LENGTH), generator=generator)
    targets[0, 0], targets[0, 1] = vocab_size - 1, 0
    return logits.to(dtype), hidden.to(dtype), weight.to(dtype), targets, random(3, POSITIONS)


def _by_definition(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs [3, T] and the gradient of their weighted sum, in float64, one position and one token at a time."""
    logits, hidden, weight, targets, weights_3T = _inputs(vocab_size, dtype)
    reference_TV = (hidden @ weight.t()).double()
    logits_TV = logits.flatten(0, 1).double().requires_grad_()
    rows = []
    for z, z_ref, target in zip(logits_TV, reference_TV, targets.flatten().tolist(), strict=True):
        pi, pi_ref = z.exp() / z.exp().sum(), z_ref.exp() / z_ref.exp().sum()
        kl = sum((pi_ref[j] * (pi_ref[j].log() - pi[j].log()) for j in range(vocab_size)), torch.tensor(0.0))
        rows.append(torch.stack([pi[target].log(), pi_ref[target].log(), kl]))
    outputs_3T = torch.stack(rows, 1)
    (outputs_3T[[0, 2]] * weights_3T[[0, 2]]).sum().backward()
    return outputs_3T.detach(), logits_TV.grad


def _of_rank(layout: str, vocab_size: int, dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor]:
    place = topology(layout)
    logits, hidden, weight, targets, weights_3T = _inputs(vocab_size, dtype)
    columns = padded_vocab(vocab_size, place.tensor_size) // place.tensor_size
    padded = torch.full((ROWS, LENGTH, columns * place.tensor_size), PADDING, dtype=dtype)
    padded[..., :vocab_size] = logits
    padded_weight = torch.full((columns * place.tensor_size, HIDDEN), PADDING, dtype=dtype)
    padded_weight[:vocab_size] = weight
    mine = slice(place.tensor_rank * columns, (place.tensor_rank + 1) * columns)
    own = padded[..., mine].contiguous().requires_grad_()
    outputs_3T = token_divergence(
        own, hidden, padded_weight[mine], targets, vocab_size, place.tensor_rank, place.tensor_group(), chunk
    )
    assert outputs_3T.dtype == torch.float32
    (outputs_3T * weights_3T).sum().backward()
    torch.testing.assert_close(own.detach(), padded[..., mine], atol=0, rtol=0)
    same = token_logprobs(
        own.detach(), targets, vocab_size, place.tensor_rank, place.tensor_group()
    ).flatten()
    torch.testing.assert_close(outputs_3T[0].detach(), same, atol=2e-6, rtol=1e-6)
    return outputs_3T.detach(), own.grad.flatten(0, 1)


@pytest.mark.parametrize(
    ("layout", "vocab_size", "chunk"),
    [("one", 97, 4), ("one", 97, 1), ("one", 97, 64), ("tp2", 97, 4), ("tp2", 96, 10), ("tp2", 3, 4)],
)
@DTYPES
def test_equal_to_the_definition(layout: str, vocab_size: int, chunk: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(1 if layout == "one" else 2, _of_rank, layout, vocab_size, dtype, chunk)
    outputs_3T, grad_TV = _by_definition(vocab_size, dtype)
    for own_3T, _ in ranks:
        torch.testing.assert_close(own_3T.double(), outputs_3T, atol=1e-5, rtol=1e-6)
        assert torch.equal(own_3T, ranks[0][0])
    gradient = torch.cat([grad for _, grad in ranks], -1)
    assert gradient.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    own_TV = gradient[:, :vocab_size].double()
    torch.testing.assert_close(own_TV, grad_TV, atol=tolerance, rtol=tolerance)
    assert not gradient[:, vocab_size:].any()
    print(
        f"outputs differ by {(ranks[0][0] - outputs_3T).abs().max():.1e},",
        f"gradients by {(own_TV - grad_TV).abs().max():.1e}",
    )


def test_two_ranks_equal_one() -> None:
    (one_3T, one_TV), *_ = run_ranks(1, _of_rank, "one", 97, torch.float32, 4)
    halves = run_ranks(2, _of_rank, "tp2", 97, torch.float32, 3)
    torch.testing.assert_close(halves[0][0], one_3T, atol=2e-6, rtol=1e-6)
    both_TV = torch.cat([grad for _, grad in halves], -1)
    torch.testing.assert_close(both_TV[:, :97], one_TV[:, :97], atol=1e-6, rtol=1e-6)


def _of_equal_models(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    place = topology("one")
    _, hidden, weight, targets, _ = _inputs(97, dtype)
    logits = (hidden @ weight.t()).view(ROWS, LENGTH, -1).requires_grad_()
    outputs_3T = token_divergence(
        logits, hidden, weight, targets, 97, 0, place.tensor_group(), chunk=POSITIONS
    )
    outputs_3T[2].sum().backward()
    return outputs_3T.detach(), logits.grad


@DTYPES
def test_equal_models_have_no_divergence_and_no_gradient(dtype: torch.dtype) -> None:
    ((outputs_3T, gradient),) = run_ranks(1, _of_equal_models, dtype)
    assert torch.equal(outputs_3T[0], outputs_3T[1])
    assert not outputs_3T[2].any()
    assert not gradient.any()


def _golden_loss() -> float:
    """The golden TDPO2 loss from the golden logits; the identity as projection makes hidden states logits."""
    place, inputs = topology("one"), GOLDEN["tdpo_inputs"]
    batch = ragged_batch((5, 5, 5, 5), packed=False)
    labels = torch.tensor(inputs["labels"])[:, 1:].flatten()
    shape = (4, 4, -1)
    logits_TV, reference_TV = (
        grid(inputs[f"{name}_logits"])[:, :-1].flatten(0, 1).float() for name in ("policy", "reference")
    )
    outputs_3T = token_divergence(
        logits_TV.view(shape),
        reference_TV,
        torch.eye(5),
        labels.clamp(min=0).view(4, 4),
        5,
        0,
        place.tensor_group(),
        3,
    ).double()
    spread = torch.stack([to_positions(row.view(4, 4), batch, 1, 0.0) for row in outputs_3T])
    mask_T = to_positions((labels != -100).double().view(4, 4), batch, 1, 0.0)
    micro = PairMicrobatch(batch, mask_T, grid([0.5, 0.5]), grid([0.0, 0.0]), grid([0.0] * 4))
    return TDPO(Config()).loss(spread, micro).loss.item()


def test_tdpo_from_logits_equals_golden() -> None:
    (loss,) = run_ranks(1, _golden_loss)
    assert loss == pytest.approx(GOLDEN["tdpo2_beta0.1_alpha0.2"]["loss_mean"], abs=1e-7)
    print(f"differs by {loss - GOLDEN['tdpo2_beta0.1_alpha0.2']['loss_mean']:.1e}")


def _plain(logits_Tv: Tensor, hidden_Th: Tensor, weight_vh: Tensor, targets_T: Tensor) -> Tensor:
    """The published code's way: every position at once, float32, derived by autograd."""
    logp_Tv = logits_Tv.float().log_softmax(-1)
    ref_Tv = (hidden_Th @ weight_vh.t()).float().softmax(-1)
    logp_ref_Tv = ref_Tv.log()
    kl_T = (ref_Tv * (logp_ref_Tv - logp_Tv)).sum(-1)
    rows = [x_Tv.gather(1, targets_T[:, None])[:, 0] for x_Tv in (logp_Tv, logp_ref_Tv)]
    return torch.stack([*rows, kl_T])


def _peak_bytes(is_chunked: bool, dtype: torch.dtype, trace: Path) -> int:
    """Most bytes that the CPU allocator holds during forward and backward beyond what it held before."""
    num_tokens, columns, chunk = 512, 4096, 32
    group = topology("one").tensor_group()
    logits_Tv = torch.randn(num_tokens, columns).to(dtype).requires_grad_()
    hidden_Th, weight_vh = torch.randn(num_tokens, HIDDEN).to(dtype), torch.randn(columns, HIDDEN).to(dtype)
    targets_T = torch.randint(columns, (num_tokens,))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        if is_chunked:
            outputs_3T = token_divergence(
                logits_Tv[None], hidden_Th, weight_vh, targets_T[None], columns, 0, group, chunk
            )
        else:
            outputs_3T = _plain(logits_Tv, hidden_Th, weight_vh, targets_T)
        outputs_3T[[0, 2]].sum().backward()
    profile.export_chrome_trace(str(trace))
    held = peak = 0
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("dtype", "num_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["fp32", "bf16"]
)
def test_chunks_need_a_fraction_of_the_memory(dtype: torch.dtype, num_bytes: int, tmp_path: Path) -> None:
    (chunked,) = run_ranks(1, _peak_bytes, True, dtype, tmp_path / "chunked.json")
    (plain,) = run_ranks(1, _peak_bytes, False, dtype, tmp_path / "plain.json")
    one_gradient, one_chunk = num_bytes * 512 * 4096, 32 * 4096
    print(
        f"{plain / 2**20:.1f} MiB plain = {plain / 512 / 4096:.1f} T v; {chunked / 2**20:.1f} MiB in chunks =",
        f"{num_bytes} T v + {(chunked - one_gradient) / one_chunk:.1f} C v",
    )
    assert one_gradient < chunked < one_gradient + 11 * one_chunk
    assert chunked < plain / 2
