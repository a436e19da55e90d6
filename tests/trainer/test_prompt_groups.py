"""Which replica takes which rows of an optimizer step, where a prompt is computed once for those of one replica."""

from rto_megatron.trainer.prompt_groups import by_prompt, cost_together, shares_of_rows
from rto_megatron.types import Prompt, Rollout


def _rollouts(*lengths: tuple[int, int, int]) -> list[Rollout]:
    """Of (token that the prompt is made of, its length, length of the response)."""
    return [
        Rollout(str(token), (token,) * prompt, (2,) * response, (), "stop", 0)
        for token, prompt, response in lengths
    ]


def _tokens(one: Rollout | Prompt) -> float:
    return float(
        len(one.token_ids) if isinstance(one, Prompt) else len(one.prompt_ids) + len(one.response_ids)
    )


def test_rows_of_a_prompt_cost_it_once() -> None:
    some = _rollouts((7, 100, 3), (8, 50, 4), (7, 100, 5))
    assert by_prompt(some, [2, 1, 0]) == [[2, 0], [1]]
    assert cost_together(some, _tokens) == 100 + 3 + 5 + 50 + 4


def test_rows_of_a_prompt_go_to_one_replica_where_that_pays() -> None:
    long_prompts = _rollouts((7, 100, 3), (8, 100, 4), (7, 100, 3), (8, 100, 4))
    assert shares_of_rows(long_prompts, range(4), 2, _tokens) == [[1, 3], [0, 2]]
    # 400 against 20 tokens if together; 210 each if apart.
    long_responses = _rollouts((7, 10, 200), (7, 10, 200), (8, 10, 5), (8, 10, 5))
    apart = shares_of_rows(long_responses, range(4), 2, _tokens)
    assert [sorted(share) for share in apart] == [[0, 2], [1, 3]]


def test_no_replica_is_left_without_a_row() -> None:
    some = _rollouts((7, 100, 3), (7, 100, 3), (8, 100, 4), (8, 100, 4))
    assert all(shares_of_rows(some, range(4), 3, _tokens))
