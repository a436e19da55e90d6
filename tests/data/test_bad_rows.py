"""Rows that cannot be used are told together, or dropped and counted; what a stage does not read is not judged."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.written_rows import demonstration, pair, turns, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_demonstrations, load_judged, load_pairs, load_prompts, load_texts
from rto_megatron.errors import DataError

STRICT = Limits(200, 400, "error")
LENIENT = Limits(200, 400, "error", bad_rows="drop")
GOOD = demonstration("the dog")


def refusal(load: Callable[..., object], *arguments: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(*arguments)
    return str(caught.value).splitlines()


def test_all_bad_rows_stand_in_one_message_with_their_lines(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lines = [json.dumps(row) for row in (GOOD, demonstration(""), GOOD, {"messages": []}, demonstration(" "))]
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join([*lines, "{broken", "", "[1]"]) + "\n")
    heading, *told = refusal(load_demonstrations, str(path), tokenizer, STRICT)
    assert f"{path}: 5 of the 7 rows that were read cannot be used" in heading
    assert "data.bad_rows=drop" in heading
    assert told[0] == f"  {path}:2: message 1 (assistant) of 'messages' is empty; remove the row; alike: 5"
    assert told[1].startswith(f"  {path}:4: column 'messages' is []")
    assert told[2].startswith(f"  {path}:6: not valid JSON")
    assert told[3].startswith(f"  {path}:8: found a JSON list")


def test_many_bad_rows_are_counted_and_the_first_are_shown(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "sft.jsonl", [GOOD, *({"messages": number} for number in range(60))])
    heading, *told = refusal(load_demonstrations, source, tokenizer, STRICT)
    assert "60 of the 61 rows" in heading
    assert (len(told), told[-1]) == (21, "  and 40 more rows")
    alike = write_lines(tmp_path / "alike.jsonl", [demonstration("")] * 60)
    heading, line = refusal(load_demonstrations, alike, tokenizer, STRICT)
    assert "data.bad_rows" not in heading  # nothing would be left
    assert line.endswith(f"alike: {', '.join(map(str, range(2, 22)))} and 39 more")


def test_dropped_bad_rows_are_counted_with_the_reasons_of_the_first(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    bad = [{"messages": number} for number in range(5)]
    source = write_lines(tmp_path / "sft.jsonl", [GOOD, *bad, demonstration("a dog")])
    loaded = load_demonstrations(source, tokenizer, LENIENT)
    assert [tokenizer.decode(item.response_ids) for item in loaded.items] == [" the dog</s>", " a dog</s>"]
    report = loaded.report
    assert (report.rows, report.kept, report.dropped, report.bad_rows) == (7, 2, 0, 5)
    summary, *reasons = report.summary().splitlines()
    assert summary == f"{source}: 7 rows read, 2 kept, 5 bad rows"
    assert [reason.split(": ")[0] for reason in reasons[:3]] == [f"  {source}:{line}" for line in (2, 3, 4)]
    assert reasons[3:] == ["  and 2 more rows", "  layout: messages (2 rows)"]


def test_nothing_left_names_the_reasons(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "sft.jsonl", [demonstration("")] * 3)
    heading, reason = refusal(load_demonstrations, source, tokenizer, LENIENT)
    assert heading == f"{source}: no rows to use; 3 read, 3 bad:"
    assert (
        reason == f"  {source}:1: message 1 (assistant) of 'messages' is empty; remove the row; alike: 2, 3"
    )


def test_a_prompt_over_its_limit_stays_an_error_where_that_is_asked_for(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": "the fox"}, {"prompt": 3}, {"prompt": "the fox " * 60}]
    source = write_lines(tmp_path / "p.jsonl", rows)
    heading, line = refusal(load_prompts, source, tokenizer, Limits(20, 400, "error", bad_rows="drop"))
    assert "1 of the 3 rows" in heading and "data.bad_rows" not in heading
    assert line.startswith(f"  {source}:3: the prompt has")


@pytest.mark.parametrize(
    "columns",
    [
        {"score_chosen": None, "score_rejected": None},
        {"margin": math.nan},
        {"margin": "big", "label": "yes", "messages": "else", "prompt_id": None},
    ],
)
def test_columns_that_no_stage_reads_are_not_judged(
    columns: dict[str, object], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [pair(**columns)])
    (item,) = load_pairs(source, tokenizer, STRICT).items
    assert (item.margin, item.id) == (0.0, f"{source}:1")


@pytest.mark.parametrize(
    "columns",
    [
        *({"margin": bad} for bad in (math.nan, math.inf, -math.inf, 10**400, 1e39, True)),
        {"score_chosen": math.nan, "score_rejected": 1.0},
    ],
)
def test_margins_that_are_no_finite_numbers_are_refused_where_they_are_read(
    columns: dict[str, object], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [pair(margin=1.0), pair(**columns)])
    _, line = refusal(partial(load_pairs, has_margins=True), source, tokenizer, STRICT)
    assert re.match(rf"  {source}:2: column '(margin|score_chosen)' is .*, expected a finite number", line)


def test_pairs_without_a_margin_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [pair(margin=1.5), pair(margin=None), pair(margin=None, score_chosen=2, score_rejected=1)]
    loaded = load_pairs(write_lines(tmp_path / "p.jsonl", rows), tokenizer, STRICT, has_margins=True)
    assert [item.margin for item in loaded.items] == [1.5, 0.0, 1.0]
    assert loaded.report.pairs_without_margin == 1


def test_null_columns_are_absent_columns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    # What a union of three tables looks like.
    rows = [
        {"messages": turns("a", "b")},
        {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
        {"prompt": "a", "response": "b"},
    ]
    path = tmp_path / "union.parquet"
    pyarrow.parquet.write_table(
        pyarrow.concat_tables([pyarrow.Table.from_pylist([row]) for row in rows], promote_options="default"),
        path,
    )
    answers = [item.response_ids for item in load_demonstrations(str(path), tokenizer, STRICT).items]
    assert len(answers) == 3 and len(set(answers)) == 1
    verdict = {"prompt": "a", "completion": "b", "label": None}
    _, line = refusal(load_judged, write_lines(tmp_path / "k.jsonl", [verdict]), tokenizer, STRICT)
    assert "expected one of ['chosen', 'label']" in line and "a null is no column" in line


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (load_demonstrations, demonstration("cut \ud83d")),
        (load_prompts, {"prompt": "cut \ud83d"}),
        (load_texts, {"text": "cut \ud83d"}),
        (load_pairs, {"chosen": turns("a", "cut \ud83d"), "rejected": turns("a", "b")}),
    ],
)
def test_half_a_character_is_named_with_its_row(
    load: Callable[..., object], row: dict[str, object], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [row])
    _, line = refusal(load, source, tokenizer, STRICT)
    assert line.startswith(f"  {source}:1: the text holds a lone surrogate, \\ud83d, behind ")
    unread = write_lines(tmp_path / "unread.jsonl", [{**GOOD, "notes": "cut \ud83d"}])
    assert load_demonstrations(unread, tokenizer, STRICT).report.kept == 1


def test_columns_beside_those_that_are_read_may_hold_anything(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # Sets often carry the columns of their source beside those that are read.
    row = {**demonstration("the dog"), "instruction": "the fox", "output": None, "notes": [1], "text": 3}
    loaded = load_demonstrations(write_lines(tmp_path / "rows.jsonl", [row]), tokenizer, STRICT)
    assert loaded.report.kept == 1
