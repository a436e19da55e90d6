"""Judged answers, of pairs and of rows with a verdict each, and the unrelated answer behind each prompt."""

from pathlib import Path

import pytest
from data.written_rows import EOS, LIMITS, assistant, pair_row, user, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import (
    load_judged,
)
from rto_megatron.errors import DataError


def test_a_pair_gives_a_desirable_and_an_undesirable_answer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [pair_row("the fox", "the dog", "a dog"), pair_row("the dog", "a fox", "fox")]
    loaded = load_judged(write_lines(tmp_path / "pairs.jsonl", rows), tokenizer, LIMITS)
    assert [tokenizer.decode(a.response_ids) for a in loaded.items] == [
        " the dog</s>", " a dog</s>", " a fox</s>", " fox</s>",
    ]  # fmt: skip
    assert [a.is_desirable for a in loaded.items] == [True, False, True, False]
    assert [a.id for a in loaded.items] == ["id of the fox"] * 2 + ["id of the dog"] * 2
    assert tokenizer.decode(loaded.items[1].prompt_ids) == "<s><|user|> the fox<|assistant|>"


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "the fox", "completion": "the dog"},
        {"prompt": [user("the fox")], "completion": [assistant("the dog")]},
        {"prompt": "the fox", "completion": [assistant("the dog")]},
    ],
)
def test_a_verdict_is_a_prompt_a_completion_and_a_label(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, columns: dict[str, object]
) -> None:
    rows = [{**columns, "label": False}, {"prompt": "a", "completion": "b", "label": True, "id": 7}]
    first, second = load_judged(write_lines(tmp_path / "v.jsonl", rows), tokenizer, LIMITS).items
    assert tokenizer.decode(first.prompt_ids) == "<s><|user|> the fox<|assistant|>"
    assert tokenizer.decode(first.response_ids) == " the dog</s>"
    assert (first.is_desirable, second.is_desirable, second.id) == (False, True, "7")


def test_the_unrelated_answer_is_that_of_the_nearest_row_before_with_another_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompts = ["the fox", "the dog", "the dog", "the dog", "write"]
    rows = [
        {"prompt": prompt, "completion": f"answer {number}", "label": True}
        for number, prompt in enumerate(prompts)
    ]
    items = load_judged(write_lines(tmp_path / "v.jsonl", rows), tokenizer, LIMITS).items
    unrelated = [tokenizer.decode(a.unrelated_ids) for a in items]
    # Before the first row comes the last one.
    assert unrelated == [f" answer {number}</s>" for number in (4, 0, 0, 0, 3)]


def test_the_unrelated_answer_of_a_pair_is_the_chosen_one_and_fits_behind_the_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [pair_row("the fox", "the dog " * 30, "a"), pair_row("the dog " * 3, "b", "c")]
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    whole = load_judged(source, tokenizer, LIMITS).items
    assert whole[2].unrelated_ids == whole[3].unrelated_ids == whole[0].response_ids
    assert whole[0].unrelated_ids == whole[1].unrelated_ids == whole[2].response_ids
    length = 30
    for answer in load_judged(source, tokenizer, Limits(20, length, "error")).items:
        assert len(answer.prompt_ids) + len(answer.unrelated_ids) <= length
        assert answer.unrelated_ids[-1] == EOS


@pytest.mark.parametrize("label", [1, "true", 0.0])
def test_a_label_that_is_not_a_truth_value_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, label: object
) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "c", "completion": "d", "label": label},
    ]
    with pytest.raises(DataError, match=r"v\.jsonl:2: column 'label' is .*, expected true or false"):
        load_judged(write_lines(tmp_path / "v.jsonl", rows), tokenizer, LIMITS)


def test_verdicts_on_one_prompt_alone_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for rows in ([pair_row()], [pair_row("x", "a", "b"), pair_row("x", "c", "d")]):
        with pytest.raises(
            DataError, match=r"all rows answer one prompt; the KL baseline of KTO needs another"
        ):
            load_judged(write_lines(tmp_path / "pairs.jsonl", rows), tokenizer, LIMITS)


def test_rows_without_verdicts_say_what_is_expected(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "v.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"expected one of \['chosen', 'label'\] for answers with verdicts"):
        load_judged(source, tokenizer, LIMITS)
