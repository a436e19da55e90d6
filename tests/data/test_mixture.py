"""Mixtures: what a pass reads of each part, the same for any number of ranks and after a resume."""

from collections import Counter
from pathlib import Path

import pytest
from data.written_rows import demonstration, pair, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.config.source_names import MixturePart
from rto_megatron.data.batches import Batches
from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_demonstrations, load_judged, load_pairs
from rto_megatron.data.mixture import Portion
from rto_megatron.errors import DataError
from rto_megatron.types import Prompt

LIMITS = Limits(max_prompt_tokens=200, max_length=400, overlong="error")
ITEMS = [Prompt(f"{number}", (number,)) for number in range(14)]  # ten of one source, four of another
PORTIONS = (Portion(10, 0.5), Portion(4, 2.0))


def walked(num_batches: int, dp_size: int = 1) -> list[list[int]]:
    ranks = [Batches(ITEMS, 2, 3, rank, dp_size, portions=PORTIONS) for rank in range(dp_size)]
    steps = ([rank.next_batch() for rank in ranks] for _ in range(num_batches))
    return [[item.token_ids[0] for row in zip(*step, strict=True) for item in row] for step in steps]


def test_a_pass_reads_each_part_as_often_as_its_weight_says() -> None:
    batches = Batches(ITEMS, 2, 3, portions=PORTIONS)
    assert (batches.items_per_pass, batches.batches_per_epoch, batches.num_left_over) == (13, 6, 1)
    # A global batch of all of a pass leaves nothing behind.
    whole = Batches(ITEMS, 13, 3, portions=PORTIONS)
    first, second = ([item.token_ids[0] for item in whole.next_batch()] for _ in range(2))
    for one in (first, second):
        assert Counter(number for number in one if number >= 10) == dict.fromkeys(range(10, 14), 2)
    halves = [{number for number in one if number < 10} for one in (first, second)]
    assert halves[0] | halves[1] == set(range(10)) and not halves[0] & halves[1]
    assert first != sorted(first)


def test_a_mixture_does_not_depend_on_the_ranks_and_goes_on_after_a_resume() -> None:
    assert walked(20) == walked(20, dp_size=2)
    resumed = Batches(ITEMS, 2, 3, portions=PORTIONS)
    before = Batches(ITEMS, 2, 3, portions=PORTIONS)
    for _ in range(9):
        before.next_batch()
    resumed.restore(before.state())
    assert [item.token_ids[0] for item in resumed.next_batch()] == walked(10)[-1]


def test_parts_of_weight_1_are_one_set() -> None:
    plain, parts = (
        Batches(ITEMS, 2, 3, portions=given) for given in ((), (Portion(10, 1.0), Portion(4, 1.0)))
    )
    for _ in range(20):
        assert plain.next_batch() == parts.next_batch()


def test_parts_of_other_layouts_are_loaded_together(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    one = write_lines(tmp_path / "one.jsonl", [demonstration("the dog"), demonstration("a dog")])
    other = write_lines(tmp_path / "other.jsonl", [{"instruction": "the fox", "output": "sleeps"}])
    parts = (MixturePart(source=one, weight=0.5), MixturePart(source=other, weight=2))
    loaded = load_demonstrations(parts, tokenizer, LIMITS)
    assert [tokenizer.decode(item.response_ids) for item in loaded.items] == [
        " the dog</s>",
        " a dog</s>",
        " sleeps</s>",
    ]
    assert loaded.portions == (Portion(2, 0.5), Portion(1, 2.0))
    assert loaded.report.summary().splitlines() == [
        f"{one}, {other}: 3 rows read, 3 kept",
        f"  {one}: 2 rows read, 2 kept, read 0.5 times a pass; layout: messages (2 rows)",
        f"  {other}: 1 rows read, 1 kept, read 2 times a pass; layout: alpaca (1 rows)",
    ]
    assert load_demonstrations(parts, tokenizer, LIMITS, max_rows=2).report.rows == 2


def test_verdicts_are_counted_in_answers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", [pair()])
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    loaded = load_judged((MixturePart(source=one, weight=3), MixturePart(source=other)), tokenizer, LIMITS)
    assert loaded.portions == (Portion(2, 3.0), Portion(1, 1.0))


def test_parts_that_do_not_fit_together_are_refused_at_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sources = [
        write_lines(tmp_path / "with.jsonl", [pair(margin=1.0)]),
        write_lines(tmp_path / "without.jsonl", [pair()]),
        write_lines(tmp_path / "long.jsonl", [{"prompt": "the fox " * 90, "chosen": "a", "rejected": "b"}]),
    ]
    parts = tuple(MixturePart(source=source) for source in sources)
    with pytest.raises(DataError) as caught:
        load_pairs(parts, tokenizer, Limits(20, 400, "drop"), has_margins=True)
    assert f"{sources[2]} has no row to use" in str(caught.value)
    assert f"no pair of {sources[1]} has a margin" in str(caught.value)


def test_bad_rows_of_all_parts_are_told_at_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    good, empty = demonstration("the dog"), demonstration(" ")
    names = [write_lines(tmp_path / name, [good, empty]) for name in ("one.jsonl", "other.jsonl")]
    with pytest.raises(DataError, match=r"2 of the 4 rows .* cannot be used") as caught:
        load_demonstrations(tuple(MixturePart(source=name) for name in names), tokenizer, LIMITS)
    assert f"{names[0]}:2: " in str(caught.value) and f"alike: {names[1]}:2" in str(caught.value)
