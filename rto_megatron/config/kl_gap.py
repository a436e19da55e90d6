"""KL coefficients that the rounding of bf16 drowns: what a recipe's KL terms are worth beside its log-probs' errors.

A log-prob computed in bf16 is off by an error that another computation of it, in the pool or with other weights, does
not share. Of two such numbers the difference has a mean magnitude g, the gap, and a root mean square of 1.4 g. A KL
penalty is a coefficient times such a difference at every token: over the T tokens of a response its noise is
1.4 coefficient g sqrt(T). Responses come from the pool and are scored by the trainer, so that a KL estimate is too low
by KL(pool || trainer), half the mean square: g^2 nats a token.

Source: docs/precision.md, where the gaps were measured.
"""

import math

from rto_megatron.algorithms.reinforcement import DpoRewardConfig
from rto_megatron.config.facts import facts_of
from rto_megatron.config.schema import Stage
from rto_megatron.config.training import FrozenPrecisionConfig

# precision.fp32_parts -> mean |difference| of trainer's and pool's log-probs, nats a token, of SmolLM2-135M in bf16
_GAPS = {
    frozenset[str](): 0.046,
    frozenset({"head"}): 0.035,
    frozenset({"residual"}): 0.036,
    frozenset({"head", "residual"}): 0.022,
}
_RMS = 1.4  # of the mean magnitude
_TOLERATED = 0.25  # of what a coefficient is weighed against


def expected_gap(precision: FrozenPrecisionConfig) -> float:
    """Mean |difference| of the log-probs of pool and trainer, nats a token; 0 in fp32, in 8 bits that of bf16."""
    return 0.0 if precision.dtype == "fp32" else _GAPS[frozenset(precision.fp32_parts)]


def drowned_coefficients(config: Stage) -> list[str]:
    """Warnings of KL coefficients whose terms are noise or bias for the most part, one sentence each."""
    facts = facts_of(config)
    online, keys, gap = facts.online, facts.kl_reward, expected_gap(config.precision)
    if online is None or keys is None or not gap:
        return []
    beta, tokens = keys.beta_kl, online.sampling.max_response_tokens
    of_token = _RMS * beta * gap
    of_response = of_token * math.sqrt(tokens)
    found = []
    if of_response > _TOLERATED:
        found.append(
            f"algorithm.beta_kl={beta:g} gives the KL penalty of a response of {tokens} tokens a noise of "
            f"{of_response:.2g}, beside a score whose standard deviation is about 1"
        )
    if isinstance(keys, DpoRewardConfig) and keys.beta_dpo:
        paid = min(keys.beta_dpo, keys.dpo_clip or math.inf)
        if of_token > _TOLERATED * paid:
            found.append(
                f"algorithm.beta_kl={beta:g} gives the KL penalty of a token a noise of {of_token:.2g}, beside the "
                f"{paid:g} that algorithm.beta_dpo={keys.beta_dpo:g} pays for a token that the DPO model finds one nat "
                "likelier"
            )
    if keys.kl_target is not None and gap**2 > _TOLERATED * keys.kl_target:
        found.append(
            f"algorithm.kl_target={keys.kl_target:g} nats a token is steered to by estimates that are "
            f"{gap**2:.2g} nats too low"
        )
    mend, computed = _mend(config.precision), "8 bits" if config.precision.fp8 else "bf16"
    least = "at least" if config.precision.fp8 else "about"
    apart = f"in {computed} the log-probs of pool and trainer differ by {least} {gap:g} nats a token"
    return [f"{apart} (docs/precision.md): {one}; {mend}, or choose another coefficient" for one in found]


def _mend(precision: FrozenPrecisionConfig) -> str:
    """What makes the gap smaller; only torch's layers can have an fp32 residual."""
    parts = ("head", "residual") if precision.kernels == "torch" else ("head",)
    if set(parts) <= set(precision.fp32_parts):
        torch = "" if precision.kernels == "torch" else " with precision.kernels=torch"
        return f"set precision.dtype=fp32{torch}"
    return f"set precision.fp32_parts=[{','.join(parts)}] ({_GAPS[frozenset(parts)]:g} nats)"
