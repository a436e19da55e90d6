"""Preference pairs of rated responses: who is paired with whom, what is left out, and how often a label is turned."""

import json
import math
from pathlib import Path

import pytest
from data.written_rows import write_lines
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.data.labelled_pairs import write_pairs
from rto_megatron.data.layouts import PAIRS, PROMPTS
from rto_megatron.data.row import Row
from rto_megatron.data.sources import read_rows
from rto_megatron.data.turns import conversation_of
from rto_megatron.errors import DataError


def answer(prompt_id: str, text: str, reward: float, finish_reason: str = "stop") -> dict[str, object]:
    return {"prompt_id": prompt_id, "response": text, "finish_reason": finish_reason, "reward/rules": reward}


def prompts(folder: Path, count: int) -> str:
    rows = [{"prompt_id": f"p{number}", "prompt": f"question {number}"} for number in range(count)]
    return write_lines(folder / "prompts.jsonl", rows)


def test_pairs_are_read_as_any_others_and_the_better_one_is_chosen(tmp_path: Path) -> None:
    rows = [
        answer("p1", "good", 1.0), answer("p0", "bad", 0.1), answer("p1", "poor", 0.5), answer("p0", "fine", 0.4),
        answer("p0", "third", 0.0),
    ]  # fmt: skip
    rated, out = write_lines(tmp_path / "evaluation.jsonl", rows), tmp_path / "new/pairs.jsonl"
    command = [
        "data",
        "pairs",
        rated,
        "--prompts",
        prompts(tmp_path, 2),
        "--out",
        str(out),
        "--by",
        "reward/rules",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "2 pairs, 0.0% with the worse" in result.output, result.output
    said = [PAIRS.read(row).value for row in read_rows(str(out))]
    assert [[turn.content for turn in chosen] for chosen, _ in said] == [
        ["question 1", "good"],
        ["question 0", "fine"],
    ]
    assert [rejected[-1].content for _, rejected in said] == ["poor", "bad"]
    assert json.loads(out.read_text().splitlines()[0])["rejected_reward"] == 0.5


def test_what_no_label_can_be_given_to_is_left_out_and_counted(tmp_path: Path) -> None:
    twos = [
        (answer("p0", "a", 1.0), answer("p0", "b", 1.0)),
        (answer("p1", "a", 1.0, "length"), answer("p1", "b", 0.0)),
        (answer("p2", " ", 1.0), answer("p2", "b", 0.0)),
        (answer("p3", "a", 1.0), answer("p3", "b", 0.0, "length")),
    ]
    rated = write_lines(tmp_path / "evaluation.jsonl", [one for two in twos for one in two])
    counts = write_pairs(rated, prompts(tmp_path, 4), tmp_path / "pairs.jsonl", "reward/rules", 0.0, seed=0)
    assert (counts.written, counts.ties, counts.cut, counts.empty) == (1, 1, 1, 1)


def test_prompts_without_ids_are_found_by_a_relative_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run knows such a prompt by its file and line, and makes the names of its recipe absolute."""
    asked = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "question"}])
    rated = write_lines(
        tmp_path / "evaluation.jsonl", [answer(f"{asked}:1", text, len(text)) for text in ("a", "ab")]
    )
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.jsonl", "./prompts.jsonl", "prompts*.jsonl", asked):
        assert write_pairs(rated, name, tmp_path / "pairs.jsonl", "reward/rules", 0.0, seed=0).written == 1


def test_what_prompts_say_to_the_chat_template_stands_beside_their_pairs(tmp_path: Path) -> None:
    beside: dict[str, object] = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    columns = {"prompt_id": "p0", "prompt": "question", "system": "be short", **beside}
    asked = write_lines(tmp_path / "prompts.jsonl", [columns])
    rated = write_lines(
        tmp_path / "evaluation.jsonl", [answer("p0", text, len(text)) for text in ("a", "ab")]
    )
    write_pairs(rated, asked, tmp_path / "pairs.jsonl", "reward/rules", 0.0, seed=0)
    (row,) = read_rows(str(tmp_path / "pairs.jsonl"))
    prompt = conversation_of(Row(asked, columns), PROMPTS.read(Row(asked, columns)).value)
    chosen, _ = PAIRS.read(row).value
    assert conversation_of(row, chosen).prompt == prompt
    assert prompt.tools and prompt.arguments and prompt.roles == ["system", "user"]


def test_labels_are_turned_as_often_as_bradley_and_terry_say(tmp_path: Path) -> None:
    count, lead, noise = 4000, 0.3, 0.2
    rows = [
        one for n in range(count) for one in (answer(f"p{n}", "a", 0.5), answer(f"p{n}", "b", 0.5 + lead))
    ]
    rated, asked = write_lines(tmp_path / "evaluation.jsonl", rows), prompts(tmp_path, count)
    first = write_pairs(rated, asked, tmp_path / "1.jsonl", "reward/rules", noise, 1)
    write_pairs(rated, asked, tmp_path / "2.jsonl", "reward/rules", noise, 2)
    expected = 1 / (1 + math.exp(lead / noise))
    error = math.sqrt(expected * (1 - expected) / count)
    assert abs(first.turned / count - expected) < 4 * error
    assert (tmp_path / "1.jsonl").read_bytes() != (tmp_path / "2.jsonl").read_bytes()
    write_pairs(rated, asked, tmp_path / "again.jsonl", "reward/rules", noise, 1)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


def test_pairs_that_a_reader_has_open_are_replaced_as_a_whole(tmp_path: Path) -> None:
    """A writing that is stopped leaves no half of them, which a resumed experiment would take for all."""
    rated = write_lines(tmp_path / "evaluation.jsonl", [answer("p0", "a", 1.0), answer("p0", "b", 0.0)])
    out = tmp_path / "pairs.jsonl"
    out.write_text("old\n")
    with out.open() as reader:
        write_pairs(rated, prompts(tmp_path, 1), out, "reward/rules", 0.0, seed=0)
        assert reader.read() == "old\n"
    assert json.loads(out.read_text())["chosen_reward"] == 1.0


def test_a_certain_label_does_not_overflow(tmp_path: Path) -> None:
    rated = write_lines(tmp_path / "evaluation.jsonl", [answer("p0", "a", 1e6), answer("p0", "b", -1e6)])
    assert write_pairs(rated, prompts(tmp_path, 1), tmp_path / "p.jsonl", "reward/rules", 1e-3, 0).turned == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([answer("p9", "a", 1.0), answer("p9", "b", 0.0)], "has no prompt 'p9'"),
        ([{"prompt_id": "p0", "response": "a", "reward/rule": 1.0}], "did you mean reward/rule"),
        ([{"response": "a", "reward/rules": 1.0}], "has the columns prompt_id and response"),
        ([answer("p0", "a", 1.0)], "no pair is left"),
        (
            [{**answer("p0", "a", 1.0), "prompt": "x"}, {**answer("p0", "b", 0.0), "prompt": "y"}],
            "evaluation.jsonl:2: its prompt_id is 'p0', as that of another prompt",
        ),
    ],
)
def test_what_cannot_be_paired_is_said(rows: list[dict[str, object]], message: str, tmp_path: Path) -> None:
    rated, out = write_lines(tmp_path / "evaluation.jsonl", rows), tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match=message):
        write_pairs(rated, prompts(tmp_path, 2), out, "reward/rules", 0.0, seed=0)
    assert not out.exists()


def test_answers_that_nothing_has_rated_are_told_what_rates_them(tmp_path: Path) -> None:
    rated = write_lines(tmp_path / "answers.jsonl", [{"prompt_id": "p0", "response": "a"}] * 2)
    with pytest.raises(DataError, match=r"expected a number; no column has one.*stage evaluate"):
        write_pairs(rated, prompts(tmp_path, 1), tmp_path / "pairs.jsonl", "reward/rules", 0.0, seed=0)
