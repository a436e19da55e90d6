"""The configuration of a run: a frozen pydantic tree that refuses unknown keys. Defaults: the paper (App. D).

A recipe is a YAML file with these keys; `config.load` reads it, applies dotted overrides and reports all
errors at once. A stage has the keys that it reads and no others: sections that differ by stage are classes
of their own.
Off is `null`, never a magic number; 0 means zero.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from rto_megatron.algorithms import ALGORITHMS, reinforcement
from rto_megatron.algorithms.method import Method, OnlineMethod
from rto_megatron.config.batch_sizes import (
    BatchConfig,
    PreferenceBatchConfig,
    RolloutBatchConfig,
    TrainBatchConfig,
)
from rto_megatron.config.inputs import (
    DataConfig,
    DemonstrationDataConfig,
    EvaluateDataConfig,
    ExampleDataConfig,
    ModelsConfig,
    PromptDataConfig,
)
from rto_megatron.config.rewards import Source
from rto_megatron.config.rollouts import (
    EvaluateConfig,
    HeldOutConfig,
    RolloutConfig,
    SamplingConfig,
    TrainRolloutConfig,
)
from rto_megatron.config.training import (
    EvaluatedRunConfig,
    FrozenPrecisionConfig,
    OptimizerConfig,
    ParallelConfig,
    Parkable,
    PrecisionConfig,
    RolloutRunConfig,
    RunConfig,
    TrainParallelConfig,
    TrainRunConfig,
)
from rto_megatron.section import Section


class StageConfig(Section):
    """What every stage has.

    Example:
        {stage: evaluate, run: {dir: runs/eval}, models: {policy: runs/rto}}
    """

    stage: str
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: FrozenPrecisionConfig = FrozenPrecisionConfig()
    models: ModelsConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()


class TrainStage(StageConfig):
    """What every stage with an optimizer has.

    Example:
        {stage: sft, run: {dir: runs/sft, steps: 100}, optimizer: {lr: 1.0e-5}}
    """

    run: TrainRunConfig
    parallel: TrainParallelConfig = TrainParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    batch: TrainBatchConfig = TrainBatchConfig()
    optimizer: OptimizerConfig
    offload: tuple[Parkable, ...] = Field(
        default=(), description="what waits in host memory while a phase of a step does without it"
    )


class OfflineStage(TrainStage):
    """Trains on a fixed data set.

    Example:
        {stage: dpo, data: {train: pairs.jsonl}, algorithm: {beta: 0.1}}
    """

    run: EvaluatedRunConfig
    data: ExampleDataConfig
    algorithm: Section


class SupervisedStage(OfflineStage):
    """Learns from demonstrations.

    Example:
        {stage: sft, data: {train: chat.jsonl, loss_on: all}}
    """

    data: DemonstrationDataConfig


class RewardModelStage(OfflineStage):
    """Trains a scalar head.

    Example:
        {stage: reward_model, data: {train: pairs.jsonl, eval: held_out.jsonl}}
    """


class PreferenceStage(OfflineStage):
    """DPO and its kin.

    Example:
        {stage: dpo, batch: {train: 64}, algorithm: {beta: 0.1}}
    """

    batch: PreferenceBatchConfig = PreferenceBatchConfig()


type Rewards = Annotated[
    tuple[Source, ...],
    Field(description="what pays the responses, a list; empty: the reward model of `models.reward` alone"),
]


class ReinforcementStage(TrainStage):
    """Trains on what the policy samples.

    Example:
        {stage: grpo, sampling: {max_response_tokens: 512}, algorithm: {samples_per_prompt: 8}}
    """

    run: RolloutRunConfig
    data: PromptDataConfig
    batch: RolloutBatchConfig = RolloutBatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: TrainRolloutConfig = TrainRolloutConfig()
    rewards: Rewards = ()
    evaluate: HeldOutConfig = HeldOutConfig()
    algorithm: reinforcement.Config

    @property
    def responses_per_step(self) -> int:
        """Responses of one rollout step, all ranks."""
        return self.batch.rollout * self.algorithm.samples_per_prompt


class ActorCriticStage(ReinforcementStage):
    """With a critic beside the policy.

    Example:
        {stage: rto, optimizer: {lr: 5.0e-7}, critic_optimizer: {lr: 9.0e-6}}
    """

    critic_optimizer: OptimizerConfig


class EvaluateStage(StageConfig):
    """Measures a policy on prompts that no stage trains on.

    Example:
        {stage: evaluate, data: {eval: prompts.jsonl}, evaluate: {name: rto}}
    """

    stage: Literal["evaluate"]
    data: EvaluateDataConfig
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: Rewards = ()
    evaluate: EvaluateConfig


type Rewarded = ReinforcementStage | EvaluateStage  # what `rewards` are read by


def _kind(method: Method) -> type[TrainStage]:
    if isinstance(method, OnlineMethod):
        return ActorCriticStage if method.has_critic else ReinforcementStage
    if method.outputs == "values":
        return RewardModelStage
    return SupervisedStage if method.examples == "demonstrations" else PreferenceStage


def _stage(name: str, method: Method) -> type[StageConfig]:
    """The configuration of one registered algorithm: its kind's sections and its own keys."""
    kind = _kind(method)
    own: dict[str, Any] = {"stage": (Literal[name], ...), "algorithm": (method.config, method.config())}
    return create_model(f"{name}_stage", __base__=kind, __doc__=kind.__doc__, **own)


Stage = StageConfig
STAGES: dict[str, type[StageConfig]] = {
    **{name: _stage(name, method) for name, method in ALGORITHMS.items()},
    "evaluate": EvaluateStage,
}
