"""Optimizer steps on responses of a policy that has moved on, in a method whose loss has no ratio to correct for it."""

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.facts import facts_of
from rto_megatron.config.learning_rate import updates_per_step
from rto_megatron.config.schema import Stage


def stale_updates(config: Stage) -> list[str]:
    """A warning where a step has more than its first such update, and no correction."""
    method, online = ALGORITHMS.get(config.stage), facts_of(config).online
    if online is None or not isinstance(method, OnlineMethod) or method.has_ratio:
        return []
    updates, responses = updates_per_step(online), online.responses_per_step
    if updates == 1:
        return []
    return [
        f"batch.train={online.batch.train} makes {updates} updates of the {responses} responses of a step, of which "
        f"stage {config.stage} corrects none but the first for a policy that has moved on; set batch.train to "
        f"{responses}, or take a method with a clip, such as grpo"
    ]
