"""Reward functions in a process of their own: what they get, what they may give, and how they fail."""

from pathlib import Path

import psutil
import pytest

from rto_megatron.errors import UserError
from rto_megatron.rewards.function_reward import Called, FunctionRater
from rto_megatron.rewards.given import Pays, read_given
from rto_megatron.rewards.sample import Sample

FILE = Path(__file__).parent / "functions.py"
VALUES = (0.5, True, "yes", None, [1.0], [0, 1, 2.0])


def sample(number: int, num_tokens: int = 3) -> Sample:
    ids = tuple(range(num_tokens))
    return Sample(
        f"p{number}", "say", "so", (1, 2), ids, ("a",) * num_tokens, "stop", {"value": VALUES[number]}
    )


def rater(name: str, pays: Pays = "response", timeout_s: float = 20.0) -> FunctionRater:
    return FunctionRater(Called("rewards.mine", f"{FILE}:{name}", pays, timeout_s))


def refused(name: str, samples: list[Sample], timeout_s: float = 20.0) -> str:
    one = rater(name, timeout_s=timeout_s)
    with pytest.raises(UserError) as caught:
        one.rate(samples)
    one.close()
    return str(caught.value)


def test_functions_of_every_kind_rate_samples_in_their_order() -> None:
    samples = [sample(number, num_tokens=number + 1) for number in range(4)]
    whole = rater("length")
    assert whole.rate(samples) == [1.0, 2.0, 3.0, 4.0]
    assert whole.rate(samples[::-1]) == [4.0, 3.0, 2.0, 1.0]  # the same process again
    assert rater("later").rate(samples) == [1.0, 2.0, 3.0, 4.0]  # all at one time
    assert rater("first_token", "tokens").rate(samples[2:3]) == [[1.0, 0.0, 0.0]]
    # Spans are paid on their last tokens: [0, 2) and [2, 4) of four.
    assert rater("halves", "spans").rate(samples[3:]) == [[0.0, 1.0, 0.0, 2.0]]
    assert read_given([[0, 2, 1.0], [1, 2, 2]], sample(0), "spans", "who") == [0.0, 3.0, 0.0]
    assert rater("column").rate([sample(0), sample(1)]) == [0.5, 1.0]


def test_failures_name_source_sample_and_remedy() -> None:
    samples = [sample(number) for number in range(4)]
    said = refused("picky", samples)
    assert "rewards.mine" in said and "failed on 1 sample: p2; nothing is trained on" in said
    assert "LookupError: no such word" in said
    assert "failed on 1 sample: p1" in refused("quits", samples[1:2])
    died = refused("quits", samples)
    assert "ended its process with status 7, with 4 samples: p0, p1, p2, p3 not scored" in died


def test_a_slow_function_is_ended_at_its_limit() -> None:
    one = rater("slow", timeout_s=1.0)
    process = psutil.Process(one._process.pid)
    with pytest.raises(
        UserError, match=r"longer than rewards.mine.timeout_s=1 and was ended, with 2 samples: p1, p2 not"
    ):
        one.rate([sample(0), sample(1), sample(2)])
    process.wait(5)


@pytest.mark.parametrize(
    ("value", "pays", "expected"),
    [
        ("yes", "response", "returned 'yes' for p0, expected one number"),
        (None, "response", "returned None for p0"),
        ([1.0], "response", "of length 1 for p0, expected one number"),
        (1.0, "tokens", "a list of one number for each of the 3 tokens"),
        ([1.0, 2.0], "tokens", "returned [1.0, 2.0] of length 2 for p0"),
        ([1.0, 2.0, "x"], "tokens", "of length 3"),
        ([[0, 4, 1.0]], "spans", "0 <= first < end <= 3"),
        ([[1, 1, 1.0]], "spans", "0 <= first < end <= 3"),
        ([[0.0, 1, 1.0]], "spans", "0 <= first < end <= 3"),
        ([1.0], "spans", "a list of [first, end, number]"),
    ],
)
def test_a_value_of_another_kind_or_length_is_refused(value: object, pays: Pays, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read_given(value, sample(0), pays, "rewards.mine: f.py:f returned")
    assert expected in str(caught.value)


def test_a_file_that_cannot_be_imported_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package\ndef f(sample): return 1\n")
    with pytest.raises(
        UserError, match=r"(?s)rewards.mine: .*cannot be imported.*No module named 'no_such_package'"
    ):
        FunctionRater(Called("rewards.mine", f"{tmp_path / 'broken.py'}:f", "response", 5.0))
