"""What of sampling does not go with the method, the pool or the other options of a stage."""

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.reinforcement import GroupConfig
from rto_megatron.config.schema import ReinforcementStage


def sampling_problems(config: ReinforcementStage) -> list[str]:
    """One sentence for each."""
    return [*_likeliest(config), *_rounds(config), *_held_out(config)]


def _held_out(config: ReinforcementStage) -> list[str]:
    how, data = config.evaluate, config.data
    if data.eval is not None:
        if how.temperature == 0 and how.num_samples > 1:
            return [
                f"evaluate.temperature=0 takes the likeliest tokens, so that all of evaluate.num_samples="
                f"{how.num_samples} responses would be the same; raise the first or set the second to 1"
            ]
        return []
    keys = [f"evaluate.{key}" for key, value in how if value != type(how).model_fields[key].default]
    keys += ["data.eval_samples"] * (data.eval_samples is not None)
    keys += ["run.eval_every"] * (config.run.eval_every is not None)
    return [f"{key} has no effect without data.eval; remove it or name held-out prompts" for key in keys]


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
