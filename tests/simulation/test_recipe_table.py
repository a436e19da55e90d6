"""The table of simulated recipes goes on where it was stopped."""

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/simulate_recipes.py"


def test_finished_rows_are_not_simulated_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(TOOL))
    wanted = tool["Wanted"].of("llama3_8b/rto_own_ranks.yaml")
    assert (wanted.gpus, wanted.pool_gpus) == (8, 2)  # by the recipe's first lines
    row = tool["Row"](wanted.recipe, 8, 2, {"update": 3 * 2**30}, 2**31, 12.4, 31.0, "2026-01-31")
    rows = tmp_path / "rows.jsonl"
    whole = json.dumps({"key": wanted.key, "row": asdict(row)})
    rows.write_text(f"{whole}\n\n{whole[:40]}")  # the second was being written when the tool was killed
    monkeypatch.setattr(sys, "argv", ["simulate_recipes.py", "--rows", str(rows), wanted.recipe])
    tool["main"]()
    said = capsys.readouterr().out
    assert "| `llama3_8b/rto_own_ranks.yaml` | 8 |  | 3.0 GiB |  |  | 2.0 GiB | 12 s | 31 s |" in said
    lacking = "llama3_8b/sft.yaml"
    monkeypatch.setattr(sys, "argv", [sys.argv[0], "--rows", str(rows), "--finished", lacking, wanted.recipe])
    tool["main"]()
    again = capsys.readouterr().out
    assert said.splitlines()[-1] in again and again.endswith(f"not simulated: {lacking}\n")


def test_what_is_simulated_soonest_comes_first() -> None:
    tool = runpy.run_path(str(TOOL))
    recipes = (
        "families/gemma3_1b_dpo.yaml",
        "llama3_8b/sft.yaml",
        "llama3_8b/rto.yaml",
        "llama3_70b/rto.yaml",
    )
    layers = [tool["num_layers"](tool["Wanted"].of(recipe)) for recipe in recipes]
    # Of 26, 32, 16 and 80 layers: policy and reference; the policy; RTO with a critic and a reward model of 1B.
    assert layers[:3] == [4 * 26, 3 * 32, 3 * (32 + 16) + 32 + 16 + 32] and layers[3] > layers[2]
