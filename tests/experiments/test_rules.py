"""The program that is the true reward of the rule-following task: judged by hand, and equal to its credit by token."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.errors import DataError
from rto_megatron.experiments.language.prompts import SYSTEM, write_prompts
from rto_megatron.experiments.language.rules import (
    FORBIDDEN,
    asked,
    credit,
    free,
    judge,
    kept,
    with_rule,
    without_rule,
    words_rule,
)
from rto_megatron.rewards.sample import Json, Sample

THIRD = 1 / 3
# Rule, text, and the share that somebody who reads both would give.
JUDGED: tuple[tuple[Mapping[str, Json], str, float], ...] = (
    (words_rule(2, 4), "The sea is old.", 1.0),
    (words_rule(2, 4), "Isn't the deep-blue sea very old?", 1 - 2 * THIRD),
    (words_rule(2, 4), "Sea.", 1 - THIRD),
    (words_rule(4, 6), "", 0.0),
    (words_rule(1, 2), "one two three four five six seven", 0.0),
    (without_rule("commas"), "Old, deep, and blue", 1 - 2 * THIRD),
    (without_rule("the"), "The other theme is the sea", 1 - 2 * THIRD),
    (without_rule("and"), "sand and And", 1 - 2 * THIRD),
    (without_rule("capitals"), "The sea. I see Paris", 0.0),
    (without_rule("capitals"), "the sea, 3 Ålands", 1 - THIRD),
    (without_rule("long words"), "Seven letters: exactly seven lettersx", 1.0 - THIRD),
    (with_rule("water"), "Water!", 1.0),
    (with_rule("water"), "waters", 0.0),
)


def sample(tokens: tuple[str, ...], rules: list[Json], finish_reason: str = "stop") -> Sample:
    return Sample(
        "p", "", "".join(tokens), (), tuple(range(len(tokens))), tokens, finish_reason, {"rules": rules}
    )


@pytest.mark.parametrize(("rule", "text", "share"), JUDGED)
def test_a_rule_is_met_as_far_as_a_reader_would_say(
    rule: Mapping[str, Json], text: str, share: float
) -> None:
    verdict = judge(text, rule)
    assert verdict.share == pytest.approx(share)
    assert verdict.free + sum(amount for _, amount in verdict.paid) == pytest.approx(share)


def test_the_token_that_breaks_or_keeps_a_rule_gets_its_credit() -> None:
    rules: list[Json] = [words_rule(6, 9), without_rule("commas"), with_rule("water")]
    tokens = ("The", " sea", ",", " wa", "ter", ",", " salt", "<end>")
    paid = credit(sample(tokens, rules))
    # Two of six words are missing where it ends; each of three rules is a third of the reward.
    assert paid == pytest.approx([0, 0, -THIRD / 3, 0, THIRD, -THIRD / 3, 0, -2 * THIRD / 3])
    assert kept(sample(tokens, rules)) == pytest.approx((THIRD + THIRD + 1) / 3)
    assert free(sample(tokens, rules)) == pytest.approx(2 / 3)


def test_words_beyond_the_most_are_charged_where_they_end_and_a_cut_text_has_no_end() -> None:
    rules: list[Json] = [words_rule(1, 2)]
    assert credit(sample((" a", " b", " cc", "c", " d"), rules, "length")) == pytest.approx(
        [0, 0, 0, -THIRD, -THIRD]
    )
    assert credit(sample((" a",), [words_rule(2, 3)], "length")) == pytest.approx([-THIRD])


@pytest.mark.parametrize("row", JUDGED)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_credit_adds_up_to_the_reward_however_a_text_is_cut_into_tokens(
    row: tuple[Mapping[str, Json], str, float], size: int
) -> None:
    rule, text, share = row
    tokens = (*(text[start : start + size] for start in range(0, len(text), size)), "<end>")
    one = sample(tokens, [dict(rule), with_rule("nowhere")])
    assert sum(credit(one)) + free(one) == pytest.approx(kept(one)) == pytest.approx(share / 2)


@pytest.mark.parametrize("rule", [{"kind": "without", "what": "verbs"}, {"kind": "sonnet"}])
def test_an_unknown_rule_and_a_row_without_rules_are_refused(rule: dict[str, Json]) -> None:
    with pytest.raises(DataError, match="expected kind words, without"):
        judge("text", rule)
    with pytest.raises(DataError, match="write prompts by `rto rules`"):
        kept(Sample("p7", "", "a", (), (1,), ("a",), "stop", {}))


def test_prompts_state_their_rules_and_none_stands_in_both_files(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["rules", str(tmp_path), "--train", "60", "--test", "30", "--seed", "3"])
    assert result.exit_code == 0, result.output
    train, test = (
        [json.loads(line) for line in (tmp_path / f"prompts_{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test")
    )
    assert (len(train), len(test)) == (60, 30)
    texts = [row["prompt"][1]["content"] for row in (*train, *test)]
    assert len(set(texts)) == 90 == len({row["prompt_id"] for row in (*train, *test)})
    assert {row["prompt"][0]["content"] for row in train} == {SYSTEM}
    for row, text in zip((*train, *test), texts, strict=True):
        assert all(asked(rule).lower() in text.lower() for rule in row["rules"]), (row, text)
    assert {row["rules"][1]["what"] for row in train} == set(FORBIDDEN)


def test_more_prompts_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different ones"):
        write_prompts(tmp_path, 10**7, 1, seed=0)


def test_prompts_of_another_seed_are_not_written_over(tmp_path: Path) -> None:
    command = ["rules", str(tmp_path), "--train", "5", "--test", "3"]
    CliRunner().invoke(app, command, catch_exceptions=False)
    held = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"prompts_train\.jsonl holds other prompts; name another folder"):
        CliRunner().invoke(app, [*command, "--seed", "2"], catch_exceptions=False)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == held
    (tmp_path / "prompts_test.jsonl").rename(tmp_path / ".partial_prompts_test.jsonl")  # it was stopped
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == held
    (tmp_path / "prompts_test.jsonl").write_text(held[tmp_path / "prompts_test.jsonl"][:40])
    with pytest.raises(DataError, match=r"prompts_test\.jsonl holds other prompts"):
        CliRunner().invoke(app, command, catch_exceptions=False)
