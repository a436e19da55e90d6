import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_demonstrations, load_pairs, load_prompts
from rto_megatron.data.synthetic import Sizes, write_synthetic_task
from rto_megatron.data.synthetic_source import SHORT, TOPICS, WORDS, draw_language
from rto_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.errors import DataError

LIMITS = Limits(64, 128, "error")
SIZES = {"prompts": (100, 30), "preferences": (800, 40), "sft": (400, 20)}
LOADERS = {"prompts": load_prompts, "preferences": load_pairs, "sft": load_demonstrations}


@pytest.mark.parametrize("kind", SIZES)
def test_files_are_read_back_through_the_public_loader(task_folder: Path, kind: str) -> None:
    tokenizer = load_tokenizer(task_folder / "tokenizer")
    for split, rows in zip(("train", "test"), SIZES[kind], strict=True):
        report = LOADERS[kind](str(task_folder / f"{kind}_{split}.jsonl"), tokenizer, LIMITS).report
        assert (report.rows, report.kept, report.truncated_answers) == (rows, rows, 0)


def test_every_response_word_is_one_token(task_folder: Path) -> None:
    tokenizer = load_tokenizer(task_folder / "tokenizer")
    demonstrations = load_demonstrations(str(task_folder / "sft_train.jsonl"), tokenizer, LIMITS).items
    lines = (task_folder / "sft_train.jsonl").read_text().splitlines()
    for demonstration, line in zip(demonstrations, lines, strict=True):
        words = json.loads(line)["messages"][1]["content"].split()
        assert tokenizer.convert_ids_to_tokens(list(demonstration.response_ids)) == [
            *(f"▁{word}" for word in words),
            "</s>",
        ]
        assert 8 <= len(demonstration.response_ids) <= 24


def test_test_prompts_are_held_out(task_folder: Path) -> None:
    def prompts(name: str) -> set[str]:
        rows = [json.loads(line) for line in (task_folder / name).read_text().splitlines()]
        return {row["context_messages"][0]["content"] if "prompts" in name else row["prompt"] for row in rows}

    train = prompts("prompts_train.jsonl")
    test = prompts("prompts_test.jsonl")
    assert len(train) == 100
    assert len(test) == 30
    assert not train & test
    for name in ("sft", "preferences"):
        assert prompts(f"{name}_train.jsonl") <= train
        assert prompts(f"{name}_test.jsonl") <= test


def test_true_return_on_ids_is_the_slow_loop_over_words(task_folder: Path) -> None:
    tokenizer = load_tokenizer(task_folder / "tokenizer")
    reward = TrueReward.load(task_folder / "true_reward.json")
    language = draw_language(7)
    rows = [json.loads(line) for line in (task_folder / "preferences_test.jsonl").read_text().splitlines()]
    pairs = load_pairs(str(task_folder / "preferences_test.jsonl"), tokenizer, LIMITS).items
    for row, pair in zip(rows, pairs, strict=True):
        words = row["chosen"][1]["content"].split()
        (topic,) = [i for i, name in enumerate(TOPICS) if name in row["prompt"].split()]
        expected = language.reward[topic, SHORT.end, WORDS.index(words[0])] - language.token_cost
        for previous, word in pairwise(words):
            expected += language.reward[topic, WORDS.index(previous), WORDS.index(word)] - language.token_cost
        cut = reward.returns(pair.prompt_ids, pair.chosen_ids[:-1])
        assert cut == pytest.approx(expected)
        ended = expected + language.reward[topic, WORDS.index(words[-1]), SHORT.end]
        assert reward.returns(pair.prompt_ids, pair.chosen_ids) == pytest.approx(ended)


def table() -> TrueReward:
    return TrueReward(
        class_of_token={50: 0, 51: 1},
        entries={(0, 6, 10): 1.0, (0, 10, 11): -2.0, (0, 11, 2): 4.0, (1, 6, 10): 8.0},
        token_cost=0.25,
        eos_id=2,
        source_mean=0.0,
        source_sd=1.0,
        scale=1.0,
        seed=0,
        tokenizer_fingerprint="print",
    )


def test_token_rewards_by_hand() -> None:
    assert table().token_rewards((1, 50, 6), (10, 11, 2)) == [0.75, -2.25, 4.0]
    assert table().token_rewards((1, 51, 6), (10, 11)) == [7.75, -0.25]
    assert table().token_rewards((1, 50, 6), (10, 2, 10)) == [0.75, 0.0, 0.0]
    assert table().returns((1, 50, 6), (10, 11, 2)) == 2.5


def test_the_table_survives_the_disk(tmp_path: Path) -> None:
    table().save(tmp_path / "true_reward.json")
    assert TrueReward.load(tmp_path / "true_reward.json") == table()


def test_prompts_without_one_topic_and_bad_tables_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 0"):
        table().returns((1, 6), (10,))
    with pytest.raises(DataError, match="found 2"):
        table().returns((50, 51, 6), (10,))
    with pytest.raises(DataError, match="does not exist"):
        TrueReward.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a true-reward table"):
        TrueReward.load(tmp_path / "bad.json")


def test_labels_follow_the_true_return_and_lengths_do_not_decide(task_folder: Path) -> None:
    tokenizer = load_tokenizer(task_folder / "tokenizer")
    reward = TrueReward.load(task_folder / "true_reward.json")
    pairs = load_pairs(str(task_folder / "preferences_train.jsonl"), tokenizer, LIMITS).items
    chosen = np.array([reward.returns(pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    rejected = np.array([reward.returns(pair.prompt_ids, pair.rejected_ids) for pair in pairs])
    lengths = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    returns = np.stack([chosen, rejected], axis=1).ravel()
    assert reward.source_sd == pytest.approx(returns.std(), rel=0.15)
    assert reward.source_mean == pytest.approx(returns.mean(), abs=0.3)
    assert abs(np.corrcoef(returns, lengths)[0, 1]) < 0.35
    # Bradley-Terry: the better of two answers is chosen with probability sigmoid(difference).
    difference = np.abs(chosen - rejected)
    for pairs_meant in (difference > 0, difference < 1.5):
        expected = (1 / (1 + np.exp(-difference)))[pairs_meant].mean()
        spread = 0.5 / np.sqrt(pairs_meant.sum())
        assert (chosen > rejected)[pairs_meant].mean() == pytest.approx(expected, abs=3 * spread)
        assert 0.6 < expected < 0.95


def test_the_reward_is_sparse_and_a_better_policy_exists(task_folder: Path) -> None:
    language = draw_language(7)
    transitions = language.reward[..., : SHORT.end]
    assert 0.2 < (transitions != 0).mean() < 0.5
    # The source gets nothing from a transition on average; the best next word gets much.
    expected = (language.source * transitions).sum(-1)
    assert np.abs(expected).max() < 1e-5
    assert transitions.max(-1).mean() * 10 > 3 * language.source_sd


def test_model_folders_are_self_contained(task_folder: Path) -> None:
    fingerprint = tokenizer_fingerprint(task_folder / "tokenizer")
    assert TrueReward.load(task_folder / "true_reward.json").tokenizer_fingerprint == fingerprint
    for role in ("policy", "reward", "deep"):
        folder = task_folder / "models" / role
        config = AutoConfig.from_pretrained(folder)
        assert tokenizer_fingerprint(folder) == fingerprint
        assert config.model_type == "llama"
        assert config.vocab_size == len(load_tokenizer(folder)) <= 128
        assert config.vocab_size % 4 == 0
        assert config.eos_token_id == load_tokenizer(folder).eos_token_id


def test_the_same_seed_writes_the_same_files(tmp_path: Path, task_folder: Path) -> None:
    sizes = Sizes(20, 5, 20, 5, 20, 5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_synthetic_task(tmp_path / name, seed, sizes)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(task_folder) for p in task_folder.rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for file in ("preferences_train.jsonl", "true_reward.json"):
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_too_many_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ask for fewer"):
        write_synthetic_task(tmp_path, 0, Sizes(prompts=100_000))
