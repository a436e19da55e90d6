"""Chunked, split log-probabilities and divergences equal a dense loop of the definition, in less memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from algorithms.grids import GOLDEN, grid, ragged_batch, to_positions
from engine.layouts import topology
from models.split_heads import POSITIONS, assert_same_gradients, leaves, make_head, own_rows, peak_bytes
from ranks import run_ranks
from torch import Tensor

from rto_megatron.algorithms.tdpo import TDPO, Config
from rto_megatron.models.logit_shaping import UNSHAPED, LogitShaping
from rto_megatron.models.output_head import OutputProjection, Targets
from rto_megatron.models.token_divergence import token_divergence
from rto_megatron.models.token_logprobs import token_logprobs
from rto_megatron.types import PairMicrobatch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# vocabulary -> what policy and reference do to logits
SHAPINGS = {96: (LogitShaping(softcap=6.0), LogitShaping(divisor=2.0, softcap=9.0))}


def _shapings(vocab_size: int) -> tuple[LogitShaping, LogitShaping]:
    return SHAPINGS.get(vocab_size, (UNSHAPED, UNSHAPED))


def _shaped(logits_NV: Tensor, shaping: LogitShaping) -> Tensor:
    logits_NV = logits_NV / shaping.divisor
    cap = shaping.softcap
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def test_a_small_divergence_of_large_logits_keeps_its_digits() -> None:
    """Normalisers of 1,000 have four digits behind the point in float32, and the divergence begins at the fifth."""
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    logits = torch.tensor([[1000.0], [1000.0], [999.0]]), torch.tensor([[1000.0], [1000 + 2**-6], [999.0]])
    hidden, (policy, reference) = torch.ones(1, 1), (OutputProjection(one, 3, alone) for one in logits)
    found = token_divergence(hidden, policy, (hidden, reference), torch.tensor([0]), chunk=1)
    logp, logp_ref = (one[:, 0].double().log_softmax(0) for one in logits)
    wanted = (logp_ref.exp() * (logp_ref - logp)).sum()
    assert float(found[2, 0]) == pytest.approx(float(wanted), abs=5e-7)


def _of_rank(layout: str, vocab_size: int, dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the gradients of states and projection."""
    place, head = topology(layout), make_head(vocab_size, dtype)
    hidden, weight = head.hidden_Nh.clone().requires_grad_(), own_rows(head.weight_Vh, place)
    weights = (weight, own_rows(head.reference_weight_Vh, place).detach())
    policy, reference = (
        OutputProjection(rows, vocab_size, place.tensor_group(), shaping)
        for rows, shaping in zip(weights, _shapings(vocab_size), strict=True)
    )
    of_reference = (head.reference_hidden_Nh, reference)
    outputs_3N = token_divergence(hidden, policy, of_reference, head.targets_N, chunk)
    assert outputs_3N.dtype == torch.float32
    (outputs_3N * head.weights_3N).sum().backward()
    same_N = token_logprobs(hidden, policy, Targets(head.targets_N), chunk)
    torch.testing.assert_close(outputs_3N[0], same_N, atol=2e-6, rtol=1e-6)
    assert hidden.grad is not None and weight.grad is not None
    return outputs_3N.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(
    ("layout", "vocab_size", "chunk"),
    [("one", 97, 4), ("one", 97, 1), ("one", 97, 64), ("tp2", 97, 4), ("tp2", 96, 10), ("tp2", 3, 4)],
)
@DTYPES
def test_equal_to_the_definition(layout: str, vocab_size: int, chunk: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(1 if layout == "one" else 2, _of_rank, layout, vocab_size, dtype, chunk)
    head = make_head(vocab_size, dtype)
    hidden, weight, logits_NV = leaves(head.hidden_Nh, head.weight_Vh)
    *_, reference_NV = leaves(head.reference_hidden_Nh, head.reference_weight_Vh)
    both = zip((logits_NV, reference_NV.detach()), _shapings(vocab_size), strict=True)
    policy_NV, fixed_NV = (_shaped(z_NV, shaping) for z_NV, shaping in both)
    rows = []
    for z, z_ref, target in zip(policy_NV, fixed_NV, head.targets_N.tolist(), strict=True):
        pi, pi_ref = z.exp() / z.exp().sum(), z_ref.exp() / z_ref.exp().sum()
        kl = sum((pi_ref[j] * (pi_ref[j].log() - pi[j].log()) for j in range(vocab_size)), torch.tensor(0.0))
        rows.append(torch.stack([pi[target].log(), pi_ref[target].log(), kl]))
    outputs_3N = torch.stack(rows, 1)
    (outputs_3N[[0, 2]] * head.weights_3N[[0, 2]]).sum().backward()
    for own_3N, *_ in ranks:
        torch.testing.assert_close(own_3N.double(), outputs_3N.detach(), atol=1e-5, rtol=1e-6)
        assert torch.equal(own_3N, ranks[0][0])
    assert_same_gradients([(h, w) for _, h, w in ranks], hidden, weight, dtype)
    print(f"outputs differ by {(ranks[0][0] - outputs_3N).abs().max():.1e}")


def _of_equal_models(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    place, head = topology("one"), make_head(97, dtype)
    hidden = head.hidden_Nh.clone().requires_grad_()
    model = OutputProjection(head.weight_Vh, 97, place.tensor_group())
    outputs_3N = token_divergence(hidden, model, (hidden.detach(), model), head.targets_N, POSITIONS)
    outputs_3N[2].sum().backward()
    assert hidden.grad is not None
    return outputs_3N.detach(), hidden.grad


@DTYPES
def test_equal_models_have_no_divergence_and_no_gradient(dtype: torch.dtype) -> None:
    ((outputs_3N, gradient),) = run_ranks(1, _of_equal_models, dtype)
    assert torch.equal(outputs_3N[0], outputs_3N[1])
    assert not outputs_3N[2].any()
    assert not gradient.any()


def _golden_loss() -> float:
    """The golden TDPO2 loss from the golden logits; the identity as projection makes hidden states logits."""
    place, inputs = topology("one"), GOLDEN["tdpo_inputs"]
    batch = ragged_batch((5, 5, 5, 5), packed=False)
    labels = torch.tensor(inputs["labels"])[:, 1:].flatten()
    policy_NV, reference_NV = (
        grid(inputs[f"{name}_logits"])[:, :-1].flatten(0, 1).float() for name in ("policy", "reference")
    )
    identity = OutputProjection(torch.eye(5), 5, place.tensor_group())
    outputs_3N = token_divergence(
        policy_NV, identity, (reference_NV, identity), labels.clamp(min=0), 3
    ).double()
    spread = torch.stack([to_positions(row.view(4, 4), batch, 1, 0.0) for row in outputs_3N])
    mask_T = to_positions((labels != -100).double().view(4, 4), batch, 1, 0.0)
    micro = PairMicrobatch(batch, mask_T, grid([0.5, 0.5]), grid([0.0, 0.0]), grid([0.0] * 4))
    return TDPO(Config()).loss(spread, micro).loss.item()


def test_tdpo_from_logits_equals_golden() -> None:
    (loss,) = run_ranks(1, _golden_loss)
    assert loss == pytest.approx(GOLDEN["tdpo2_beta0.1_alpha0.2"]["loss_mean"], abs=1e-7)
    print(f"differs by {loss - GOLDEN['tdpo2_beta0.1_alpha0.2']['loss_mean']:.1e}")


NUM_POSITIONS, COLUMNS, CHUNK, WIDTH = 512, 4096, 32, 8


def _peak(is_chunked: bool, dtype: torch.dtype, trace: Path) -> int:
    """Of `token_divergence`, or of the published code's way: every position at once, derived by autograd."""
    group = topology("one").tensor_group()
    hidden, weight, reference_hidden, reference_weight = (
        torch.randn(size, WIDTH).to(dtype) for size in (NUM_POSITIONS, COLUMNS) * 2
    )
    targets_N = torch.randint(COLUMNS, (NUM_POSITIONS,))
    hidden.requires_grad_(), weight.requires_grad_()

    def plain() -> Tensor:
        logp_Nv = (hidden @ weight.t()).float().log_softmax(-1)
        ref_Nv = (reference_hidden @ reference_weight.t()).float().softmax(-1)
        kl_N = (ref_Nv * (ref_Nv.log() - logp_Nv)).sum(-1)
        return torch.stack([logp_Nv.gather(1, targets_N[:, None])[:, 0], kl_N])

    def chunked() -> Tensor:
        policy, reference = (OutputProjection(rows, COLUMNS, group) for rows in (weight, reference_weight))
        return token_divergence(hidden, policy, (reference_hidden, reference), targets_N, CHUNK)[[0, 2]]

    return peak_bytes(chunked if is_chunked else plain, trace)


@DTYPES
def test_chunks_need_a_fraction_of_the_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    (chunked,) = run_ranks(1, _peak, True, dtype, tmp_path / "chunked.json")
    (plain,) = run_ranks(1, _peak, False, dtype, tmp_path / "plain.json")
    print(f"{plain / 2**20:.1f} MiB plain; {chunked / 2**20:.1f} MiB in chunks")
    assert chunked < 20 * CHUNK * COLUMNS + 2**20
    assert plain > 16 * NUM_POSITIONS * COLUMNS
