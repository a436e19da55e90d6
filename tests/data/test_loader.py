import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.written_rows import write_lines
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import (
    load_demonstrations,
    load_judged,
    load_pairs,
    load_prompts,
    load_texts,
)
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import DataError, RecipeError

LIMITS = Limits(max_prompt_tokens=200, max_length=400, overlong="error")
EOS = 2


@pytest.fixture
def bos_tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer like Llama's: every text begins with the beginning-of-sequence token."""
    tokenizer = load_tokenizer(tokenizer_folder)
    start = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start[0]} $A", special_tokens=[start]
    )
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair_row(prompt: str = "the fox", chosen: str = "the dog", rejected: str = "a dog") -> dict[str, object]:
    return {
        "prompt": prompt,
        "prompt_id": f"id of {prompt}",
        "chosen": [user(prompt), assistant(chosen)],
        "rejected": [user(prompt), assistant(rejected)],
    }


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


def test_no_prompts_left_is_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", [{"prompt": "the fox " * 50}])
    with pytest.raises(DataError, match="no rows to use; 1 read, 1 dropped"):
        load_prompts(source, tokenizer, Limits(20, 400, "drop"))


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


def test_a_pair_whose_prompt_is_overlong_is_dropped_with_both_answers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [pair_row("a"), pair_row("the fox " * 50), pair_row("b")]
    loaded = load_judged(write_lines(tmp_path / "p.jsonl", rows), tokenizer, Limits(20, 400, "drop"))
    assert [a.id for a in loaded.items] == ["id of a", "id of a", "id of b", "id of b"]
    assert (loaded.report.rows, loaded.report.kept, loaded.report.dropped) == (3, 2, 1)


def test_every_token_of_a_text_but_the_first_is_predicted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "t.jsonl", [{"text": "the quick brown fox"}])
    (text,) = load_texts(source, tokenizer, LIMITS).items
    assert [*text.prompt_ids, *text.response_ids] == tokenizer.encode("the quick brown fox")
    assert len(text.prompt_ids) == 1
    assert EOS not in text.response_ids  # nothing says that a text is over


def test_a_start_token_is_kept_where_the_tokenizer_has_one(
    bos_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": "the quick brown fox"}, {"text": "a", "id": "short"}, {"text": "<s>the fox"}]
    first, second, third = load_texts(write_lines(tmp_path / "t.jsonl", rows), bos_tokenizer, LIMITS).items
    for text in (first, second, third):
        assert text.prompt_ids == (bos_tokenizer.bos_token_id,)
        assert bos_tokenizer.bos_token_id not in text.response_ids
    assert bos_tokenizer.decode(first.response_ids) == "the quick brown fox"
    assert (second.id, len(second.response_ids)) == ("short", 1)


def test_a_long_text_is_cut_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", [{"text": "the fox " * 30}, {"text": "the fox"}])
    whole = load_texts(source, tokenizer, LIMITS).items[0]
    loaded = load_texts(source, tokenizer, Limits(20, 24, "error"))
    cut = loaded.items[0]
    assert (*cut.prompt_ids, *cut.response_ids) == (*whole.prompt_ids, *whole.response_ids)[:24]
    assert loaded.report.truncated_answers == 1


def test_a_text_without_a_token_to_predict_is_dropped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": "a"}, {"text": "the fox sleeps"}]
    loaded = load_texts(write_lines(tmp_path / "t.jsonl", rows), tokenizer, LIMITS)
    (text,) = loaded.items
    assert tokenizer.decode([*text.prompt_ids, *text.response_ids]) == "the fox sleeps"
    assert (loaded.report.rows, loaded.report.kept) == (2, 1)


@pytest.mark.parametrize("row", [{"text": "  "}, {"text": 3}])
def test_a_text_that_is_none_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, object]
) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: column 'text' is .* expected text that is not empty"):
        load_texts(write_lines(tmp_path / "t.jsonl", [row]), tokenizer, LIMITS)
    with pytest.raises(DataError, match=r"expected one of \['text'\] for texts"):
        load_texts(write_lines(tmp_path / "t.jsonl", [{"prompt": "a"}]), tokenizer, LIMITS)
