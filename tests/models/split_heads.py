"""Output projections that are split over ranks, for tests: what a rank holds, and whole logits to compare with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.models.weight_map import padded_vocab
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import BannedTargets

POSITIONS, HIDDEN = 10, 8
BANNED_IDS = (2, 48, 49, 90)  # the first of the second half of 96 and of 97 among them
PADDING = 50.0  # what a step may leave in rows of padding: large numbers that must not count


@dataclass(frozen=True)
class Head:
    """States, a projection and targets; the reference's states and projection; weights of outputs."""

    hidden_Nh: Tensor
    weight_Vh: Tensor
    reference_hidden_Nh: Tensor
    reference_weight_Vh: Tensor
    targets_N: Tensor
    banned: BannedTargets
    weights_3N: Tensor


def make_head(vocab_size: int, dtype: torch.dtype) -> Head:
    """The same on every rank; logits have a standard deviation of 5."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    spread = 5 / HIDDEN**0.5
    hidden, weight = random(POSITIONS, HIDDEN), random(vocab_size, HIDDEN) * spread
    reference_hidden, reference_weight = random(POSITIONS, HIDDEN), random(vocab_size, HIDDEN)
    targets_N = (random(POSITIONS) * 1000).long().abs() % vocab_size
    targets_N[:2] = torch.tensor([vocab_size - 1, 0])
    is_banned_N = torch.tensor([True, True, False, False, True, False, True, True, False, False])
    is_banned_N &= ~torch.isin(targets_N, torch.tensor(BANNED_IDS))
    assert is_banned_N.sum() >= 3
    matrices = (x.to(dtype) for x in (hidden, weight, reference_hidden, reference_weight))
    return Head(*matrices, targets_N, BannedTargets(BANNED_IDS, is_banned_N), random(3, POSITIONS))


def own_rows(weight_Vh: Tensor, place: Topology) -> Tensor:
    """A tensor rank's rows of the padded projection, a leaf."""
    rows = padded_vocab(len(weight_Vh), place.tensor_size) // place.tensor_size
    padded = torch.full((rows * place.tensor_size, weight_Vh.shape[1]), PADDING, dtype=weight_Vh.dtype)
    padded[: len(weight_Vh)] = weight_Vh
    return padded[place.tensor_rank * rows : (place.tensor_rank + 1) * rows].clone().requires_grad_()


def leaves(hidden_Nh: Tensor, weight_Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float64, to be derived, and their logits as the model's dtype rounds them."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden_Nh, weight_Vh))
    return hidden, weight, (hidden @ weight.t()).to(hidden_Nh.dtype).double()


def assert_same_gradients(
    grads: list[tuple[Tensor, Tensor]], hidden_Nh: Tensor, weight_Vh: Tensor, dtype: torch.dtype
) -> None:
    """Those of ranks, whose parts of the states' add up, against those of whole matrices."""
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    vocab_size = len(weight_Vh)
    whole = torch.cat([of_weight for _, of_weight in grads])
    assert not whole[vocab_size:].any()
    summed = torch.stack([of_hidden.double() for of_hidden, _ in grads]).sum(0)
    for got, want in ((summed, hidden_Nh.grad), (whole[:vocab_size].double(), weight_Vh.grad)):
        assert want is not None
        assert float((got - want).norm() / want.norm()) < tolerance


def peak_bytes(run: Callable[[], Tensor], trace: Path) -> int:
    """Most bytes that the CPU allocator holds during forward and backward beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run().sum().backward()
    profile.export_chrome_trace(str(trace))
    held = peak = 0
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
