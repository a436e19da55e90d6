"""Tokenized data in files: the same examples, written once by one process, read by all, never stale or damaged."""

import copy
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from data.test_all_turns import TALK, UNMARKED
from data.test_left_out import with_template
from data.written_rows import demonstration, pair, write_lines
from ranks import run_ranks
from transformers import PreTrainedTokenizerBase

from rto_megatron.config.source_names import MixturePart
from rto_megatron.data import workers
from rto_megatron.data.batches import digest, digest_of
from rto_megatron.data.eos import own_eos
from rto_megatron.data.limits import Limits
from rto_megatron.data.load_report import Loaded
from rto_megatron.data.loader import load_demonstrations, load_judged, load_pairs, load_prompts, load_texts
from rto_megatron.data.prepared import PreparedData
from rto_megatron.data.stored import StoredExamples
from rto_megatron.data.template import TemplateOptions
from rto_megatron.data.vocabulary import token_ids, vocabulary_of
from rto_megatron.errors import DataError
from rto_megatron.types import EndOfSequence, Example

LIMITS = Limits(max_prompt_tokens=60, max_length=90, overlong="drop", loss_on="all")
type Prepared = Callable[[PreparedData, str], Loaded[Example]]
type Plainly = Callable[[str, PreTrainedTokenizerBase, Limits], Loaded[Example]]
KINDS: dict[str, tuple[list[dict[str, object]], Prepared, Plainly]] = {
    "prompts": (
        [{"prompt": "the fox", "answer": [1, {"a": None}], "id": 3}, {"prompt": "東京"}, {"prompt": "the fox " * 90}],
        lambda prepared, source: prepared.prompts(source, keeps_columns=True),
        lambda source, tokenizer, limits: load_prompts(source, tokenizer, limits, keeps_columns=True),
    ),
    "demonstrations": (
        [{"messages": TALK}, demonstration("the dog")], PreparedData.demonstrations, load_demonstrations,
    ),
    "pairs": (
        [pair(margin=1.5), pair(), {"prompt": "the fox " * 90, "chosen": "a", "rejected": "b"}],
        lambda prepared, source: prepared.pairs(source, has_margins=True),
        lambda source, tokenizer, limits: load_pairs(source, tokenizer, limits, has_margins=True),
    ),
    "judged": ([pair(), {"prompt": "a", "completion": "b", "label": False}], PreparedData.judged, load_judged),
    "texts": ([{"text": "the quick fox"}, {"text": "a"}], PreparedData.texts, load_texts),
}  # fmt: skip


def prepared_in(folder: Path, tokenizer: PreTrainedTokenizerBase, limits: Limits = LIMITS) -> PreparedData:
    return PreparedData(folder, tokenizer, limits, own_eos(tokenizer))


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("kind", KINDS)
def test_examples_come_back_as_they_are_loaded(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows, load, plainly = KINDS[kind]
    plain = with_template(tokenizer, UNMARKED)
    source = write_lines(tmp_path / "rows.jsonl", rows)
    expected = plainly(source, plain, LIMITS)
    for _ in range(2):
        found = load(prepared_in(tmp_path / "cache", plain), source)
        assert isinstance(found.items, StoredExamples)
        assert tuple(found.items) == tuple(expected.items) == tuple(found.items[:])
        assert (found.report, found.portions) == (expected.report, expected.portions)
        assert digest(found.items) == digest(expected.items) == digest_of(expected.items)
        assert vocabulary_of(found.items) == {token for item in expected.items for token in token_ids(item)}
    (entry,) = entries(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == entry.stat().st_mode & 0o777 == 0o700


def test_an_empty_id_is_the_place_of_its_row_and_half_a_character_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prepared = prepared_in(tmp_path / "cache", tokenizer)
    source = write_lines(
        tmp_path / "rows.jsonl", [{"id": "", "prompt": "the fox"}, {"id": 0, "prompt": "a dog"}]
    )
    assert [prompt.id for prompt in prepared.prompts(source).items] == [f"{source}:1", "0"]
    halved = write_lines(tmp_path / "halved.jsonl", [{"id": "x\ud83d", "prompt": "the fox"}])
    with pytest.raises(DataError, match=r"halved\.jsonl:1: the text holds a lone surrogate"):
        prepared.prompts(halved)


def test_rows_are_read_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [pair()])
    first = prepared_in(tmp_path / "cache", tokenizer).pairs(source)
    (entry,) = entries(tmp_path / "cache")
    written = {path: path.stat().st_mtime_ns for path in entry.rglob("*")}
    assert tuple(prepared_in(tmp_path / "cache", tokenizer).pairs(source).items) == tuple(first.items)
    assert {path: path.stat().st_mtime_ns for path in entry.rglob("*")} == written


def test_whatever_ids_depend_on_makes_another_entry(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cache, source = tmp_path / "cache", write_lines(tmp_path / "rows.jsonl", [pair(), pair(margin=2.0)])
    prepared = prepared_in(cache, tokenizer)
    prepared.pairs(source)
    prepared.pairs(source, has_margins=True)
    prepared.pairs(source, max_rows=1)
    prepared_in(cache, tokenizer, replace(LIMITS, max_length=80)).pairs(source)
    prepared_in(cache, with_template(tokenizer, UNMARKED)).pairs(source)
    prepared.pairs((MixturePart(source=source, weight=2),))
    text = Path(source).read_text()
    Path(source).write_text(text.replace("the dog", "the fox"))
    assert tokenizer.decode(prepared.pairs(source).items[0].chosen_ids) == " the fox</s>"
    assert len(entries(cache)) == 7


def test_another_tokenizer_another_reading_and_another_date_make_other_entries(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows, _, _ = KINDS["judged"]
    cache, source = tmp_path / "cache", write_lines(tmp_path / "rows.jsonl", rows)
    prepared = prepared_in(cache, tokenizer)
    prepared.demonstrations(source)
    prepared.judged(source)
    larger, other_start = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    larger.add_tokens(["the fox"])
    other_start.bos_token = other_start.unk_token
    for one in (larger, other_start):
        prepared_in(cache, one).demonstrations(source)
    ends = EndOfSequence((*prepared.eos.ids, 7), prepared.eos.written)
    replace(prepared, eos=ends).demonstrations(source)
    kept = replace(LIMITS, template=TemplateOptions(open_thought="keep"))
    prepared_in(cache, tokenizer, kept).demonstrations(source)
    assert len(entries(cache)) == 6
    # The date counts where a template prints it.
    dated = with_template(tokenizer, UNMARKED + "{% set day = strftime_now('%d') %}")
    for day in (1, 2):
        moment = replace(LIMITS, template=TemplateOptions(moment=datetime(2026, 1, day)))
        prepared_in(cache, tokenizer, moment).demonstrations(source)
        prepared_in(cache, dated, moment).demonstrations(source)
    assert len(entries(cache)) == 8


@pytest.mark.parametrize("damage", ["shard_0/tokens.bin", "shard_0/bounds.npy", "meta"])
def test_a_damaged_entry_is_written_anew(
    damage: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prepared, source = (
        prepared_in(tmp_path / "cache", tokenizer),
        write_lines(tmp_path / "rows.jsonl", [pair()]),
    )
    expected = tuple(prepared.pairs(source).items)
    (entry,) = entries(tmp_path / "cache")
    content = bytearray((entry / damage).read_bytes())
    content[-3] ^= 1
    (entry / damage).write_bytes(content)
    left = entry.with_name(f".partial_{entry.name}_{socket.gethostname()}_7")  # of a writer that was killed
    left.mkdir()
    assert tuple(prepared.pairs(source).items) == expected
    assert entries(tmp_path / "cache") == [entry]


def test_rows_that_cannot_be_used_leave_nothing_behind(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [pair(), {"chosen": 1}])
    with pytest.raises(DataError, match="1 of the 2 rows"):
        prepared_in(tmp_path / "cache", tokenizer).pairs(source)
    assert entries(tmp_path / "cache") == []


def many(number: int) -> list[dict[str, object]]:
    """Rows of which some are dropped, cut or in another layout."""
    words = [f"the fox {n} " * (1 + n % 40) for n in range(number)]
    odd = [{"instruction": text, "chosen": "a dog", "rejected": text} for text in words]
    plain = [{"prompt": text, "chosen": text[:20], "rejected": "b"} for text in words]
    kinds = [(odd[n], pair(margin=float(n)), plain[n], plain[n], pair()) for n in range(number)]
    return [kind[(n * 7 + n // 5) % 5] for n, kind in enumerate(kinds)]


def test_several_processes_make_what_one_makes(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_lines(tmp_path / f"{number}.jsonl", many(number)) for number in (300, 150)]
    parts = tuple(MixturePart(source=source) for source in sources)
    expected = load_pairs(parts, tokenizer, LIMITS, has_margins=True)
    monkeypatch.setattr(workers, "_WORTHWHILE", 10_000)  # bytes
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(3))
    found = prepared_in(tmp_path / "cache", tokenizer).pairs(parts, has_margins=True)
    assert len([*(tmp_path / "cache").glob("*/shard_*")]) == 3
    assert tuple(found.items) == tuple(expected.items) and digest(found.items) == digest(expected.items)
    assert (found.report, found.portions) == (expected.report, expected.portions)
    with (tmp_path / "300.jsonl").open("a") as lines:
        lines.write(json.dumps({"chosen": 1}) + "\n")
    with pytest.raises(DataError) as refused:
        load_pairs(parts, tokenizer, LIMITS, has_margins=True)
    with pytest.raises(DataError) as shared:
        prepared_in(tmp_path / "cache", tokenizer).pairs(parts, has_margins=True)
    assert str(shared.value) == str(refused.value)


def _digest_of_rank(folder: Path, source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return digest(prepared_in(folder, tokenizer).pairs(source).items)


def test_ranks_that_ask_at_once_share_one_entry(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", many(200))
    found = run_ranks(3, _digest_of_rank, tmp_path / "cache", source, tokenizer)
    assert set(found) == {digest(load_pairs(source, tokenizer, LIMITS).items)}
    assert len(entries(tmp_path / "cache")) == 1
