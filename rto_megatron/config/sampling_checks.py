"""What of sampling does not go with the method, the pool or the other options of a stage."""

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.reinforcement import GroupConfig
from rto_megatron.config.schema import ReinforcementStage


def sampling_problems(config: ReinforcementStage) -> list[str]:
    """One sentence for each."""
    return [*_likeliest(config), *_rounds(config)]


def _likeliest(config: ReinforcementStage) -> list[str]:
    how, method = config.sampling, ALGORITHMS[config.stage]
    assert isinstance(method, OnlineMethod)
    keys = [
        f"sampling.{key}={value:g}" for key, value in (("top_p", how.top_p), ("top_k", how.top_k)) if value
    ]
    if not keys:
        return []
    named, problems = " and ".join(keys), []
    if method.has_ratio:
        problems.append(
            f"{named}: stage {config.stage} weighs tokens by the policy's ratio to the distribution that was sampled "
            "from, and that of the likeliest tokens alone gives the others no probability; remove it, or take a method "
            "without a ratio (rloo)"
        )
    if config.algorithm.pool_importance_cap is not None:
        problems.append(
            f"{named}: the pool's log-probs are then of the likeliest tokens alone, and "
            f"algorithm.pool_importance_cap={config.algorithm.pool_importance_cap:g} would take that for a gap; remove "
            "one of them"
        )
    return problems


def _rounds(config: ReinforcementStage) -> list[str]:
    algorithm = config.algorithm
    if not isinstance(algorithm, GroupConfig) or algorithm.max_sampling_rounds is None:
        return []
    if config.rollout.colocated:
        return [
            f"algorithm.max_sampling_rounds={algorithm.max_sampling_rounds} samples, scores and samples again within a "
            "step, and a pool with rollout.colocated=true sleeps while the trainer scores; give the pool GPUs of its "
            "own, or set max_sampling_rounds to null"
        ]
    return []
