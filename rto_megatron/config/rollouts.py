"""Sections of a recipe about what the policy samples: how, from which pool, and how it is measured."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from rto_megatron.config.addresses import without_localhost
from rto_megatron.config.training import Section


class SamplingConfig(Section):
    """Training rollouts are drawn at temperature 1, top-p 1: anything else would bias the ratio of PPO.

    Example:
        sampling: {max_response_tokens: 1024, min_response_tokens: 4}
    """

    max_response_tokens: int = Field(default=1024, ge=1)
    min_response_tokens: int = Field(
        default=1, ge=0, description="end-of-sequence is forbidden before this many tokens"
    )


class RolloutConfig(Section):
    """How the trainer reaches the inference pool.

    Example:
        rollout: {colocated: true, gpu_memory_fraction: 0.4}
    """

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
    """The pool of a stage that trains on what it samples.

    Example:
        rollout: {logprob_gap_alarm: 0.05}
    """

    ahead: int = Field(
        default=0,
        ge=0,
        description="steps by which rollouts may be older than the weights they train: the pool samples so many "
        "batches while the trainer trains (verl's one-step-off: 1); 0: trainer and pool wait for each other",
    )

    logprob_gap_alarm: float | None = Field(
        default=0.05,
        gt=0,
        description="nats; a mean difference between the log-probs of pool and trainer above it is warned of at every "
        "step. The default is for bf16, 5 times its usual gap; null: no alarm",
    )


class EvaluateConfig(Section):
    """The stage `evaluate`: sample held-out prompts, score them and measure the distance to the reference.

    Example:
        evaluate: {name: rto, num_samples: 4}
    """

    name: str = Field(description="row of the final table")
    true_reward: Path | None = Field(
        default=None, description="the synthetic task's table, to measure the true return"
    )
    num_samples: int = Field(default=1, ge=1, description="responses per prompt")
