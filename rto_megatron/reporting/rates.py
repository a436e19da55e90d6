"""How fast the phases of a rollout step are: counts over the seconds that the step's metrics hold."""

from collections.abc import Mapping

_OF_RANKS = ("time/score_tokens_per_s", "time/update_tokens_per_s")


def rates(means: Mapping[str, float], num_responses: int, epochs: int, num_ranks: int) -> dict[str, float]:
    """Tokens and responses per second, of all replicas together and of a rank; what a step did not do has no rate.

    Sampling counts the tokens of responses over the pool's own seconds, scoring and updating those of prompts too.

    Args:
        means: the metrics of the step, means over replicas.
        num_responses: of the step, all replicas.
        epochs: passes of the update over them.
        num_ranks: of the trainer.
    """
    response = means.get("rollout/response_tokens")
    prompt = means.get("rollout/prompt_tokens")
    counts: dict[str, tuple[float, tuple[str, ...]]] = {
        "time/samples_per_s": (num_responses, ("time/step_s",))
    }
    if response is not None and prompt is not None:
        whole = num_responses * (prompt + response)
        counts |= {
            "time/sample_tokens_per_s": (num_responses * response, ("time/generate_s",)),
            "time/score_tokens_per_s": (whole, ("time/score_s", "time/score_early_s")),
            "time/update_tokens_per_s": (epochs * whole, ("time/update_s",)),
        }
    seconds = {name: sum(means.get(one, 0.0) for one in over) for name, (_, over) in counts.items()}
    found = {name: count / seconds[name] for name, (count, _) in counts.items() if seconds[name] > 0}
    return found | {f"{name}_per_rank": found[name] / num_ranks for name in _OF_RANKS if name in found}
