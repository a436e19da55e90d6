"""Sections of a recipe about what the policy samples: how, from which pool, and how it is measured."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from rto_megatron.config.addresses import without_localhost
from rto_megatron.section import Section

OldLogprobs = Literal["trainer", "pool"]


class SamplingConfig(Section):
    """How responses are drawn.

    Example:
        sampling: {max_response_tokens: 1024, temperature: 0.8}
    """

    max_response_tokens: int = Field(default=1024, ge=1)
    min_response_tokens: int = Field(
        default=1, ge=0, description="end-of-sequence is forbidden before this many tokens"
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="logits are divided by it, in the pool and in the trainer's log-probs of policy and reference",
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="sample from the likeliest tokens that hold this much probability; null: from all. Where the loss "
        "has no ratio to the sampling policy, and in evaluations",
    )
    top_k: int | None = Field(
        default=None, ge=1, description="sample from so many likeliest tokens; null: from all; as top_p"
    )

    stop: tuple[str, ...] = Field(
        default=(), description="a response ends behind the token that completes one of these texts"
    )

    @field_validator("stop")
    @classmethod
    def _refuse_empty_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError(
                "an empty text is in every response; give texts of at least one character, or none"
            )
        return stop

    @property
    def is_whole(self) -> bool:
        """Whether every token that is not forbidden can be sampled."""
        return self.top_p is None and self.top_k is None


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

    old_logprobs: OldLogprobs = Field(
        default="trainer",
        description="whose log-probs of the responses are pi_old, in ratios and the KL penalty: the `trainer`'s, by a "
        "forward of the policy over all of them, or those that the `pool` sampled with (the trainer's are then asked "
        "of one response in 16, to measure the gap)",
    )

    logprob_gap_alarm: float | None = Field(
        default=0.05,
        gt=0,
        description="nats; a mean difference between the log-probs of pool and trainer above it is warned of at every "
        "step. The default is for bf16, 5 times its usual gap; null: no alarm",
    )


class HeldOutConfig(Section):
    """How a stage that samples answers held-out prompts (`data.eval`), every `run.eval_every` steps.

    Example:
        evaluate: {num_samples: 4, temperature: 0.7, pass_score: 1.0}
    """

    num_samples: int = Field(default=1, ge=1, description="responses per prompt")
    temperature: float = Field(default=1.0, ge=0, le=10, description="of evaluations; 0: the likeliest token")
    top_p: float | None = Field(default=None, gt=0, lt=1, description="of evaluations; null: all tokens")
    top_k: int | None = Field(default=None, ge=1, description="of evaluations; null: all tokens")
    pass_score: float | None = Field(
        default=None, description="a response with at least this score passes, for pass@k; null: no pass@k"
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
