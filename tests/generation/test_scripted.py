"""The engine contract on the engine without a model, and rollouts in a file."""

from pathlib import Path

import pytest

from rto_megatron.errors import DataError
from rto_megatron.generation.contract import RolloutEngine, Sampling, StaleWeights, request_seed
from rto_megatron.generation.rollout_lines import load_rollouts, rollout_lines
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.types import Prompt

PROMPTS = [Prompt(f"prompt-{index}", (1, index, 7)) for index in range(40)]
SAMPLING = Sampling(max_tokens=12, min_tokens=3, eos_ids=(2,), seed=5)


def test_order_ids_and_version_are_kept() -> None:
    engine: RolloutEngine = ScriptedEngine(vocab_size=30, version=4)
    rollouts = engine.generate(PROMPTS, SAMPLING, 4)
    assert [(one.prompt_id, one.prompt_ids) for one in rollouts] == [
        (one.id, one.token_ids) for one in PROMPTS
    ]
    assert {one.weight_version for one in rollouts} == {4}
    assert rollouts == engine.generate(PROMPTS, SAMPLING, 4)


def test_another_version_is_refused() -> None:
    with pytest.raises(StaleWeights, match="expected 5"):
        ScriptedEngine(vocab_size=30, version=4).generate(PROMPTS, SAMPLING, 5)


def test_responses_end_as_their_finish_reason_says() -> None:
    rollouts = ScriptedEngine(30, 4).generate(PROMPTS, SAMPLING, 4)
    assert {one.finish_reason for one in rollouts} == {"stop", "length"}
    for one in rollouts:
        assert len(one.sampled_logprobs) == len(one.response_ids)
        assert 2 not in one.response_ids[:-1]
        if one.finish_reason == "stop":
            assert one.response_ids[-1] == 2 and 3 <= len(one.response_ids) <= 12
        else:
            assert one.response_ids[-1] != 2 and len(one.response_ids) == 12


def test_a_held_version_samples_anew() -> None:
    engine = ScriptedEngine(30, 4)
    before = engine.generate(PROMPTS, SAMPLING, 4)
    engine.hold(5)
    after = engine.generate(PROMPTS, SAMPLING, 5)
    assert [one.response_ids for one in before] != [one.response_ids for one in after]


def test_request_seeds_differ_in_every_argument() -> None:
    seeds = {
        request_seed(seed, version, index) for seed in range(5) for version in range(5) for index in range(5)
    }
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_recordings_survive_their_file(tmp_path: Path) -> None:
    rollouts = ScriptedEngine(30).generate(PROMPTS, SAMPLING, 0)
    (tmp_path / "rollouts.jsonl").write_text(rollout_lines(rollouts))
    assert load_rollouts(tmp_path / "rollouts.jsonl") == rollouts


def test_a_broken_recording_is_named_with_its_line(tmp_path: Path) -> None:
    sound = rollout_lines(ScriptedEngine(30).generate(PROMPTS[:1], SAMPLING, 0))
    (tmp_path / "rollouts.jsonl").write_text(sound + '{"prompt_id": "x"}\n')
    with pytest.raises(DataError, match=r"rollouts.jsonl:2 is not a recorded rollout"):
        load_rollouts(tmp_path / "rollouts.jsonl")
