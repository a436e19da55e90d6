"""The evaluate stage with `rewards`: what every source gave, per prompt and response, alike on every layout."""

import json
import statistics
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import run_ranks
from rich.console import Console
from trainer.tiny_runs import ENGINE_VOCAB, join

from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import dump, load_recipe, load_stage
from rto_megatron.config.schema import EvaluateStage
from rto_megatron.proofs.resumed_runs import ScriptedPool, ScriptedPush
from rto_megatron.reporting.evaluation import final_table, read_evaluation
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.evaluate import evaluate

FUNCTIONS = Path(__file__).parents[1] / "rewards/functions.py"
QUICKSTART = Path(__file__).parents[2] / "launchers/recipes/quickstart/evaluate.yaml"
NUM_PROMPTS, NUM_SAMPLES = 5, 2


def _recipe(files: Path, folder: Path, layout: str) -> EvaluateStage:
    _, tensor, pipeline, sequence = LAYOUTS[layout]
    models = {role: files / "models" / role for role in ("policy", "reference", "reward")}
    config = EvaluateStage.model_validate(
        {
            "stage": "evaluate",
            "run": {"dir": folder / "run"},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "sequence": sequence},
            "precision": {"dtype": "fp32"},
            "models": models,
            "data": {
                "eval": str(files / "prompts.jsonl"),
                "eval_samples": NUM_PROMPTS,
                "max_prompt_tokens": 100,
            },
            "batch": {"micro": 3},
            "sampling": {"max_response_tokens": 8},
            "rewards": [
                {"kind": "model", "weight": 0.5, "clip": 0.7},
                {"kind": "function", "name": "length", "function": f"{FUNCTIONS}:length", "weight": 2.0},
                {"kind": "function", "name": "seen", "function": f"{FUNCTIONS}:seen", "weight": 0.0},
                {
                    "kind": "function",
                    "name": "first_token",
                    "function": f"{FUNCTIONS}:first_token",
                    "pays": "tokens",
                },
                {"kind": "overlong", "buffer_tokens": 8, "weight": 3.0},
            ],
            "evaluate": {"name": "mine", "num_samples": NUM_SAMPLES},
        }
    )
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump(config))
    return load_stage(folder / "recipe.yaml", EvaluateStage)


def _evaluate(config: EvaluateStage) -> None:
    place = join(config)
    pool = ScriptedPool(ENGINE_VOCAB) if place.is_replica_lead else None
    evaluate(config, place, ConnectedPool(pool, ScriptedPush(pool)))


def test_every_source_is_measured_and_every_response_kept(files: Path, tmp_path: Path) -> None:
    found, kept = {}, {}
    for layout in ("one", "dp2"):
        run_ranks(LAYOUTS[layout][0], _evaluate, _recipe(files, tmp_path / layout, layout))
        found[layout] = read_evaluation(tmp_path / layout / "run")
        text = (tmp_path / layout / "run/evaluation.jsonl").read_text()
        kept[layout] = [json.loads(line) for line in text.splitlines()]
    rows = kept["one"]
    assert [row["prompt_id"] for row in rows] == [
        f"p{n}" for n in range(NUM_PROMPTS) for _ in range(NUM_SAMPLES)
    ]
    for row, other in zip(rows, kept["dp2"], strict=True):
        assert row == pytest.approx(other, rel=1e-5)
        length = row["reward/length"]
        assert row["reward/seen"] == row["reward/first_token"] == 1.0
        assert row["reward/overlong"] == pytest.approx(-length / 8)
        model = max(-0.7, min(0.7, row["reward/model"]))
        assert row["score"] == pytest.approx(0.5 * model + 2 * length - 3 * length / 8, rel=1e-5)
    assert any(abs(row["reward/model"]) > 0.7 for row in rows)
    for name in ("model", "length", "overlong"):
        means = [
            statistics.fmean(row[f"reward/{name}"] for row in rows[first : first + NUM_SAMPLES])
            for first in range(0, len(rows), NUM_SAMPLES)
        ]
        assert found["one"].rewards[name].mean == pytest.approx(statistics.fmean(means))
        error = statistics.stdev(means) / NUM_PROMPTS**0.5
        assert found["one"].rewards[name].standard_error == pytest.approx(error)
        assert found["dp2"].rewards[name].mean == pytest.approx(found["one"].rewards[name].mean, rel=1e-5)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(final_table([found["one"]], "t"))
    header = shown.get().splitlines()[2]
    assert [
        name
        for name in ("sum of rewards", "first_token", "length", "model", "overlong", "seen")
        if name in header
    ]
    assert str(found["one"].rewards["length"]) in shown.get()


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ("rewards=[{kind: overlong, buffer_tokens: 4}]",),
            "has no effect, as no source in `rewards`",
        ),
        (("rewards=[{kind: model}]", "models.reward=null"), "models.reward is missing"),
        (
            ("rewards=[{kind: model, normalize: group}]",),
            "rewards.model.normalize=group has no place in stage",
        ),
        (("rewards=[{kind: model}, {kind: overlong, buffer_tokens: 400}]",), "buffer_tokens=400 is above"),
    ],
)
def test_rewards_that_cannot_be_measured_are_refused(overrides: tuple[str, ...], part: str) -> None:
    assert find_problems(load_recipe(QUICKSTART), 2, {}) == []
    assert find_problems(load_recipe(QUICKSTART, ("rewards=[{kind: model}]",)), 2, {}) == []
    (problem,) = find_problems(load_recipe(QUICKSTART, overrides), 2, {})
    assert part in problem
