"""The exchangeable parts of the loops: what the configuration asks for, or what a caller puts in its place."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.batches import Batches
from rto_megatron.platform import faults
from rto_megatron.trainer.ahead import AheadSampler
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.guard import Guard
from rto_megatron.trainer.planted import PlantedEngine, PlantedGuard, PlantedSampler, PlantedScorer
from rto_megatron.trainer.reward_source import RewardSource
from rto_megatron.trainer.sampler import OnPolicySampler, Sampler
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Prompt

type MakeSampler = Callable[[ReinforcementStage, Setup, Batches[Prompt], ConnectedPool], Sampler]


def configured_sampler(
    config: ReinforcementStage, setup: Setup, prompts: Batches[Prompt], pool: ConnectedPool
) -> Sampler:
    """The sampler that the configuration asks for."""
    kind = AheadSampler if config.rollout.ahead else OnPolicySampler
    return kind(config, setup, prompts, pool)


@dataclass(frozen=True)
class Parts:
    """What the online loop is made of.

    Args:
        algorithm: None: the one that the configuration names; experiments vary it.
        reward: None: the reward model that the configuration names.

    Example:
        Parts(reward=reward, guard=PlantedGuard)
    """

    algorithm: PolicyOptimization | None = None
    reward: RewardSource | None = None
    sampler: MakeSampler = configured_sampler
    scorer: type[Scorer] = Scorer
    guard: type[Guard] = Guard


def planned_parts() -> Parts:
    """The parts of every run; those of a run with a fault plan (RTO_FAULT) fail where it says."""
    if not faults.are_planned():
        return Parts()
    return Parts(sampler=_planted_sampler, scorer=PlantedScorer, guard=PlantedGuard)


def _planted_sampler(
    config: ReinforcementStage, setup: Setup, prompts: Batches[Prompt], pool: ConnectedPool
) -> Sampler:
    engine = None if pool.engine is None else PlantedEngine(pool.engine)
    return PlantedSampler(configured_sampler(config, setup, prompts, replace(pool, engine=engine)))
