"""What a reward source and a sampler must do, asked of those that are there and of a second one of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from ranks import run_ranks
from torch import Tensor
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.batches import Batches
from rto_megatron.engine.build_roles import build_frozen
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.ahead import AheadSampler
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.parts import MakeSampler, planned_parts
from rto_megatron.trainer.reward_source import ModelReward, RewardSource
from rto_megatron.trainer.sampler import OnPolicySampler, load_batches
from rto_megatron.trainer.setup import Setup, prepare_stage
from rto_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class LengthReward:
    """A rule: one for every token of the response."""

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See `RewardSource.scores`."""
        return torch.tensor([float(len(rollout.response_ids)) for rollout in rollouts])


class PickySampler(OnPolicySampler):
    """Asks for the prompts of two steps and trains on those of the longer responses."""

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`."""
        return longer_half([*super().draw(step), *super().draw(step)])


def longer_half(drawn: Sequence[Rollout]) -> tuple[Rollout, ...]:
    """Those with the longer responses, in their order."""
    chosen = sorted(range(len(drawn)), key=lambda place: -len(drawn[place].response_ids))
    return tuple(drawn[place] for place in sorted(chosen[: len(drawn) // 2]))


def _setup(config: ReinforcementStage) -> tuple[Setup, Batches[Prompt], ConnectedPool]:
    place = join(config)
    setup = prepare_stage(config, place)
    engine = ScriptedEngine(ENGINE_VOCAB) if place.is_replica_lead else None
    return setup, load_batches(config, setup), ConnectedPool(engine, HeldPush(engine))


def _scores(config: ReinforcementStage, is_model: bool) -> dict[str, list[float]]:
    setup, prompts, pool = _setup(config)
    source: RewardSource = LengthReward()
    if is_model:
        model = build_frozen("reward", setup.sources["reward"], True, config.precision, setup.topology)
        source = ModelReward(model, setup.layout, setup.eos, config.algorithm.truncated)
    sampler = OnPolicySampler(config, setup, prompts, pool)
    sampler.push(0)
    rollouts = sampler.draw(0)
    whole, backwards = source.scores(rollouts), source.scores(rollouts[::-1])
    assert whole.dtype == torch.float32 and whole.shape == (len(rollouts),)
    torch.testing.assert_close(whole, backwards.flip(0), atol=1e-5, rtol=0)  # each response by itself
    assert torch.isfinite(whole).all()
    return {rollout.prompt_id: [score] for rollout, score in zip(rollouts, whole.tolist(), strict=True)}


@pytest.mark.parametrize("is_model", [True, False])
def test_a_reward_source_scores_each_response_by_itself_on_every_layout(
    is_model: bool, files: Path, tmp_path: Path
) -> None:
    (alone,) = run_ranks(1, _scores, configure("ppo", files, tmp_path / "one"), is_model)
    assert len(alone) == 8
    for layout in ("tp2", "pp2"):
        for found in run_ranks(2, _scores, configure("ppo", files, tmp_path / layout, layout), is_model):
            assert found.keys() == alone.keys()
            assert all(found[name] == pytest.approx(alone[name], abs=1e-5) for name in alone)


class PickyAhead:
    """Chooses among what is drawn ahead; everything else is what `AheadSampler` does."""

    def __init__(
        self, config: ReinforcementStage, setup: Setup, prompts: Batches[Prompt], pool: ConnectedPool
    ) -> None:
        inner = AheadSampler(config, setup, prompts, pool)
        self._draw = inner.draw
        self.begin, self.state, self.ahead = inner.begin, inner.state, inner.ahead
        self.restore, self.close = inner.restore, inner.close

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`; three batches where two are ahead, so that a step takes more than there is."""
        first, *others = (self._draw(step) for _ in range(3))
        return longer_half([*first, *max(others, key=lambda drawn: len(drawn[0].response_ids))])


def _draws(config: ReinforcementStage, sampler: MakeSampler) -> list[list[str]]:
    setup, prompts, pool = _setup(config)
    first = sampler(config, setup, prompts, pool)
    drawn: list[list[Rollout]] = []
    state, ahead = first.state(), first.ahead()
    for step in range(4):
        first.begin(step)
        drawn.append(list(first.draw(step)))
        if step == 1:
            state, ahead = first.state(), first.ahead()
    again = sampler(config, setup, load_batches(config, setup), pool)
    # The lead writes them into a checkpoint, and every rank reads them there.
    again.restore(state, tuple(setup.topology.lead_value(list(ahead()), list[Rollout])))
    for step in (2, 3):
        again.begin(step)
        assert list(again.draw(step)) == drawn[step]
    again.close()
    for step, rollouts in enumerate(drawn):
        ages = {step - rollout.weight_version for rollout in rollouts}
        assert ages <= set(range(config.rollout.ahead + 1))
        assert ages == {0} or config.rollout.ahead
    return [[f"{rollout.prompt_id} {rollout.response_ids}" for rollout in rollouts] for rollouts in drawn]


@pytest.mark.parametrize(
    ("sampler", "ahead"),
    [(OnPolicySampler, 0), (PickySampler, 0), (AheadSampler, 1), (AheadSampler, 2), (PickyAhead, 2)],
)
@pytest.mark.parametrize("layout", ["one", "tp2", "dp2"])
def test_a_sampler_gives_every_replica_its_share_and_goes_on_from_its_state(
    sampler: MakeSampler, ahead: int, layout: str, files: Path, tmp_path: Path
) -> None:
    keys = {"rollout__ahead": ahead, "algorithm__pool_importance_cap": 2.0} if ahead else {}
    config = configure("ppo", files, tmp_path / "run", layout, **keys)
    found = run_ranks(LAYOUTS[layout][0], _draws, config, sampler)
    for step in range(4):
        shares = {tuple(ranks[step]) for ranks in found}
        assert len(shares) == (2 if layout == "dp2" else 1)
        assert sum(map(len, shares)) == config.responses_per_step


def _train(config: ReinforcementStage) -> None:
    place = join(config)
    engine = ScriptedEngine(ENGINE_VOCAB) if place.is_replica_lead else None
    parts = replace(planned_parts(), reward=LengthReward(), sampler=PickySampler)
    train_online(config, place, ConnectedPool(engine, HeldPush(engine)), parts)


def test_a_run_trains_on_the_scores_and_rollouts_of_the_parts_that_it_is_given(
    files: Path, tmp_path: Path
) -> None:
    config = configure("rto", files, tmp_path / "run", run__steps=2, run__save_every=None)
    run_ranks(1, _train, config)
    for entry in read_metrics(tmp_path / "run"):
        assert entry["objective/scores"] == pytest.approx(entry["rollout/response_tokens"])
        assert entry["rollout/response_tokens"] > 6.0
