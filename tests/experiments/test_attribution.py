"""The DPO reward of tokens beside the program's credit, on numbers that are counted by hand and on kept rollouts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rto_megatron.errors import DataError, RunFolderError
from rto_megatron.experiments.language.attribution import attribution, compared
from rto_megatron.experiments.language.rules import with_rule, without_rule


def test_numbers_that_are_counted_by_hand() -> None:
    # First response: 0.1 broke a rule and is below 0.2 and 0.3, not below 0.0; the second broke none.
    found = compared([[0.0, 0.1, 0.2, 0.3], [1.0, 2.0]], [[0, -1, 0, 1], [0, 1]])
    assert (found.broke, found.kept, found.others) == pytest.approx(
        (0.1, (0.3 + 2.0) / 2, (0.0 + 0.2 + 1.0) / 3)
    )
    assert found.ranked == pytest.approx(2 / 3)
    assert (found.num_tokens, found.num_responses) == (6, 2)
    # Deviations from the means 0.6 and 1/6; their products, and their squares.
    ratio = [value - 0.6 for value in (0.0, 0.1, 0.2, 0.3, 1.0, 2.0)]
    paid = [value - 1 / 6 for value in (0, -1, 0, 1, 0, 1)]
    together = sum(a * b for a, b in zip(ratio, paid, strict=True))
    alone = sum(a * a for a in ratio) * sum(b * b for b in paid)
    assert found.correlation == pytest.approx(together / alone**0.5)


def test_equal_ratios_say_nothing_and_what_is_not_there_is_none() -> None:
    found = compared([[1.0, 1.0], [0.5, 0.0]], [[-1, 0], [0, 0]])
    assert found.ranked == 0.5 and found.kept is None


def _kept(folder: Path, step: int, ratios: list[float], prompt_id: str = "p1") -> None:
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "prompt_id": [prompt_id], "pieces": [["The", " sea", ",", "<end>"]], "finish_reason": ["stop"],
            "token/dpo_logratio": [ratios],
        }
    )  # fmt: skip
    pq.write_table(table, folder / "rollouts" / f"step_{step:08d}_replica_00000.parquet")


def test_the_first_steps_of_a_run_are_judged_by_the_rules_of_its_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rules = [without_rule("commas"), with_rule("sea")]
    prompts.write_text(json.dumps({"prompt_id": "p1", "prompt": "x", "rules": rules}) + "\n")
    for step, comma in ((1, -1.0), (2, -3.0), (3, 99.0)):
        _kept(tmp_path / "rto", step, [0.0, 0.5, comma, 0.25])
    found = attribution(tmp_path / "rto", prompts, steps=2)
    assert (found.broke, found.kept, found.others, found.ranked) == pytest.approx((-2.0, 0.5, 0.125, 1.0))
    _kept(tmp_path / "rto", 1, [0.0] * 4, "p2")
    with pytest.raises(DataError, match="has no prompt 'p2'"):
        attribution(tmp_path / "rto", prompts)


@pytest.mark.parametrize(
    ("steps", "part"), [((), "keeps no rollouts"), ((2, 3), "keeps rollouts from step 2 on")]
)
def test_steps_that_are_not_the_first_are_not_taken_for_them(
    steps: tuple[int, ...], part: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    for step in steps:
        _kept(tmp_path / "rto", step, [0.0] * 4)
    with pytest.raises(RunFolderError, match=part):
        attribution(tmp_path / "rto", tmp_path / "prompts.jsonl")
