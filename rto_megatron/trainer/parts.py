"""The exchangeable parts of the loops: what the configuration asks for, or what a caller puts in its place."""

from collections.abc import Callable
from dataclasses import dataclass

from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.batches import Batches
from rto_megatron.platform import faults
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.guard import Guard
from rto_megatron.trainer.planted import PlantedGuard, PlantedSampler, PlantedScorer
from rto_megatron.trainer.reward_source import RewardSource
from rto_megatron.trainer.sampler import OnPolicySampler, Sampler
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Prompt

type MakeSampler = Callable[[ReinforcementStage, Setup, Batches[Prompt], ConnectedPool], Sampler]


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
    sampler: MakeSampler = OnPolicySampler
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
    return PlantedSampler(OnPolicySampler(config, setup, prompts, pool))
