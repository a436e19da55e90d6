"""Evaluations during a run that samples: what they measure, what they keep, and that training does not feel them."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import run_ranks
from trainer.test_options import exported, same
from trainer.tiny_runs import configure, train

from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.held_out import pass_at_k, pass_ks, pass_sums

STEPS = {"run__steps": 3, "run__save_every": None, "algorithm__samples_per_prompt": 2, "batch__rollout": 4}


@pytest.mark.parametrize(("num_samples", "ks"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_pass_at_k_is_the_share_of_subsets_in_which_one_passes(num_samples: int, ks: list[int]) -> None:
    assert pass_ks(num_samples) == ks
    for num_passed in range(num_samples + 1):
        passes = [number < num_passed for number in range(num_samples)]
        for k in ks:
            subsets = list(combinations(passes, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(num_samples, num_passed, k) == pytest.approx(share, abs=1e-12)


def test_a_score_at_the_bound_passes() -> None:
    found = pass_sums([1.0, 0.5, 0.0, 0.0], num_samples=2, pass_score=1.0)
    assert found == {"eval/pass_at_1": (0.5, 2.0), "eval/pass_at_2": (1.0, 2.0)}


# At a step that is evaluated batches may be in flight, and with two ahead no push is due.
@pytest.mark.parametrize(
    ("layout", "ahead"),
    [("one", {}), ("dp2", {"rollout__ahead": 2, "algorithm__pool_importance_cap": 2.0})],
)
def test_responses_are_scored_and_kept_and_the_run_is_the_same(
    layout: str, ahead: dict[str, object], files: Path, tmp_path: Path
) -> None:
    # Rewards of training are normalised in groups of two, which five prompts with three responses each are not.
    plain = {
        "sampling__stop": ("red", "g g"),
        "rewards": [{"kind": "model", "weight": 2, "normalize": "group"}],
    }
    evaluated = {
        **plain,
        "data__eval": str(files / "prompts.jsonl"),
        "data__eval_samples": 5,
        "run__eval_every": 2,
        "evaluate__num_samples": 3,
        "evaluate__temperature": 0.5,
        "evaluate__pass_score": 0.1,
    }
    for name, keys in (("plain", plain), ("evaluated", evaluated)):
        config = configure("grpo", files, tmp_path / name, layout, **STEPS, **ahead, **keys)
        assert run_ranks(LAYOUTS[layout][0], train, config) == [None] * LAYOUTS[layout][0]
    assert same(exported(tmp_path / "plain/hf"), exported(tmp_path / "evaluated/hf"))
    entries = read_metrics(tmp_path / "evaluated")
    assert ["eval/score" in entry for entry in entries] == [False, True, True]
    ids = [json.loads(line)["prompt_id"] for line in (files / "prompts.jsonl").read_text().splitlines()[:5]]
    ends = set()
    for entry in entries[1:]:
        text = (tmp_path / f"evaluated/evaluations/step_{entry['step']:06d}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["prompt_id"] for row in rows] == [one for one in ids for _ in range(3)]
        groups = [rows[start : start + 3] for start in range(0, 15, 3)]
        assert entry["eval/score"] == pytest.approx(sum(row["score"] for row in rows) / 15, rel=1e-5)
        assert entry["eval/reward/model/mean"] == pytest.approx(entry["eval/score"] / 2, rel=1e-5)
        for k in (1, 2, 3):
            subsets = [any(r["score"] >= 0.1 for r in c) for g in groups for c in combinations(g, k)]
            assert entry[f"eval/pass_at_{k}"] == pytest.approx(sum(subsets) / len(subsets))
        cut = sum(row["finish_reason"] == "length" for row in rows)
        assert entry["eval/truncated_fraction"] == pytest.approx(cut / 15)
        for row in rows:
            ends.add(row["finish_reason"])
            has_stop = "red" in row["response"]
            assert not has_stop or (row["response"].endswith("red") and row["finish_reason"] == "stop")
    assert ends == {"stop", "length"}
