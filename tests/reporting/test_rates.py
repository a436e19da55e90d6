"""Rates of a step."""

from rto_megatron.reporting.rates import rates


def test_rates_are_counts_of_all_replicas_over_the_seconds_of_their_phase() -> None:
    means = {"rollout/response_tokens": 30.0, "rollout/prompt_tokens": 10.0, "time/generate_s": 2.0,
             "time/score_s": 4.0, "time/update_s": 5.0, "time/step_s": 8.0}  # fmt: skip
    assert rates(means, num_responses=16, epochs=2, num_ranks=4) == {
        "time/samples_per_s": 2.0,
        "time/sample_tokens_per_s": 240.0,
        "time/score_tokens_per_s": 160.0,
        "time/update_tokens_per_s": 256.0,
        "time/score_tokens_per_s_per_rank": 40.0,
        "time/update_tokens_per_s_per_rank": 64.0,
    }
    assert rates({"time/step_s": 8.0}, 16, 2, 4) == {"time/samples_per_s": 2.0}
