"""Sections of a recipe about the training itself: the run, its layout, precision, batches and optimizers."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from rto_megatron.section import Section

LoggerName = Literal["tensorboard", "wandb", "swanlab"]
ContextScheme = Literal["ulysses", "gather"]
KernelsChoice = Literal["torch", "transformer_engine", "auto"]
Fp32Part = Literal["head", "residual"]
StageLayers = tuple[int, ...] | Literal["auto"] | None  # layers of each pipeline stage; None: equal numbers
RoleName = Literal["critic", "reference", "reward", "dpo", "dpo_reference"]
# Roles, and what trained ones have beside weights.
Parkable = Literal[
    "policy", "critic", "policy_ema", "reference", "reward", "dpo", "dpo_reference", "gradients", "optimizer"
]


FP8_MULTIPLE = 16  # rows and columns of a product in 8 bits, on each rank


class RunConfig(Section):
    """Where the run lives.

    Example:
        run: {dir: runs/eval, seed: 7}
    """

    dir: Path = Field(description="run folder: configuration, checkpoints, metrics and exports go here")
    # torch's generators hold 64 bits, and numbers of steps are added.
    seed: int = Field(default=42, ge=-(2**62), le=2**62)
    collective_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="how long a rank waits for another before the run counts as hung; null: half an hour, or twice "
        "rollout.request_timeout_s or what rewards may take, if that is longer",
    )


class TrainRunConfig(RunConfig):
    """How long a training stage lasts and what it leaves.

    Example:
        run: {dir: runs/sft, steps: 200, save_every: 50}
    """

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
    loggers: tuple[LoggerName, ...] = Field(
        default=("tensorboard",),
        description="what shows the run, beside metrics.jsonl: tensorboard, wandb, swanlab",
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="what one GPU can do in the run's dtype, TFLOP/s, such as 989 for an H100 in bf16; null: no MFU",
    )
    profile: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="steps, counted from 1, that torch's profiler traces into profile/"
    )
    resume_from_older: bool = Field(
        default=False,
        description="where the newest checkpoint is damaged or gone, go on from the last valid one; false: stop",
    )


class EvaluatedRunConfig(TrainRunConfig):
    """Stages that train evaluate on held-out data.

    Example:
        run: {dir: runs/dpo, eval_every: 20}
    """

    eval_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations on eval data; null: only at the end"
    )


class RolloutRunConfig(EvaluatedRunConfig):
    """Stages that sample show what they sample.

    Example:
        run: {dir: runs/rto, samples_every: 10}
    """

    samples_every: int | None = Field(
        default=None, ge=1, description="steps between tables of sample completions; null: none"
    )
    keep_rollouts: int | None = Field(
        default=20,
        ge=1,
        description="of how many last steps rollouts/ holds every response with its numbers; null: none is written",
    )


class GridConfig(Section):
    """How a model is cut over its ranks; data parallel size is their number / (tensor x context x pipeline).

    The ranks of a pipeline stage are shared by the experts of a mixture in another way than by its other layers: each
    expert is cut over `expert_tensor` ranks, and `expert` such groups hold different experts.

    Example:
        critic: {tensor: 2, sequence: true}
    """

    tensor: int = Field(default=1, ge=1)
    context: int = Field(
        default=1,
        ge=1,
        description="ranks over which the tokens of a row are cut, each with a copy of the model",
    )
    context_scheme: ContextScheme = Field(
        default="ulysses",
        description="how attention sees what other context ranks hold: it exchanges tokens for heads, or gathers keys",
    )
    pipeline: int = Field(default=1, ge=1)
    virtual: int = Field(
        default=1,
        ge=1,
        description="chunks of the model on each pipeline stage, which take turns with those of others (interleaved)",
    )
    stages: StageLayers = Field(
        default=None,
        description="layers of each pipeline stage, as in [3, 5]; auto: so that the fullest stage has the fewest "
        "parameters, embedding and head counted; null: as many on each",
    )
    sequence: bool = Field(default=False, description="Megatron sequence parallelism over the tensor ranks")
    expert: int = Field(
        default=1, ge=1, description="in how many parts the experts of a mixture lie on different ranks"
    )
    expert_tensor: int | None = Field(
        default=None, ge=1, description="over how many ranks an expert is cut; null: as other layers"
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _numbers_or_auto(cls, found: object) -> object:
        if found is None or found == "auto":
            return found
        if isinstance(found, list | tuple) and found and all(type(num) is int and num > 0 for num in found):
            return tuple(found)
        raise ValueError(f"stages={found!r}; expected auto, or the layers of each stage as in [3, 5]")

    @property
    def replica_ranks(self) -> int:
        """Ranks that work on a micro-batch together, and hold the model but for experts on ranks of other replicas."""
        return self.tensor * self.context * self.pipeline

    @property
    def row_multiple(self) -> int:
        """Token rows are padded to a multiple of this."""
        return (self.tensor if self.sequence else 1) * self.context

    def product(self, section: str) -> str:
        """How `replica_ranks` comes about, for messages about a section."""
        sizes = {"tensor": self.tensor, "context": self.context, "pipeline": self.pipeline}
        named = {name: size for name, size in sizes.items() if name != "context" or size > 1}
        keys = " x ".join(f"{section}.{name}" for name in named)
        return f"{keys} = {' x '.join(map(str, named.values()))} = {self.replica_ranks}"

    @property
    def expert_cut(self) -> int:
        """Tensor ranks of an expert."""
        return self.expert_tensor or self.tensor

    @property
    def whole_ranks(self) -> int:
        """Ranks that hold the model with all its experts: of one replica, or of several."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert * self.expert_cut)


class RoleGridConfig(GridConfig):
    """How the model of a role is cut, over the policy's ranks or its own.

    Example:
        critic: {tensor: 2, ranks: 4-7}
    """

    ranks: str | None = Field(
        default=None,
        pattern=r"^\d+(-\d+)?$",
        description="ranks that the role has instead of the policy's, counted from 0, as in 4-7; null: the policy's",
    )

    @property
    def own_ranks(self) -> range:
        """What `ranks` says; empty where it says nothing."""
        if self.ranks is None:
            return range(0)
        first, _, last = self.ranks.partition("-")
        return range(int(first), int(last or first) + 1)

    @field_validator("ranks", mode="before")
    @classmethod
    def _one_rank(cls, found: object) -> object:
        return str(found) if isinstance(found, int) else found

    @field_validator("ranks")
    @classmethod
    def _ascending(cls, found: str | None) -> str | None:
        first, dash, last = (found or "").partition("-")
        if dash and int(last) < int(first):
            raise ValueError(f"ranks={found} ends before it begins; write {last}-{first}")
        return found


def shared_ranks(roles: Mapping[RoleName, RoleGridConfig], world_size: int) -> list[int]:
    """The ranks that no role has for itself: those of the policy, and of every role that names none."""
    own = set(chain.from_iterable(grid.own_ranks for grid in roles.values()))
    return [rank for rank in range(world_size) if rank not in own]


class ParallelConfig(GridConfig):
    """Layout of the policy, and of every role that names none of its own.

    Example:
        parallel: {tensor: 4, pipeline: 2, sequence: true, roles: {critic: {tensor: 1}}}
    """

    roles: dict[RoleName, RoleGridConfig] = Field(
        default={},
        description="role -> a layout of its own, on the policy's ranks or others; the rest have the policy's",
    )

    def grid_of(self, role: str) -> GridConfig:
        """How a role is cut."""
        return next((grid for name, grid in self.roles.items() if name == role), self)

    def ranks_of(self, role: str, world_size: int) -> Sequence[int]:
        """The ranks that hold a role, of so many."""
        own = next((grid.own_ranks for name, grid in self.roles.items() if name == role), range(0))
        return own or shared_ranks(self.roles, world_size)

    def key_of(self, role: str) -> str:
        """The section that says so."""
        return f"parallel.roles.{role}" if role in self.roles else "parallel"


class TrainParallelConfig(ParallelConfig):
    """The layout of optimizers too.

    Example:
        parallel: {tensor: 4, distributed_optimizer: true}
    """

    distributed_optimizer: bool = Field(
        default=False, description="shard optimizer state over data-parallel ranks"
    )
    overlap_grad_reduce: bool = Field(
        default=False,
        description="reduce gradients over data-parallel ranks while the last backward still runs",
    )


class FrozenPrecisionConfig(Section):
    """How forwards compute; log-softmax is always fp32.

    Example:
        precision: {dtype: bf16, kernels: auto}
    """

    dtype: Literal["fp32", "bf16"] = "bf16"
    kernels: KernelsChoice = Field(
        default="torch",
        description="what computes the layers of all roles: torch, TransformerEngine, or it where it is installed",
    )
    fp8: bool = Field(
        default=False,
        description="products of TransformerEngine's layers in 8 bits, each tensor scaled by what is in it; weights, "
        "optimizers, head and attention stay as they are",
    )
    fp32_parts: tuple[Fp32Part, ...] = Field(
        default=(),
        description="what a bf16 model computes in fp32, in trainer and pool: head, its logits; residual, what layers "
        "add to",
    )


class PrecisionConfig(FrozenPrecisionConfig):
    """bf16 keeps fp32 master weights and accumulates gradients in fp32.

    Example:
        precision: {dtype: bf16, recompute: true}
    """

    recompute: bool = Field(
        default=False, description="recompute activations of every layer in the backward pass"
    )


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """Adam with linear warm-up and a cosine to a floor (rto.md 1.11).

    Example:
        optimizer: {lr: 5.0e-7, schedule: constant, max_grad_norm: 1.0}
    """

    kind: Literal["adam", "sgd"] = "adam"
    lr: float = Field(gt=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="of all weights but norms and biases")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="null: no clipping")
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)

    def unread(self) -> Mapping[str, str]:
        """Adam's numbers with SGD, and the floor of a rate that stays."""
        floor = (
            {"min_lr_fraction": "with schedule=constant; remove it"} if self.schedule == "constant" else {}
        )
        moments = dict.fromkeys(("betas", "eps"), "with kind=sgd; remove it") if self.kind == "sgd" else {}
        return {**floor, **moments}
