"""A stage by what it has: which sections, an inference pool, training; asked of the configuration once, here."""

from dataclasses import dataclass

from rto_megatron.algorithms import ALGORITHMS, reward_model
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.algorithms.reinforcement import KlRewardConfig
from rto_megatron.config.rollouts import RolloutConfig
from rto_megatron.config.schema import (
    ActorCriticStage,
    EvaluateStage,
    OfflineStage,
    ReinforcementStage,
    RewardModelStage,
    Stage,
    TrainStage,
)
from rto_megatron.config.training import OptimizerConfig


@dataclass(frozen=True)
class Facts:
    """One configuration, seen as each kind of stage that it is; None where it is no such stage.

    Example:
        if (pool := facts_of(config).pool) is not None: print(pool.servers)
    """

    training: TrainStage | None
    offline: OfflineStage | None
    online: ReinforcementStage | None
    evaluation: EvaluateStage | None
    reads_pairs: bool  # a batch counts pairs, two sequences each

    @property
    def sampling(self) -> ReinforcementStage | EvaluateStage | None:
        """A stage that samples from an inference pool."""
        return self.online or self.evaluation

    @property
    def pool(self) -> RolloutConfig | None:
        """The section of the inference pool."""
        return None if self.sampling is None else self.sampling.rollout

    @property
    def is_colocated(self) -> bool:
        """Whether the pool lives on the trainer's GPUs."""
        return self.pool is not None and self.pool.colocated

    @property
    def critic_optimizer(self) -> OptimizerConfig | None:
        """None where no critic is trained."""
        return self.online.critic_optimizer if isinstance(self.online, ActorCriticStage) else None

    @property
    def is_reward_model(self) -> bool:
        """Whether a reward model is trained: from a language model, with a head of its own."""
        return isinstance(self.offline, RewardModelStage)

    @property
    def reads_margins(self) -> bool:
        """Whether the method takes the pairs' margins into its loss; only a reward model's does."""
        algorithm = None if self.offline is None else self.offline.algorithm
        return isinstance(algorithm, reward_model.Config) and algorithm.margin

    @property
    def kl_reward(self) -> KlRewardConfig | None:
        """The algorithm's keys where it pays a KL penalty as a reward."""
        algorithm = None if self.online is None else self.online.algorithm
        return algorithm if isinstance(algorithm, KlRewardConfig) else None

    @property
    def longest_sequence(self) -> tuple[int, str]:
        """Tokens of the longest sequence, and the keys that say so."""
        if self.offline is not None:
            return self.offline.data.max_length, "data.max_length"
        assert self.sampling is not None
        data, sampling = self.sampling.data, self.sampling.sampling
        keys = "data.max_prompt_tokens + sampling.max_response_tokens"
        return data.max_prompt_tokens + sampling.max_response_tokens, keys

    def optimizer_of(self, role: str) -> OptimizerConfig | None:
        """None where nothing is trained."""
        if role == "critic" and self.critic_optimizer is not None:
            return self.critic_optimizer
        return None if self.training is None else self.training.optimizer


def facts_of(config: Stage) -> Facts:
    """The one place that asks of what kind a configuration is."""
    method = ALGORITHMS.get(config.stage)
    return Facts(
        training=config if isinstance(config, TrainStage) else None,
        offline=config if isinstance(config, OfflineStage) else None,
        online=config if isinstance(config, ReinforcementStage) else None,
        evaluation=config if isinstance(config, EvaluateStage) else None,
        reads_pairs=isinstance(method, OfflineMethod) and method.examples == "pairs",
    )
