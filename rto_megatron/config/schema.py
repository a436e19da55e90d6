"""The configuration of a run: a frozen pydantic tree that refuses unknown keys. Defaults: the paper (App. D).

A recipe is a YAML file with these keys; `config.load` reads it, applies dotted overrides and reports all
errors at once. A stage has the keys that it reads and no others: sections that differ by stage are classes
of their own.
Off is `null`, never a magic number; 0 means zero.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from rto_megatron.algorithms import ALGORITHMS, reinforcement
from rto_megatron.algorithms.method import Method, OnlineMethod
from rto_megatron.config.addresses import without_localhost
from rto_megatron.config.template_arguments import TemplateArguments


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RunConfig(Section):
    """Where the run lives."""

    dir: Path = Field(description="run folder: configuration, checkpoints, metrics and exports go here")
    seed: int = 42
    collective_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="how long a rank waits for another before the run counts as hung; null: half an hour, or twice "
        "rollout.request_timeout_s if that is longer",
    )


class TrainRunConfig(RunConfig):
    """How long a training stage lasts and what it leaves."""

    steps: int | None = Field(
        default=None,
        ge=1,
        description="optimizer steps, or rollout steps where the policy samples; null: one epoch",
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; null: only at the end"
    )
    keep_checkpoints: int = Field(default=2, ge=1)
    max_skipped_updates: int = Field(
        default=3,
        ge=1,
        description="optimizer updates in a row refused for poisoned numbers that end the run",
    )
    async_save: bool = Field(
        default=False,
        description="write checkpoints beside the next step, from a copy in host memory; false: wait for the disk",
    )
    resume_from_older: bool = Field(
        default=False,
        description="where the newest checkpoint is damaged or gone, go on from the last valid one; false: stop",
    )


class OfflineRunConfig(TrainRunConfig):
    """Offline stages evaluate on held-out data."""

    eval_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations on eval data; null: only at the end"
    )


class RolloutRunConfig(TrainRunConfig):
    """Stages that sample show what they sample."""

    samples_every: int | None = Field(
        default=None, ge=1, description="steps between tables of sample completions; null: none"
    )


class ParallelConfig(Section):
    """Layout of every role; data parallel size is world / (tensor x pipeline)."""

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    sequence: bool = Field(default=False, description="Megatron sequence parallelism over the tensor ranks")


class TrainParallelConfig(ParallelConfig):
    """The layout of optimizers too."""

    distributed_optimizer: bool = Field(
        default=False, description="shard optimizer state over data-parallel ranks"
    )


class FrozenPrecisionConfig(Section):
    """How forwards compute; log-softmax is always fp32."""

    dtype: Literal["fp32", "bf16"] = "bf16"


class PrecisionConfig(FrozenPrecisionConfig):
    """bf16 keeps fp32 master weights and accumulates gradients in fp32."""

    recompute: bool = Field(
        default=False, description="recompute activations of every layer in the backward pass"
    )


class ModelsConfig(Section):
    """A Hugging Face folder, or a run folder or checkpoint of an earlier stage, per role."""

    policy: Path
    reference: Path | None = Field(default=None, description="null: the policy's starting point")
    critic: Path | None = Field(default=None, description="null: starts from the reward model")
    reward: Path | None = None
    dpo: Path | None = None
    dpo_reference: Path | None = Field(
        default=None, description="what the DPO model was trained against; null: the reference"
    )
    allow_unverified_reference: bool = Field(
        default=False,
        description="accept a DPO model that does not say which reference it was trained against, as released ones",
    )
    moe_aux_loss_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of the load-balancing loss of trained mixture-of-experts models (OpenRLHF: aux_loss_coef)",
    )
    random_init: bool = Field(
        default=False,
        description="SFT only: `policy` holds config.json and a tokenizer; weights come from run.seed",
    )


class DataConfig(Section):
    """Data are local .jsonl, .jsonl.gz or .parquet files, or a hub data set as `owner/name:split`."""

    max_prompt_tokens: int = Field(default=1024, ge=1)
    overlong: Literal["error", "drop", "truncate_left"] = Field(
        default="drop", description="what happens to a prompt over the limit; drops are counted and logged"
    )
    bad_rows: Literal["error", "drop"] = Field(
        default="error",
        description="error: rows that cannot be used end the run, and all are named; drop: it goes on without them, "
        "counted and logged",
    )
    template: TemplateArguments = Field(
        default={},
        description="arguments that the tokenizer's chat template reads, as for apply_chat_template "
        "(enable_thinking: false)",
    )


class ExampleDataConfig(DataConfig):
    """Prompts with answers."""

    train: str = Field(min_length=1)
    eval: str | None = Field(default=None, min_length=1)
    eval_samples: int | None = Field(default=None, ge=1, description="rows of `eval` to use; null: all")
    max_length: int = Field(default=2048, ge=2, description="prompt and answer, in tokens")
    open_thought: Literal["error", "keep"] = Field(
        default="error",
        description="what happens to an answer that does not close the thought that the generation prompt opens",
    )
    allow_non_prefix: bool = Field(
        default=False,
        description="take chat templates that render a prompt otherwise than the beginning of its conversation: the "
        "rendered prompt and the bare answer are joined",
    )


class PromptDataConfig(DataConfig):
    """Prompts that the policy answers."""

    train: str = Field(min_length=1)
    pretrain: str | None = Field(
        default=None,
        min_length=1,
        description="texts for a language-model loss beside the policy's (`algorithm.ptx_coef`); null: none",
    )
    true_reward: Path | None = Field(
        default=None, description="the synthetic task's table: logs the true return of what was sampled"
    )


class EvaluateDataConfig(DataConfig):
    """Prompts that no stage trains on."""

    eval: str = Field(min_length=1, description="held-out prompts")
    eval_samples: int | None = Field(default=None, ge=1, description="rows of `eval` to use; null: all")


class BatchConfig(Section):
    """Batch arithmetic; all counts are sequences (pairs for reward model and DPO)."""

    micro: int = Field(default=1, ge=1, description="sequences or pairs per forward on one rank")
    packed: bool = Field(
        default=True, description="pack a micro-batch without padding; false: right-padded rows"
    )


class TrainBatchConfig(BatchConfig):
    """The batches of a stage with an optimizer."""

    train: int = Field(default=128, ge=1, description="global batch of one optimizer step")


class PreferenceBatchConfig(TrainBatchConfig):
    """The paper's preference methods have a batch of their own."""

    train: int = Field(default=256, ge=1, description="global batch of one optimizer step: pairs, or answers")


class RolloutBatchConfig(TrainBatchConfig):
    """The batches of a stage that samples."""

    rollout: int = Field(default=1024, ge=1, description="prompts per rollout step, all ranks")


class OptimizerConfig(Section):
    """Adam with linear warm-up and a cosine to a floor (rto.md 1.11)."""

    kind: Literal["adam", "sgd"] = "adam"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="null: no clipping")
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)


class SamplingConfig(Section):
    """Training rollouts are drawn at temperature 1, top-p 1: anything else would bias the ratio of PPO."""

    max_response_tokens: int = Field(default=1024, ge=1)
    min_response_tokens: int = Field(
        default=1, ge=0, description="end-of-sequence is forbidden before this many tokens"
    )


class RolloutConfig(Section):
    """How the trainer reaches the inference pool."""

    servers: tuple[Annotated[str, AfterValidator(without_localhost)], ...] = Field(
        default=(), description="addresses of the pool's servers; the launcher fills them in"
    )
    token_file: Path | None = Field(
        default=None, description="file with the pool's bearer token; the launcher fills it in"
    )
    request_timeout_s: float = Field(
        default=600, gt=0, description="limit of one generation request, queueing in the server included"
    )
    retries: int = Field(
        default=3, ge=0, description="how often a request is sent again that failed on a live server"
    )
    probe_interval_s: float = Field(
        default=30, gt=0, description="a server that answered nothing for so long must generate a token"
    )
    probe_timeout_s: float = Field(
        default=15, gt=0, description="limit of that token, after which the server is taken out"
    )
    colocated: bool = Field(
        default=False,
        description="the pool lives on the trainer's GPUs and sleeps while the trainer trains; false: on its own",
    )
    gpu_memory_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of a GPU's memory for a pool that the launcher starts, its activations included; null: "
        "vLLM's default, which leaves room for nothing else",
    )
    sync_timeout_s: float = Field(default=300, gt=0, description="limit of each phase of a weight push")
    bucket_mb: int = Field(default=256, ge=1, description="size of a weight-transfer bucket")
    logprob_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="nats; largest canary difference after a push; null: 1e-3 in fp32, 0.5 in bf16",
    )


class TrainRolloutConfig(RolloutConfig):
    """The pool of a stage that trains on what it samples."""

    logprob_gap_alarm: float | None = Field(
        default=0.05,
        gt=0,
        description="nats; a mean difference between the log-probs of pool and trainer above it is warned of at every "
        "step. The default is for bf16, 5 times its usual gap; null: no alarm",
    )


class EvaluateConfig(Section):
    """The stage `evaluate`: sample held-out prompts, score them and measure the distance to the reference."""

    name: str = Field(description="row of the final table")
    true_reward: Path | None = Field(
        default=None, description="the synthetic task's table, to measure the true return"
    )
    num_samples: int = Field(default=1, ge=1, description="responses per prompt")


class StageConfig(Section):
    """What every stage has."""

    stage: str
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: FrozenPrecisionConfig = FrozenPrecisionConfig()
    models: ModelsConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()


class TrainStage(StageConfig):
    """What every stage with an optimizer has."""

    run: TrainRunConfig
    parallel: TrainParallelConfig = TrainParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    batch: TrainBatchConfig = TrainBatchConfig()
    optimizer: OptimizerConfig


class OfflineStage(TrainStage):
    """Trains on a fixed data set."""

    run: OfflineRunConfig
    data: ExampleDataConfig
    algorithm: BaseModel


class RewardModelStage(OfflineStage):
    """Trains a scalar head."""


class PreferenceStage(OfflineStage):
    """DPO and its kin."""

    batch: PreferenceBatchConfig = PreferenceBatchConfig()


class ReinforcementStage(TrainStage):
    """Trains on what the policy samples."""

    run: RolloutRunConfig
    data: PromptDataConfig
    batch: RolloutBatchConfig = RolloutBatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: TrainRolloutConfig = TrainRolloutConfig()
    algorithm: reinforcement.Config

    @property
    def responses_per_step(self) -> int:
        """Responses of one rollout step, all ranks."""
        return self.batch.rollout * self.algorithm.samples_per_prompt


class ActorCriticStage(ReinforcementStage):
    """With a critic beside the policy."""

    critic_optimizer: OptimizerConfig


class EvaluateStage(StageConfig):
    """Measures a policy on prompts that no stage trains on."""

    stage: Literal["evaluate"]
    data: EvaluateDataConfig
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    evaluate: EvaluateConfig


def _kind(method: Method) -> type[TrainStage]:
    if isinstance(method, OnlineMethod):
        return ActorCriticStage if method.has_critic else ReinforcementStage
    if method.outputs == "values":
        return RewardModelStage
    return OfflineStage if method.examples == "demonstrations" else PreferenceStage


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
