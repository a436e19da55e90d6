"""A step of a recipe in seconds, phase by phase, and the limit of the machine beside each."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from rto_megatron.config.plan import StagePlan
from rto_megatron.config.roles import Role
from rto_megatron.models.parameters import num_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.gpus import Gpu
from rto_megatron.planning.memory import moved_bytes, weight_bytes
from rto_megatron.planning.step_time import (
    EXPECTED,
    LIMIT,
    TRAINING_FORWARDS,
    Efficiency,
    PoolServers,
    forward_s,
    push_s,
    training_s,
)

_CACHE_SHARE = 0.2  # of a pool's memory that must be left for its cache


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase as expected, and at the data sheet's numbers.

    Example:
        PhaseTime("score", seconds=3.1, limit_s=1.2)
    """

    name: str
    seconds: float
    limit_s: float


@dataclass(frozen=True)
class StepTime:
    """A rollout step, or an optimizer step of a stage on data.

    Example:
        time_step(plan, shapes, gpu, pool_gpus=4, lengths=Lengths(512, 512)).seconds
    """

    phases: tuple[PhaseTime, ...]
    seconds: float  # with what a step takes beside its phases
    limit_s: float
    utilisation: float  # model operations of the trainer over what its GPUs could do in the whole step
    # Forwards of what is trained that the update takes: 3, 4 with recomputation, and bubbles.
    update_forwards: float


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of what a step reads.

    Example:
        Lengths(prompt=512, response=700)
    """

    prompt: int
    response: int

    @property
    def both(self) -> int:
        """Of prompt and response."""
        return self.prompt + self.response


def longest_lengths(plan: StagePlan) -> Lengths:
    """The longest that the recipe admits, prompt and response."""
    longest, _ = plan.facts.longest_sequence
    prompt = longest // 2
    if plan.facts.online is not None:
        prompt = plan.facts.online.data.max_prompt_tokens
    return Lengths(prompt, longest - prompt)


def pool_tensor(policy: ModelShape, width: int, gpu: Gpu, fraction: float, pool_gpus: int) -> int | None:
    """The fewest GPUs of a server whose weights leave room for a cache; None where the whole pool has none."""
    weights, tensor = num_parameters(policy, has_scalar_head=False) * width, 1
    while tensor <= pool_gpus:
        if weights <= (1 - _CACHE_SHARE) * fraction * gpu.gib * 2**30 * tensor:
            return tensor
        tensor *= 2
    return None


def time_step(
    plan: StagePlan, shapes: Mapping[str, ModelShape], gpu: Gpu, pool_gpus: int, lengths: Lengths
) -> StepTime:
    """What a step takes.

    Args:
        shapes: role -> shape, of every model that the stage loads.
        pool_gpus: those that sample; the trainer's where the pool lies there.
    """
    expected = _phases(plan, shapes, gpu, pool_gpus, lengths, EXPECTED)
    limits = _phases(plan, shapes, gpu, pool_gpus, lengths, LIMIT)
    seconds = _together(plan, expected) * EXPECTED.overhead
    return StepTime(
        tuple(PhaseTime(name, expected[name], limits[name]) for name in expected),
        seconds,
        _together(plan, limits),
        (limits.get("score", 0.0) + limits["update"]) / seconds,
        expected["update"] / limits["update"] * EXPECTED.products * TRAINING_FORWARDS,
    )


def _together(plan: StagePlan, phases: Mapping[str, float]) -> float:
    """Phases one after the other; rollouts that are ahead are sampled beside the others."""
    online = plan.facts.online
    if online is None or not online.rollout.ahead:
        return sum(phases.values())
    others = sum(seconds for name, seconds in phases.items() if name != "sample")
    return max(phases["sample"], others)


def _phases(
    plan: StagePlan,
    shapes: Mapping[str, ModelShape],
    gpu: Gpu,
    pool_gpus: int,
    lengths: Lengths,
    by: Efficiency,
) -> dict[str, float]:
    facts, found = plan.facts, dict[str, float]()
    training = facts.training
    assert training is not None, "checked: what does not train has no step"
    if training.precision.fp8:
        by = replace(by, layers=2.0)
    sequences = training.batch.train * (2 if facts.reads_pairs else 1)
    if (online := facts.online) is not None:
        sequences = online.responses_per_step
        width, policy = weight_bytes(training.precision), shapes["policy"]
        fraction = online.rollout.gpu_memory_fraction or 0.9
        tensor = pool_tensor(policy, width, gpu, fraction, pool_gpus)
        assert tensor is not None, "checked: the pool holds the policy"
        pool = PoolServers(policy, gpu, pool_gpus // tensor, tensor, width, width, fraction)
        longest = online.sampling.max_response_tokens
        found["push"] = push_s(pool.weight_bytes, by)
        found["sample"] = pool.sampling_s(sequences, lengths.prompt, lengths.response, longest, by)
    rows = [lengths.both] * sequences
    read = [
        role for role in plan.roles if role.shares is None and (online is not None or not role.is_trained)
    ]
    if online is not None and online.rollout.old_logprobs == "pool":
        read = [role for role in read if role.name != "policy"]
    if read:
        found["score"] = max(
            sum(
                forward_s([_model(role, shapes)], rows, gpu, plan.layout_of(role.name).num_ranks, by)
                for role in read
                if role.name in names
            )
            for names in plan.rank_sets.values()
        )
    epochs = 1 if online is None else online.algorithm.epochs
    found["update"] = epochs * max(
        _updates(plan, names, shapes, rows, gpu, by) for names in plan.rank_sets.values()
    )
    if training.offload:
        found["offload"] = moved_bytes(plan, shapes) / (by.offload_gb_per_s * 1e9)
    return found


def _updates(
    plan: StagePlan,
    names: Collection[str],
    shapes: Mapping[str, ModelShape],
    rows: list[int],
    gpu: Gpu,
    by: Efficiency,
) -> float:
    """Of the trained roles of one set of ranks; other sets train theirs at the same time."""
    training, seconds = plan.facts.training, 0.0
    assert training is not None
    for role in plan.roles:
        if role.is_trained and role.name in names:
            layout = plan.layout_of(role.name)
            micro = training.batch.micro or max(1, (training.batch.tokens or 0) // rows[0])
            num_microbatches = max(1, training.batch.train // layout.data // micro)
            bubble = pipeline_idle(layout.pipeline, layout.virtual, num_microbatches)
            recompute = training.precision.recompute
            seconds += training_s([_model(role, shapes)], rows, gpu, layout.num_ranks, by, recompute, bubble)
    return seconds


def pipeline_idle(stages: int, chunks: int, num_microbatches: int) -> float:
    """What stages wait in an optimizer step, over what they work; micro-batches that fill up a round are waited for."""
    if chunks == 1:
        return (stages - 1) / num_microbatches
    # An interleaved schedule takes them by as many as it has stages.
    rounds = -(-num_microbatches // stages) * stages
    return (rounds + (stages - 1) / chunks) / num_microbatches - 1


def _model(role: Role, shapes: Mapping[str, ModelShape]) -> tuple[ModelShape, bool]:
    return shapes[role.name], role.has_value_head
