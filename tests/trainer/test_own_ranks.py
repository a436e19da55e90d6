"""Models on ranks of their own work at the same time, give the numbers of one rank, and what one finds stops all."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
from engine.test_layout_parity import PromptEngine
from models.test_mixtral import write_mixtral
from ranks import run_ranks
from torch import Tensor
from trainer.test_options import exported
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.engine.megatron import FrozenModel, TrainedModel
from rto_megatron.engine.readings import OUTPUTS, Reading
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.guard import Guard, LossChange, Update
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.parts import Parts
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import LossOutput, TokenBatch

_LIMIT_S = 60.0


def _meet(folder: Path, what: str, own: str, others: Sequence[str]) -> None:
    """Waits until the other models came to the same place."""
    (folder / f"{own}.{what}").touch()
    end = time.monotonic() + _LIMIT_S
    while missing := [one for one in others if not (folder / f"{one}.{what}").exists()]:
        assert time.monotonic() < end, f"{missing} wait for the {own}"
        time.sleep(0.01)


class MeetingGuard(Guard):
    """A loss of one model is given only when the other model's was asked for."""

    def loss_change(self, update: Update) -> LossChange:
        """See `Guard.loss_change`."""
        change, folder = super().loss_change(update), self._run.dir
        own, other = ("policy", "critic") if update.is_paced else ("critic", "policy")

        def meet[M](loss: Callable[[Tensor, M], LossOutput]) -> Callable[[Tensor, M], LossOutput]:
            def met(outputs: Tensor, micro: M) -> LossOutput:
                _meet(folder, "asked", own, [other])
                return loss(outputs, micro)

            return change(met)

        return meet


_SCORING = ("policy", "critic", "reward")


class _Meeting:
    """A forward that scores is made only when those of the other models were begun."""

    folder: Path

    def begin_outputs(
        self, batches: Sequence[TokenBatch], reading: Reading[TokenBatch] = OUTPUTS
    ) -> Callable[[], list[Tensor]]:
        """See `FrozenModel.begin_outputs`."""
        _meet(self.folder, "begun", self.name, [one for one in _SCORING if one != self.name])
        return super().begin_outputs(batches, reading)


class MeetingTrained(_Meeting, TrainedModel):
    """See `_Meeting`."""


class MeetingFrozen(_Meeting, FrozenModel):
    """See `_Meeting`."""


class MeetingScorer(Scorer):
    """See `_Meeting`."""

    def __init__(self, config: ReinforcementStage, setup: Setup, roles: Roles) -> None:
        _Meeting.folder = config.run.dir
        (term,) = roles.reward.terms
        judge = replace(term.source, model=_meeting(term.source.model))
        reward = replace(roles.reward, terms=(replace(term, source=judge),))
        policy, critic = _meeting(roles.policy), _meeting(roles.critic)
        super().__init__(config, setup, replace(roles, policy=policy, critic=critic, reward=reward))


def _meeting(model: object) -> object:
    kinds = {TrainedModel: MeetingTrained, FrozenModel: MeetingFrozen}
    if type(model) not in kinds:
        return model
    return kinds[type(model)](**{field.name: getattr(model, field.name) for field in fields(model)})


def _train(config: ReinforcementStage, parts: Parts | None = None) -> None:
    place = join(config)
    engine = PromptEngine(ENGINE_VOCAB) if place.is_replica_lead else None
    train_online(config, place, ConnectedPool(engine, HeldPush(engine)), parts)


SGD = {"kind": "sgd", "lr": 0.05, "schedule": "constant", "warmup_fraction": 0.0}


def _config(stage: str, files: Path, run_dir: Path, layout: str, **keys: object) -> ReinforcementStage:
    """A step with an evaluation of an odd number of held-out prompts."""
    held_out = {"data__eval": str(files / "prompts.jsonl"), "data__eval_samples": 5, "run__eval_every": 1}
    steps = {"run__steps": 1, "run__save_every": None, "evaluate__num_samples": 2}
    sgd = {"optimizer": SGD, "critic_optimizer": SGD}
    config = configure(stage, files, run_dir, layout, **sgd, **steps, **held_out, **keys)
    assert isinstance(config, ReinforcementStage)
    return config


def _assert_as_on_one_rank(run_dir: Path, alone: Path) -> dict[str, float]:
    got, want = (
        {name: value for name, value in entry.items() if not name.startswith(("time", "memory/"))}
        for (entry,) in map(read_metrics, (run_dir, alone))
    )
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    first, second = exported(alone / "hf"), exported(run_dir / "hf")
    for name, weight in first.items():
        assert float((weight - second[name]).abs().max() / weight.abs().max()) < 1e-6, name
    rows = (folder / "evaluations/step_000001.jsonl" for folder in (run_dir, alone))
    assert len({len(path.read_text().splitlines()) for path in rows} | {10}) == 1
    return got


def test_no_model_waits_for_the_forward_or_the_gradients_of_another(files: Path, tmp_path: Path) -> None:
    own = {"critic": {"ranks": "1"}, "reward": {"ranks": "2"}}
    run_ranks(1, _train, _config("ppo", files, tmp_path / "one", "one"))
    config = _config("ppo", files, tmp_path / "own", "one", parallel__roles=own)
    run_ranks(3, _train, config, Parts(scorer=MeetingScorer, guard=MeetingGuard))
    metrics = _assert_as_on_one_rank(tmp_path / "own", tmp_path / "one")
    assert metrics["critic/grad_norm"] > 0 and metrics["policy/grad_norm"] > 0
    assert metrics["update/skipped_fraction"] == 0 and metrics["eval/score"] != 0
    assert len(list((tmp_path / "own").glob("*.begun"))) == 3


def test_experts_in_parallel_beside_models_of_other_ranks(files: Path, tmp_path: Path) -> None:
    write_mixtral(tmp_path / "mixtral")
    shutil.copytree(files / "tokenizer", tmp_path / "mixtral", dirs_exist_ok=True)
    keys = {f"models__{role}": tmp_path / "mixtral" for role in ("policy", "reference")}
    keys |= {"models__moe_aux_loss_coef": 0.01, "batch__micro": 1}  # a balance is of a micro-batch
    own = {"critic": {"ranks": "2"}, "reward": {"ranks": "2"}}
    for name, layout, ranks, roles in (("one", "one", 1, {}), ("own", "ep2_of_3", 3, own)):
        config = _config("ppo", files, tmp_path / name, layout, parallel__roles=roles, **keys)
        run_ranks(ranks, _train, config)
    metrics = _assert_as_on_one_rank(tmp_path / "own", tmp_path / "one")
    assert 1.0 <= metrics["loss/policy_moe_aux"] < 4.0
