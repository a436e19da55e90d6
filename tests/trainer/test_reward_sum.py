"""All sources of rewards together: added by weight, alike on every rank of every layout, and failing together."""

from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS, topology
from ranks import run_ranks
from torch import Tensor

from rto_megatron.data.sample_reader import SampleReader
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.rewards.function_reward import Called, FunctionRater
from rto_megatron.rewards.given import Pays
from rto_megatron.trainer.reward_source import OutsideReward, OverlongReward, RewardSource
from rto_megatron.trainer.reward_sum import RewardSum, Term
from rto_megatron.types import Rewards

FUNCTIONS = Path(__file__).parents[1] / "rewards/functions.py"
ROLLOUTS = rollouts(8)
LENGTHS = torch.tensor([float(len(r.response_ids)) for r in ROLLOUTS])
LONGEST = int(LENGTHS.max())


def _outside(name: str, files: Path, place: Topology, pays: Pays = "response") -> RewardSource:
    columns = {
        (r.prompt_id, r.prompt_ids): {"value": -2.0 * row, "context_messages": "x"}
        for row, r in enumerate(ROLLOUTS)
    }
    reader = SampleReader(load_tokenizer(files / "tokenizer"), columns)
    called = Called(f"rewards.{name}", f"{FUNCTIONS}:{name}", pays, 30.0)
    return OutsideReward(lambda: FunctionRater(called), reader, place, pays != "response")


def _overlong(place: Topology) -> OverlongReward:
    return OverlongReward(LONGEST, LONGEST - 1, place.device.torch_device)


def _terms(files: Path, place: Topology) -> tuple[Term, ...]:
    return (
        Term("length", _outside("length", files, place), 0.5, "batch"),
        Term("column", _outside("column", files, place), -0.25, "group", clip=0.5),
        Term("long", _overlong(place), 3.0),
        Term("short", _outside("length", files, place), 0.3, "group", clip=0.6, overlong=_overlong(place)),
        Term("first", _outside("first_token", files, place, "tokens"), 2.0, overlong=_overlong(place)),
        Term("grouped", _outside("remainders", files, place, "tokens"), 0.7, "group"),
        Term("batched", _outside("remainders", files, place, "tokens"), 0.2, "batch", clip=0.8),
        Term("halves", _outside("halves", files, place, "spans"), 1.0, clip=1.5),
    )


def _rated(layout: str, files: Path) -> tuple[int, Rewards]:
    place = topology(layout)
    half = len(ROLLOUTS) // place.data_size
    own = ROLLOUTS[place.data_rank * half : (place.data_rank + 1) * half]
    return place.data_rank, RewardSum(_terms(files, place), 2, place).rate(own)


def _rated_alone(files: Path) -> Tensor:
    place = topology("one")
    return RewardSum(_terms(files, place), 2, place).unnormalized().rate(ROLLOUTS[:3]).score_B


def test_what_is_held_out_is_not_normalised(files: Path) -> None:
    """Three responses are no pairs, and no batch of a step."""
    (found_B,) = run_ranks(1, _rated_alone, files)
    column = torch.tensor([0.0, -0.5, -0.5])  # 0, -2 and -4, clipped
    punished = (1 - LENGTHS[:3]) / (LONGEST - 1)
    wanted_B = 0.5 * LENGTHS[:3] - 0.25 * column + 3.0 * punished
    wanted_B += 0.3 * (LENGTHS[:3] + punished).clamp(max=0.6)
    torch.testing.assert_close(found_B, wanted_B)


def _scores_by_hand() -> Tensor:
    scores = []
    for row, length in enumerate(LENGTHS):
        batch = (length - LENGTHS.mean()) / (LENGTHS.std() + 1e-4)
        pair = torch.tensor([-2.0 * (row - row % 2), -2.0 * (row - row % 2 + 1)])
        group = ((pair[row % 2] - pair.mean()) / (pair.std() + 1e-4)).clamp(-0.5, 0.5)
        long = (1 - length) / (LONGEST - 1)
        # Punished, then normalised, then clipped.
        two = [LENGTHS[row - row % 2 + i] + (1 - LENGTHS[row - row % 2 + i]) / (LONGEST - 1) for i in (0, 1)]
        short = (two[row % 2] - torch.stack(two).mean()) / (torch.stack(two).std() + 1e-4)
        scores.append(0.5 * batch - 0.25 * group + 3.0 * long + 0.3 * short.clamp(-0.6, 0.6))
    return torch.stack(scores)


def _normalized(value: float, among: list[int]) -> float:
    """A token's remainder, normalised among those of some responses."""
    others = torch.tensor([float(token % 5) for row in among for token in ROLLOUTS[row].response_ids])
    return float((value - others.mean()) / (others.std() + 1e-4))


def _tokens_by_hand() -> Tensor:
    grid = torch.zeros(len(ROLLOUTS), LONGEST)
    for row, rollout in enumerate(ROLLOUTS):
        pair, everyone = [row - row % 2, row - row % 2 + 1], list(range(len(ROLLOUTS)))
        for place, token in enumerate(rollout.response_ids):
            grid[row, place] += 0.7 * _normalized(token % 5, pair)
            grid[row, place] += 0.2 * max(-0.8, min(0.8, _normalized(token % 5, everyone)))
    for row, rollout in enumerate(ROLLOUTS):
        count = len(rollout.response_ids)
        grid[row, 0] += 2.0
        grid[row, count - 1] += 2.0 * (1 - count) / (LONGEST - 1)
        if count // 2:
            grid[row, count // 2 - 1] += 1.0
        grid[row, count - 1] += 1.5  # 2, clipped
    return grid


def test_sources_are_added_by_weight_and_alike_on_every_layout(files: Path) -> None:
    scores_B, tokens_BR = _scores_by_hand(), _tokens_by_hand()
    for layout in ("one", "tp2", "pp2", "dp2"):
        found = run_ranks(LAYOUTS[layout][0], _rated, layout, files)
        size = len(ROLLOUTS) // (2 if layout == "dp2" else 1)
        for data_rank, rewards in found:
            rows = slice(data_rank * size, (data_rank + 1) * size)
            torch.testing.assert_close(rewards.score_B, scores_B[rows], rtol=1e-6, atol=1e-6)
            assert rewards.source_BR is not None
            width = rewards.source_BR.shape[1]
            torch.testing.assert_close(rewards.source_BR, tokens_BR[rows, :width], rtol=1e-5, atol=1e-6)
            assert not tokens_BR[rows, width:].any()
            assert rewards.given["length"].tolist() == LENGTHS[rows].tolist()
            assert rewards.given["halves"].tolist() == [3.0 if n > 1 else 2.0 for n in LENGTHS[rows]]
            paid = [rewards.paid[name] for name in ("length", "column", "long", "short")]
            torch.testing.assert_close(sum(paid), rewards.score_B)


def _fails(layout: str, files: Path) -> str:
    place = topology(layout)
    source = _outside("picky", files, place)
    try:
        source.scores(ROLLOUTS[place.data_rank :: place.data_size])  # p2 is of the first replica
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_a_function_that_fails_for_one_replica_ends_all_ranks_with_one_message(
    layout: str, files: Path
) -> None:
    messages = run_ranks(2, _fails, layout, files)
    assert len(set(messages)) == 1
    assert "rewards.picky" in messages[0] and "failed on 1 sample: p2; nothing is trained on" in messages[0]
