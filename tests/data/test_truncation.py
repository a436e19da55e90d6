"""Limits: overlong prompts and long answers are cut, dropped or refused as asked, and counted."""

from pathlib import Path

import pytest
from data.written_rows import EOS, LIMITS, pair_row, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import (
    load_demonstrations,
    load_judged,
    load_pairs,
    load_prompts,
    load_texts,
)
from rto_megatron.errors import DataError, RecipeError


def test_a_long_answer_is_cut_and_does_not_end_where_it_is_learnt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "sft.jsonl", [{"prompt": "the fox", "response": "the dog " * 30}])
    whole = load_demonstrations(source, tokenizer, LIMITS).items[0]
    limits = Limits(max_prompt_tokens=20, max_length=20, overlong="error")
    loaded = load_demonstrations(source, tokenizer, limits)
    (cut,) = loaded.items
    assert len(cut.prompt_ids) + len(cut.response_ids) == 20
    assert cut.response_ids == whole.response_ids[: len(cut.response_ids)] and EOS not in cut.response_ids
    assert loaded.report.truncated_answers == 1
    assert loaded.report.truncated_answers_closed == 0


def test_a_long_answer_of_a_pair_is_cut_and_ends(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The released code does so too: the reward model reads its score at the end."""
    row = pair_row(chosen="the dog " * 30)
    whole = load_pairs(write_lines(tmp_path / "pairs.jsonl", [row]), tokenizer, LIMITS).items[0]
    loaded = load_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, Limits(20, 20, "error"))
    (cut,) = loaded.items
    assert cut.chosen_ids == (*whole.chosen_ids[: len(cut.chosen_ids) - 1], EOS)
    assert len(cut.prompt_ids) + len(cut.chosen_ids) == 20
    assert loaded.report.truncated_answers == loaded.report.truncated_answers_closed == 1
    assert "1 truncated answers closed" in loaded.report.summary()


def test_an_answer_that_just_fits_is_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "sft.jsonl", [{"prompt": "the fox", "response": "the dog " * 5}])
    whole = load_demonstrations(source, tokenizer, LIMITS).items[0]
    length = len(whole.prompt_ids) + len(whole.response_ids)
    loaded = load_demonstrations(source, tokenizer, Limits(20, length, "error"))
    assert loaded.items == (whole,)
    assert loaded.report.truncated_answers == 0


def test_overlong_prompts_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", [{"prompt": "the fox"}, {"prompt": "the fox " * 50}])
    loaded = load_prompts(source, tokenizer, Limits(20, 400, "drop"))
    assert len(loaded.items) == 1
    assert loaded.report.dropped == 1
    lines = loaded.report.summary().splitlines()
    assert lines == [f"{source}: 2 rows read, 1 kept, 1 dropped", "  layout: prompt (2 rows)"]


def test_overlong_prompt_error_names_line_and_limit(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "p.jsonl", [{"prompt": "the fox"}, {"prompt": "the fox " * 50}])
    with pytest.raises(DataError, match=r"p\.jsonl:2: the prompt has \d+ tokens, over the limit of 20"):
        load_prompts(source, tokenizer, Limits(20, 400, "error"))


def test_left_truncation_keeps_the_start_token_and_the_header(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "p.jsonl", [{"prompt": "the fox " * 50}])
    whole = load_prompts(source, tokenizer, LIMITS).items[0].token_ids
    loaded = load_prompts(source, tokenizer, Limits(20, 400, "truncate_left"))
    assert loaded.items[0].token_ids == (whole[0], *whole[-19:])
    assert loaded.report.truncated_prompts == 1


def test_the_prompt_of_a_pair_is_counted_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [*(pair_row(f"{start} fox " * 50) for start in ("the", "a")), pair_row("short")]
    source = write_lines(tmp_path / "p.jsonl", rows)
    limits = Limits(20, 400, "truncate_left")
    for report in (
        load_pairs(source, tokenizer, limits).report,
        load_judged(source, tokenizer, limits).report,
    ):
        assert (report.rows, report.truncated_prompts) == (3, 2)


def test_a_prompt_leaves_room_for_an_answer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [pair_row("the fox " * 50)])
    (pair,) = load_pairs(source, tokenizer, Limits(100, 20, "truncate_left")).items
    assert len(pair.prompt_ids) == 18
    assert [len(pair.chosen_ids), pair.chosen_ids[-1]] == [2, EOS]


def test_limits_without_room_are_refused() -> None:
    with pytest.raises(RecipeError, match="max_length = 2"):
        Limits(100, 2, "drop")


def test_no_prompts_left_is_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", [{"prompt": "the fox " * 50}])
    with pytest.raises(DataError, match="no rows to use; 1 read, 1 dropped"):
        load_prompts(source, tokenizer, Limits(20, 400, "drop"))


def test_a_pair_whose_prompt_is_overlong_is_dropped_with_both_answers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [pair_row("a"), pair_row("the fox " * 50), pair_row("b")]
    loaded = load_judged(write_lines(tmp_path / "p.jsonl", rows), tokenizer, Limits(20, 400, "drop"))
    assert [a.id for a in loaded.items] == ["id of a", "id of a", "id of b", "id of b"]
    assert (loaded.report.rows, loaded.report.kept, loaded.report.dropped) == (3, 2, 1)


def test_a_long_text_is_cut_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", [{"text": "the fox " * 30}, {"text": "the fox"}])
    whole = load_texts(source, tokenizer, LIMITS).items[0]
    loaded = load_texts(source, tokenizer, Limits(20, 24, "error"))
    cut = loaded.items[0]
    assert (*cut.prompt_ids, *cut.response_ids) == (*whole.prompt_ids, *whole.response_ids)[:24]
    assert loaded.report.truncated_answers == 1
