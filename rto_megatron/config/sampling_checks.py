"""What of sampling does not go with the method, the pool or the other options of a stage."""

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.reinforcement import GroupConfig
from rto_megatron.config.rewards import PayingSource
from rto_megatron.config.rollouts import HeldOutConfig, SamplingConfig
from rto_megatron.config.schema import ReinforcementStage


def sampling_problems(config: ReinforcementStage) -> list[str]:
    """One sentence for each."""
    return [*_likeliest(config), *_old_logprobs(config), *_rounds(config), *_held_out(config)]


def _held_out(config: ReinforcementStage) -> list[str]:
    how, data = config.evaluate, config.data
    if data.eval is not None:
        return [*(_greedy(how) if how.temperature == 0 else []), *_passes(config)]
    keys = [f"evaluate.{key}" for key, value in how if value != type(how).model_fields[key].default]
    keys += ["data.eval_samples"] * (data.eval_samples is not None)
    keys += ["run.eval_every"] * (config.run.eval_every is not None)
    return [f"{key} has no effect without data.eval; remove it or name held-out prompts" for key in keys]


def _passes(config: ReinforcementStage) -> list[str]:
    """pass@k counts scores of responses, which are 0 where every source pays tokens."""
    limit = config.evaluate.pass_score
    pays = [source.pays if isinstance(source, PayingSource) else "response" for source in config.rewards]
    if limit is None or not pays or "response" in pays:
        return []
    return [
        f"evaluate.pass_score={limit:g} is of the score of a response, and no source of `rewards` pays responses: all "
        "score 0; remove it, or name a source with `pays: response`"
    ]


def _greedy(how: HeldOutConfig) -> list[str]:
    """What else says how the likeliest tokens are taken."""
    problems = [
        f"evaluate.{key}={value:g} has no effect with evaluate.temperature=0, which takes the likeliest tokens; remove "
        "one of them"
        for key, value in (("top_p", how.top_p), ("top_k", how.top_k))
        if value is not None
    ]
    if how.num_samples > 1:
        problems.append(
            f"evaluate.temperature=0 takes the likeliest tokens, so that all of evaluate.num_samples={how.num_samples} "
            "responses would be the same; raise the first or set the second to 1"
        )
    return problems


def _cut_off(how: SamplingConfig) -> list[str]:
    """The keys by which only the likeliest tokens are sampled, with their values."""
    return [
        f"sampling.{key}={value:g}" for key, value in (("top_p", how.top_p), ("top_k", how.top_k)) if value
    ]


def _likeliest(config: ReinforcementStage) -> list[str]:
    keys, method = _cut_off(config.sampling), ALGORITHMS[config.stage]
    assert isinstance(method, OnlineMethod)
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


def _old_logprobs(config: ReinforcementStage) -> list[str]:
    """The pool's log-probs are of what it sampled from, and only of tokens that it sampled."""
    if config.rollout.old_logprobs == "trainer":
        return []
    how, algorithm, named = config.sampling, config.algorithm, "rollout.old_logprobs=pool"
    problems = []
    if keys := _cut_off(how):
        problems.append(
            f"{named}: with {' and '.join(keys)} the pool's log-probs are of the likeliest tokens alone; take "
            "rollout.old_logprobs=trainer, or sample from all tokens"
        )
    if how.min_response_tokens == 1:
        problems.append(
            f"{named}: with sampling.min_response_tokens=1 the pool's log-prob of a first token leaves end-of-sequence "
            "out, and the trainer's does not; set it to 0, or to 2 or more"
        )
    if algorithm.truncated == "compat":
        problems.append(
            f"{named}: algorithm.truncated=compat trains on end-of-sequence where the pool sampled another token, and "
            "has no log-prob of it; take penalise, mask or rollout.old_logprobs=trainer"
        )
    if algorithm.pool_importance_cap is not None:
        problems.append(
            f"{named}: pi_old is the pool's own policy, so that algorithm.pool_importance_cap="
            f"{algorithm.pool_importance_cap:g} would correct nothing; remove one of them"
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
