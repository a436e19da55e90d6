"""What a row of each layout becomes, and what is said of files and rows that cannot be read."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.written_rows import LIMITS, assistant, pair_row, user, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.loader import (
    load_demonstrations,
    load_pairs,
    load_prompts,
)
from rto_megatron.errors import DataError


def test_a_pair_is_the_template_cut_at_the_answer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [pair_row()])
    (pair,) = load_pairs(source, tokenizer, LIMITS).items
    assert tokenizer.decode(pair.prompt_ids) == "<s><|user|> the fox<|assistant|>"
    assert tokenizer.decode(pair.chosen_ids) == " the dog</s>"
    assert tokenizer.decode(pair.rejected_ids) == " a dog</s>"
    assert pair.id == "id of the fox"
    assert pair.margin == 0.0
    whole = tokenizer.apply_chat_template([user("the fox"), assistant("the dog")], return_dict=False)
    assert [*pair.prompt_ids, *pair.chosen_ids] == whole


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_format_gives_the_same_items(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, suffix: str
) -> None:
    rows = [pair_row("the fox"), pair_row("東京 code:\n  x = 1", "naïve 😀", "b")]
    plain = write_lines(tmp_path / "plain.jsonl", rows)
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl.gz":
        path.write_bytes(gzip.compress(Path(plain).read_bytes()))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = Path(plain)
    loaded = load_pairs(str(path), tokenizer, LIMITS)
    assert loaded.items == load_pairs(plain, tokenizer, LIMITS).items
    assert loaded.report.rows == loaded.report.kept == 2
    assert tokenizer.decode(loaded.items[1].chosen_ids) == " naïve 😀</s>"


@pytest.mark.parametrize(
    ("extra", "margin"),
    [({"margin": 1.5}, 1.5), ({"score_chosen": 8, "score_rejected": 6.5}, 1.5), ({}, 0.0)],
)
def test_margin_of_a_pair(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, extra: dict[str, float], margin: float
) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [{**pair_row(), **extra}])
    assert load_pairs(source, tokenizer, LIMITS, has_margins=True).items[0].margin == margin


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("the fox"), assistant("the dog")]},
        {"messages": [user("the fox"), assistant("the dog")], "chosen": [user("no"), assistant("no")]},
        pair_row(),
        {"prompt": "the fox", "response": "the dog"},
    ],
)
def test_demonstration_layouts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, object]
) -> None:
    source = write_lines(tmp_path / "sft.jsonl", [row])
    (demonstration,) = load_demonstrations(source, tokenizer, LIMITS).items
    assert tokenizer.decode(demonstration.prompt_ids) == "<s><|user|> the fox<|assistant|>"
    assert tokenizer.decode(demonstration.response_ids) == " the dog</s>"


@pytest.mark.parametrize(
    "row", [{"context_messages": [user("the fox")]}, {"prompt": "the fox"}, {"prompt": [user("the fox")]}]
)
def test_prompt_layouts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, object]) -> None:
    source = write_lines(tmp_path / "prompts.jsonl", [row])
    (prompt,) = load_prompts(source, tokenizer, LIMITS).items
    assert tokenizer.decode(prompt.token_ids) == "<s><|user|> the fox<|assistant|>"
    assert prompt.id == f"{source}:1"


def test_earlier_turns_belong_to_the_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    source = write_lines(tmp_path / "sft.jsonl", [{"messages": turns}])
    (demonstration,) = load_demonstrations(source, tokenizer, LIMITS).items
    assert tokenizer.decode(demonstration.prompt_ids) == (
        "<s><|user|> a<|assistant|> b</s><|user|> c<|assistant|>"
    )
    assert tokenizer.decode(demonstration.response_ids) == " d</s>"


def test_answers_end_at_their_first_end_of_sequence(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": "q", "response": "the dog</s>\n and more"}, {"prompt": "q", "response": "the dog"}]
    loaded = load_demonstrations(write_lines(tmp_path / "s.jsonl", rows), tokenizer, LIMITS)
    assert loaded.items[0].response_ids == loaded.items[1].response_ids
    assert loaded.report.answers_cut_at_eos == 1


def test_identical_answers_are_kept_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [pair_row(), pair_row(chosen="b", rejected="b")]
    loaded = load_pairs(write_lines(tmp_path / "pairs.jsonl", rows), tokenizer, LIMITS)
    assert (loaded.report.kept, loaded.report.identical_pairs) == (2, 1)


def test_max_rows_reads_no_further(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert load_prompts(str(path), tokenizer, LIMITS, max_rows=2).report.rows == 2


BAD_PAIRS = {
    "not valid JSON": '{"chosen": ',
    "found a JSON list": "[1, 2]",
    r"'rejected' is missing, found \['chosen'\]": json.dumps({"chosen": [user("a"), assistant("b")]}),
    r"'chosen' is missing, found \['better', 'worse'\]": json.dumps({"better": 1, "worse": 2}),
    "message 1 .assistant. of 'chosen' is empty": json.dumps(pair_row(chosen=" ")),
    "do not answer the same prompt": json.dumps(
        {**pair_row(), "prompt": None, "rejected": [user("else"), assistant("b")]}
    ),
    "expected a list of messages": json.dumps({**pair_row(), "chosen": "text"}),
    "message 0 of 'chosen' is": json.dumps({**pair_row(), "chosen": [{"role": "user"}]}),
    "a last message of the assistant": json.dumps({**pair_row(), "chosen": [user("a"), user("b")]}),
    "'margin' is 'big', expected a finite number": json.dumps({**pair_row(), "margin": "big"}),
}


@pytest.mark.parametrize("message", BAD_PAIRS)
def test_a_bad_row_is_named_by_file_and_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(pair_row()) + "\n\n" + BAD_PAIRS[message] + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: .*{message}"):
        load_pairs(str(path), tokenizer, LIMITS, has_margins=True)


def test_wrong_prompt_columns_say_what_is_expected(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "p.jsonl", [{"instruction": "a"}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: found the columns \['instruction'\], expected one of"):
        load_prompts(source, tokenizer, LIMITS)
    with pytest.raises(DataError, match="for demonstrations"):
        load_demonstrations(source, tokenizer, LIMITS)


def test_a_prompt_that_is_answered_already_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "p.jsonl", [{"context_messages": [user("a"), assistant("b")]}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: .* ends with an assistant message"):
        load_prompts(source, tokenizer, LIMITS)


def test_sources_that_cannot_be_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_prompts(str(tmp_path / "missing.jsonl"), tokenizer, LIMITS)
    with pytest.raises(DataError, match="owner/name:split"):
        load_prompts("some.table", tokenizer, LIMITS)
    rows = "".join(json.dumps({"prompt": f"fox {i}"}) + "\n" for i in range(500)).encode()
    truncated = tmp_path / "cut.jsonl.gz"
    truncated.write_bytes(gzip.compress(rows)[:-40])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz is not a complete gzip file"):
        load_prompts(str(truncated), tokenizer, LIMITS)
    (tmp_path / "fake.jsonl.gz").write_bytes(rows)
    with pytest.raises(DataError, match=r"for gzip, but is JSON objects, one a line; rename it to \.jsonl"):
        load_prompts(str(tmp_path / "fake.jsonl.gz"), tokenizer, LIMITS)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad\.parquet is not a complete parquet file"):
        load_prompts(str(tmp_path / "bad.parquet"), tokenizer, LIMITS)
    (tmp_path / "bad.json").write_text('[{"prompt": "a"},\n oops]')
    with pytest.raises(DataError, match=r"bad\.json:2: not valid JSON"):
        load_prompts(str(tmp_path / "bad.json"), tokenizer, LIMITS)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl is not UTF-8"):
        load_prompts(str(tmp_path / "latin.jsonl"), tokenizer, LIMITS)


def test_an_unreachable_hub_data_set_is_named(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'nobody/nothing', split 'train', could not be loaded"):
        load_prompts("nobody/nothing:train", tokenizer, LIMITS)
