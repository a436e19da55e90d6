"""The step of each kind of stage, in the order of `trainer/online.py` and `trainer/offline.py`."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.config import schema
from rto_megatron.config.rewards import ModelSource
from rto_megatron.engine.absent import RoleModel
from rto_megatron.engine.build_roles import update_average
from rto_megatron.engine.megatron import Microbatch
from rto_megatron.simulation.rank_steps import SimulatedStep
from rto_megatron.trainer.guard import ModelUpdate
from rto_megatron.trainer.offline import Task, Trainee, build_trainee, with_task
from rto_megatron.trainer.online import build_roles, due_updates
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.reward_source import ModelReward, RewardSource
from rto_megatron.trainer.scoring import score
from rto_megatron.trainer.update import optimizer_minibatches
from rto_megatron.types import Example, Experience, Rollout


def simulate_step(step: SimulatedStep) -> None:
    """Builds the models of a stage and takes a step."""
    facts = step.plan.facts
    if facts.online is not None:
        _online(step, facts.online)
    elif facts.offline is not None:
        _offline(step, facts.offline)


class _SilentReward:
    """What pays in the place of functions and services: nothing of theirs is on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        return torch.zeros(len(rollouts), device=self._device)


def _online(step: SimulatedStep, config: schema.ReinforcementStage) -> None:
    setup, made = step.setup, step.made
    algorithm = _algorithm(config)
    with step.phase("sample", "build"):
        roles = _roles(step, config)
        step.hold(_models(roles))
    rollouts = made.rollouts()
    step.neighbours_send(made.per_reading)
    with step.phase("score"):
        scored = score(
            rollouts, roles, setup.layout, setup.eos, config.algorithm.truncated, config.sampling,
            old=config.rollout.old_logprobs,
        )  # fmt: skip
        experience = algorithm.credit(scored, algorithm.kl_controller.coef, setup.topology.dp_sum)
        del scored
    step.neighbours_send(made.per_microbatch)
    _update(step, config, roles, algorithm, experience)


def _update(
    step: SimulatedStep,
    config: schema.ReinforcementStage,
    roles: Roles,
    algorithm: PolicyOptimization,
    experience: Experience,
) -> None:
    setup = step.setup
    with step.machine:
        minibatches = optimizer_minibatches(
            experience, config.algorithm, config.sampling.max_response_tokens, 1, setup.topology, setup.layout,
            config.run.seed, None, None if roles.critic is None else roles.critic.topology,
        )  # fmt: skip
        one = next(iter(minibatches))
    updates, _ = due_updates(config, roles, algorithm, one, ([], []), True, (0, 1))
    step.take(updates)
    if roles.average is not None and config.algorithm.ema_beta is not None:
        with step.phase("update", "average"):
            update_average(roles.average, roles.policy, config.algorithm.ema_beta)


def _algorithm(config: schema.ReinforcementStage) -> PolicyOptimization:
    method = ALGORITHMS[config.stage]
    assert isinstance(method, OnlineMethod)
    return method.build(config.algorithm, lambda strings: frozenset({0}))


def _roles(step: SimulatedStep, config: schema.ReinforcementStage) -> Roles:
    """With the reward model alone, where there is one: other sources have nothing on the device."""
    has_model = not config.rewards or any(isinstance(one, ModelSource) for one in config.rewards)
    silent: RewardSource = _SilentReward(step.setup.topology.device.torch_device)
    alone = config.model_copy(update={"rewards": (), "offload": ()})
    return build_roles(alone, step.setup, reward=None if has_model else silent)


def _models(roles: Roles) -> dict[str, RoleModel | None]:
    found: dict[str, RoleModel | None] = {
        "policy": roles.policy,
        "policy_ema": roles.average,
        "critic": roles.critic,
        "reference": roles.reference,
        "dpo": roles.dpo,
        "dpo_reference": roles.dpo_reference,
    }
    rewards = [one.source.model for one in roles.reward.terms if isinstance(one.source, ModelReward)]
    return {**found, "reward": rewards[0] if rewards else None}


def _offline(step: SimulatedStep, config: schema.OfflineStage) -> None:
    with step.phase("sample", "build"):
        trainee = build_trainee(config.model_copy(update={"offload": ()}), step.setup)
        step.hold({trainee.role: trainee.model, "reference": trainee.reference})
    with_task(config, step.setup, trainee, _Taken(step, trainee))


class _Taken:
    """Takes a step on made examples, whatever a stage's task is."""

    def __init__(self, step: SimulatedStep, trainee: Trainee) -> None:
        self._step = step
        self._trainee = trainee

    def __call__[E: Example, M: Microbatch](self, task: Task[E, M]) -> None:
        step, made = self._step, self._step.made
        method = ALGORITHMS[step.plan.config.stage]
        assert not isinstance(method, OnlineMethod)
        kinds = {"demonstrations": made.demonstrations, "pairs": made.pairs, "judgements": made.judged}
        examples = cast(Sequence[E], kinds[method.examples]())
        step.neighbours_send(made.per_reading)
        with step.phase("score"):
            microbatches = task.microbatches(examples, task.size(examples))
        sequences = made.per_microbatch * (2 if made.is_pair else 1)
        step.neighbours_send(sequences)
        names = [[examples[number].id for number in group] for group in task.groups(examples)]
        step.take([ModelUpdate(self._trainee.model, microbatches, task.loss, names, 1e-6, task.reading)])
