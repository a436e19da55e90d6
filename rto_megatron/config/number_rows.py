"""What a recipe says of how its numbers come about, a row each for people who read what it means."""

from rto_megatron.config.facts import facts_of
from rto_megatron.config.kl_gap import expected_gap
from rto_megatron.config.schema import Stage


def number_rows(config: Stage) -> dict[str, str]:
    """Key of the recipe -> what it does here, of those that are set. docs/precision.md and docs/speed.md say more."""
    precision, facts = config.precision, facts_of(config)
    rows = {}
    if precision.fp8:
        others = "head and attention" if facts.pool is None else "head, attention and pool"
        rows["precision.fp8"] = f"layers of all roles multiply in 8 bits; {others} stay in {precision.dtype}"
    if precision.fp32_parts:
        where = "all roles" if facts.pool is None else "all roles and of the pool"
        effect = f"in fp32, of {where}" if precision.dtype == "bf16" else "no effect, as everything is fp32"
        rows["precision.fp32_parts"] = f"{' and '.join(precision.fp32_parts)}: {effect}"
    if facts.online is not None and facts.online.rollout.old_logprobs == "pool":
        gap = expected_gap(precision)
        apart = f", some {gap:g} nats a token from the trainer's" if gap else ""
        rows["rollout.old_logprobs"] = f"the pool's{apart}; the policy is asked of one response in 16"
    return rows
