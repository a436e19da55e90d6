"""End-of-sequence and masks against golden cases, and the policies for cut responses."""

import pytest
from algorithms.grids import GOLDEN

from rto_megatron.algorithms.termination import close_response, close_sequence
from rto_megatron.types import EndOfSequence

EOS = 9
END = EndOfSequence((EOS,), EOS)


@pytest.mark.parametrize("case", GOLDEN["process_sequences"])
def test_closed_sequence_and_masks_equal_golden(case):
    golden = GOLDEN["process_sequences"][case]
    inputs = golden["inputs"]
    closed = close_sequence(
        inputs["sequences"][0],
        inputs["input_len"],
        EndOfSequence((inputs["eos"],), inputs["eos"]),
        inputs["pad"],
    )
    assert list(closed.token_ids) == golden["sequences"][0]
    assert list(closed.attention_mask) == golden["attention_mask"][0]
    assert list(closed.action_mask) == golden["action_mask"][0]


@pytest.mark.parametrize("policy", ["compat", "penalise", "mask"])
@pytest.mark.parametrize("response", [(3, 4, EOS), (EOS,)])
def test_finished_response_is_left_alone(policy, response):
    assert close_response(response, "stop", END, policy) == (response, ())


def test_compat_overwrites_the_last_token_like_golden():
    golden = GOLDEN["process_sequences"]["no_eos_truncated"]
    sampled, closed = golden["inputs"]["sequences"][0][5:], golden["sequences"][0][5:]
    assert close_response(tuple(sampled), "length", END, "compat") == (tuple(closed), ())


def test_compat_with_one_token_leaves_end_of_sequence_only():
    assert close_response((3,), "length", END, "compat") == ((EOS,), ())


@pytest.mark.parametrize("policy", ["penalise", "mask"])
def test_cut_response_stays_as_sampled_and_is_scored_with_end_of_sequence(policy):
    assert close_response((3, 4, 8), "length", END, policy) == ((3, 4, 8), (EOS,))


@pytest.mark.parametrize("response", [(3, 4, 8), (3,)])
def test_compat_leaves_a_closed_response_as_it_is(response):
    closed, _ = close_response(response, "length", END, "compat")
    assert close_response(closed, "length", END, "compat") == (closed, ())


def test_first_token_is_an_action_even_if_the_prompt_ends_with_end_of_sequence():
    assert close_sequence((5, EOS, 3, EOS), input_len=2, eos=END, pad_id=0).action_mask == (1, 1)
