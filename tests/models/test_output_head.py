"""Log-probs and entropies from states, in chunks, over a split vocabulary: torch's distributions, in less memory."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine.layouts import topology
from models.split_heads import BANNED_IDS, assert_same_gradients, leaves, make_head, own_rows, peak_bytes
from ranks import run_ranks
from torch import Tensor

from rto_megatron.models.head_memory import CHUNK_POSITIONS, head_bytes
from rto_megatron.models.logit_shaping import LogitShaping
from rto_megatron.models.output_head import OutputProjection, Shard, Targets
from rto_megatron.models.token_entropy import token_entropies
from rto_megatron.models.token_logprobs import token_logprobs

CASES = [  # (vocabulary, temperature, whether tokens are banned, positions of a chunk, what is done to logits)
    (97, 1.0, False, 1024, LogitShaping()),
    (97, 0.7, True, 4, LogitShaping(divisor=2.0, softcap=6.0)),
    (96, 1.5, True, 3, LogitShaping()),
    (97, 1.0, True, 1, LogitShaping(divisor=3.0)),
    (3, 1.0, False, 4, LogitShaping(softcap=6.0)),  # the second shard is padding alone
]
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)  # a group of one rank
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def _of_rank(layout: str, dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Of every case, for log-probs and for entropies: outputs, and the gradients of states and projection."""
    place, found = topology(layout), []
    for vocab_size, temperature, has_ban, chunk, shaping in CASES:
        head, both = make_head(vocab_size, dtype), []
        asked = Targets(head.targets_N, head.banned if has_ban else None, temperature)
        for read in (token_logprobs, token_entropies):
            hidden, weight = head.hidden_Nh.clone().requires_grad_(), own_rows(head.weight_Vh, place)
            projection = OutputProjection(weight, vocab_size, place.tensor_group(), shaping)
            outputs = read(hidden, projection, asked, chunk)
            assert outputs.dtype == torch.float32
            (outputs * head.weights_3N[: outputs.dim()]).sum().backward()
            assert hidden.grad is not None and weight.grad is not None
            both.append((outputs.detach(), hidden.grad, weight.grad))
        torch.testing.assert_close(both[0][0], both[1][0][0], atol=2e-6, rtol=1e-6)
        found.append(both)
    return found


@pytest.mark.parametrize("layout", ["one", "tp2"])
@DTYPES
def test_equal_to_torchs_distribution(layout: str, dtype: torch.dtype) -> None:
    ranks = run_ranks(1 if layout == "one" else 2, _of_rank, layout, dtype)
    for case, (vocab_size, temperature, has_ban, _, shaping) in enumerate(CASES):
        head = make_head(vocab_size, dtype)
        for number, num_rows in enumerate((1, 2)):
            hidden, weight, logits_NV = leaves(head.hidden_Nh, head.weight_Vh)
            logits_NV = logits_NV / shaping.divisor
            if shaping.softcap is not None:
                logits_NV = shaping.softcap * torch.tanh(logits_NV / shaping.softcap)
            expected = []
            for at, target in enumerate(head.targets_N.tolist()):  # over what is left of the vocabulary
                is_out = has_ban and bool(head.banned.is_banned_T[at])
                left = [token for token in range(vocab_size) if not (is_out and token in BANNED_IDS)]
                what = torch.distributions.Categorical(logits=logits_NV[at, left] / temperature)
                logp = what.log_prob(torch.tensor(left.index(target)))
                expected.append(torch.stack([logp, what.entropy()][:num_rows]))
            expected_kN = torch.stack(expected, 1)
            (expected_kN * head.weights_3N[:num_rows]).sum().backward()
            found = [rank[case][number] for rank in ranks]
            for outputs, *_ in found:
                got = outputs.view(num_rows, -1).double()
                torch.testing.assert_close(got, expected_kN.detach(), atol=5e-6, rtol=1e-6)
                assert torch.equal(outputs, found[0][0])
            assert_same_gradients([(h, w) for _, h, w in found], hidden, weight, dtype)


def _without_positions() -> tuple[Tensor, Tensor]:
    place, head = topology("tp2"), make_head(97, torch.float32)
    hidden, weight = head.hidden_Nh[:0].requires_grad_(), own_rows(head.weight_Vh, place)
    asked = Targets(head.targets_N[:0])
    outputs_2N = token_entropies(hidden, OutputProjection(weight, 97, place.tensor_group()), asked, 4)
    outputs_2N.sum().backward()
    assert weight.grad is not None
    return outputs_2N.detach(), weight.grad


def test_nothing_asked_for_gives_nothing_and_a_gradient_of_zeros() -> None:
    for outputs_2N, grad in run_ranks(2, _without_positions):
        assert outputs_2N.shape == (2, 0)
        assert not grad.any()


def test_chunks_are_added_up_without_rounding_in_between() -> None:
    """Forty positions add 1/2 each to the 500 of the first one, of which bfloat16 keeps nothing one by one."""
    hidden = torch.ones(41, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    asked = Targets(torch.zeros(41, dtype=torch.int64))
    logp_N = token_logprobs(hidden, OutputProjection(weight, 2, ALONE), asked, chunk=1)
    (1000 * logp_N[0] + logp_N[1:].sum()).backward()
    assert weight.grad is not None and weight.grad[:, 0].tolist() == [520, -520]


def test_every_row_of_a_large_vocabulary_has_its_gradient() -> None:
    """At equal logits each of two positions takes 1 / 9000 from the rows of all tokens but the target."""
    weight = torch.zeros(9000, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden, asked = torch.ones(2, 1, dtype=torch.bfloat16), Targets(torch.zeros(2, dtype=torch.int64))
    token_logprobs(hidden, OutputProjection(weight, 9000, ALONE), asked, chunk=1).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[1:].float(), torch.full((8999, 1), -2 / 9000), atol=0, rtol=2**-8)


def test_a_shard_whose_tokens_are_all_banned_has_a_finite_maximum() -> None:
    assert Shard(0, 2, ALONE).largest(torch.full((1, 2), -math.inf)).isfinite().all()


NUM_POSITIONS, COLUMNS, WIDTH = 4 * CHUNK_POSITIONS, 1024, 64


def _peak(is_plain: bool, dtype: torch.dtype, trace: Path) -> int:
    group = topology("one").tensor_group()
    hidden = torch.randn(NUM_POSITIONS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(COLUMNS, WIDTH).to(dtype).requires_grad_()
    targets_N = torch.randint(COLUMNS, (NUM_POSITIONS,))

    def plain() -> Tensor:
        logp = (hidden @ weight.t()).float().log_softmax(-1)
        return torch.stack([logp.gather(1, targets_N[:, None])[:, 0], -(logp.exp() * logp).sum(-1)])

    def chunked() -> Tensor:
        projection = OutputProjection(weight, COLUMNS, group)
        return token_entropies(hidden, projection, Targets(targets_N), CHUNK_POSITIONS)

    return peak_bytes(plain if is_plain else chunked, trace)


@DTYPES
def test_memory_is_what_is_planned_for(dtype: torch.dtype, tmp_path: Path) -> None:
    (chunked,) = run_ranks(1, _peak, False, dtype, tmp_path / "chunked.json")
    (plain,) = run_ranks(1, _peak, True, dtype, tmp_path / "plain.json")
    planned = head_bytes(NUM_POSITIONS, WIDTH, COLUMNS, dtype.itemsize)
    print(f"{plain / 2**20:.1f} MiB plain, {chunked / 2**20:.1f} in chunks, {planned / 2**20:.1f} planned")
    assert 0.7 * planned < chunked < planned
    assert chunked < plain / 3
