"""Responses end behind the token that completes a stop string, and keep what was sampled up to it."""

import random

import pytest

from rto_megatron.algorithms.termination import close_response
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.generation.stop_strings import StoppingEngine, stopped
from rto_megatron.types import EndOfSequence, FinishReason, Prompt, Rollout

PIECES = ["", "</s>", "", "a", "b", "ab", "\n", "User", ":", "b\nUs", "er:"]
END = EndOfSequence((1,), 1)


def decode(ids):
    return "".join(PIECES[token] for token in ids)


def rollout(ids: tuple[int, ...], reason: FinishReason = "length") -> Rollout:
    return Rollout("p", (3,), ids, tuple(-0.1 * (place + 1) for place in range(len(ids))), reason, 7)


@pytest.mark.parametrize(
    ("ids", "strings", "min_tokens", "kept"),
    [
        ((3, 4, 6, 7, 8, 3), ("\nUser:",), 0, 5),
        ((3, 9, 10, 3), ("\nUser:",), 0, 3),  # begins and ends within tokens
        ((3, 4, 6, 7, 3), ("\nUser:",), 0, None),
        ((3, 4, 6, 6, 3), ("\n", "ab"), 0, 2),  # the first that is complete, in whatever order they are named
        ((6, 3, 6, 3), ("\n",), 2, 3),  # the one in the first token came before the shortest response
        ((7, 8, 3), ("User:",), 2, 2),  # completed by the second
        ((3, 3), ("a",), 3, None),
        ((3,), ("a",), 1, 1),
    ],
)
def test_the_response_ends_with_the_token_that_completes_a_stop(ids, strings, min_tokens, kept) -> None:
    sampled = rollout(ids)
    found = stopped(sampled, strings, min_tokens, decode)
    if kept is None:
        assert found == sampled
    else:
        assert found == Rollout("p", (3,), ids[:kept], sampled.sampled_logprobs[:kept], "stop", 7)


def test_stops_are_those_of_a_slow_loop_over_growing_responses() -> None:
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(400):
        ids = tuple(rng.randrange(3, len(PIECES)) for _ in range(rng.randint(1, 12)))
        strings = rng.sample(["\nUser:", "ba", "bb", ":a"], rng.randint(1, 3))
        end = next((n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in strings)), None)
        found = stopped(rollout(ids), strings, 0, decode)
        assert len(found.response_ids) == (end or len(ids))
        assert found.finish_reason == ("length" if end is None else "stop")
        num_stopped += end is not None
    assert 50 < num_stopped < 400


@pytest.mark.parametrize("policy", ["compat", "penalise", "bootstrap", "mask"])
def test_a_stopped_response_is_closed_for_the_reward_model_and_trained_on_as_sampled(policy) -> None:
    assert close_response((3, 9, 10), "stop", END, policy) == ((3, 9, 10), (1,))
    assert close_response((3, 9, 1), "stop", END, policy) == ((3, 9, 1), ())


def test_an_engine_stops_all_of_its_responses() -> None:
    inner = ScriptedEngine(len(PIECES), version=4)
    prompts = [Prompt(f"p{number}", (3,)) for number in range(40)]
    how = Sampling(max_tokens=12, eos_ids=(1,), min_tokens=2)
    plain = inner.generate(prompts, how, 4)
    found = StoppingEngine(inner, ("ba", "\n"), decode).generate(prompts, how, 4)
    assert [one.prompt_id for one in found] == [prompt.id for prompt in prompts]
    for one, whole in zip(found, plain, strict=True):
        assert one == stopped(whole, ("ba", "\n"), 2, decode)
    assert any(
        len(one.response_ids) < len(whole.response_ids) for one, whole in zip(found, plain, strict=True)
    )
