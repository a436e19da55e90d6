"""What the sources of rewards must satisfy, with each other and with the rest of the configuration."""

from collections import Counter

from rto_megatron.config.rewards import OutsideSource, OverlongSource, ResponseSource, Source
from rto_megatron.config.schema import EvaluateStage, ReinforcementStage, Rewarded


def reward_problems(config: Rewarded) -> list[str]:
    """What is wrong with `rewards` and `models.reward`, one sentence each."""
    normalized = _normalized(config) if isinstance(config, EvaluateStage) else _groups(config)
    return [*_model(config), *_names(config), *normalized, *_lengths(config), *_limits(config)]


def _model(config: Rewarded) -> list[str]:
    reward, sources = config.models.reward, config.rewards
    num_models = sum(source.kind == "model" for source in sources)
    if num_models > 1:
        return [
            f"rewards has {num_models} sources of kind model, and models.reward names one model; remove all but one"
        ]
    is_needed = num_models > 0 or not (sources or isinstance(config, EvaluateStage))
    if reward is None and is_needed:
        return [
            f"models.reward is missing: stage {config.stage} scores its rollouts with a reward model; name it, or list "
            "sources of other kinds in `rewards`"
        ]
    if reward is not None and sources and not num_models:
        return [
            f"models.reward={reward} has no effect, as no source in `rewards` is of kind model; add "
            "`- kind: model`, or remove it (a critic can start from it as models.critic)"
        ]
    return []


def _names(config: Rewarded) -> list[str]:
    counts = Counter(source.name for source in config.rewards)
    return [
        f"rewards has {count} sources named {name!r}, which would be logged as one; give each a `name`"
        for name, count in counts.items()
        if count > 1
    ]


def _groups(config: ReinforcementStage) -> list[str]:
    if config.algorithm.samples_per_prompt > 1:
        return []
    return [
        f"rewards.{source.name}.normalize=group has nothing to compare with algorithm.samples_per_prompt=1; raise "
        "that, or take normalize=batch"
        for source in config.rewards
        if isinstance(source, ResponseSource) and source.normalize == "group"
    ]


def _normalized(config: EvaluateStage) -> list[str]:
    return [
        f"rewards.{source.name}.normalize={source.normalize} has no place in stage evaluate, which shows what sources "
        "give; remove it"
        for source in config.rewards
        if isinstance(source, ResponseSource) and source.normalize is not None
    ]


def _lengths(config: Rewarded) -> list[str]:
    limit = config.sampling.max_response_tokens
    buffers = [(source.name, *_buffer(source)) for source in config.rewards]
    return [
        f"rewards.{name}.{key}={buffer} is above sampling.max_response_tokens={limit}, so the shortest response would "
        "be punished; lower it"
        for name, key, buffer in buffers
        if buffer > limit
    ]


def _buffer(source: Source) -> tuple[str, int]:
    """The key that punishes length, and over how many tokens; 0 where it does not."""
    if isinstance(source, OverlongSource):
        return "buffer_tokens", source.buffer_tokens
    return "overlong_buffer_tokens", source.overlong_buffer_tokens or 0


def _limits(config: Rewarded) -> list[str]:
    limit, longest = config.run.collective_timeout_s, longest_wait_s(config)
    if limit is None or longest < limit:
        return []
    return [
        f"rewards may take {longest:g} s a step (the sum of their timeout_s), and run.collective_timeout_s={limit:g} "
        "counts ranks as hung before; raise it, or lower the limits of the rewards"
    ]


def longest_wait_s(config: Rewarded) -> float:
    """How long ranks may wait in a step for rewards from outside."""
    return sum(source.timeout_s for source in config.rewards if isinstance(source, OutsideSource))
