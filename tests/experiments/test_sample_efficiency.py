"""The experiment's controls, the numbers read off curves, and its report, on runs written by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from algorithms.grids import golden_scored, no_reduction
from typer.testing import CliRunner

from rto_megatron.algorithms import ALGORITHMS, ppo, rto
from rto_megatron.cli.main import app
from rto_megatron.config import checks
from rto_megatron.config.load import load_recipe, save
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.errors import RecipeError, RunFolderError
from rto_megatron.experiments.curves import (
    Curve,
    best_factor,
    episodes_to,
    last_quarter,
    return_at_kl,
    run_name,
    seed_folder,
)
from rto_megatron.experiments.design import Design, tuned_before
from rto_megatron.experiments.language.language_arms import EXPERIMENT as LANGUAGE
from rto_megatron.experiments.page import paired, paired_rows, write_report
from rto_megatron.experiments.sample_efficiency import EXPERIMENT
from rto_megatron.experiments.sample_efficiency.arms import (
    ARMS,
    pay_true_rewards,
    shuffle_dpo_rewards,
    shuffled,
)
from rto_megatron.experiments.summary import distinct_bigrams, summarise
from rto_megatron.reporting.evaluation import Estimate, Evaluation, save_evaluation
from rto_megatron.types import ScoredRollouts

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launchers/recipes/sample_efficiency"
TABLE = TrueReward(
    class_of_token={1: 0},
    entries={(0, 3, 4): 2.0, (0, 4, 4): -0.5},
    token_cost=0.25,
    eos_id=9,
    source_mean=0.0,
    source_sd=4.0,
    scale=1.0,
    seed=0,
    tokenizer_fingerprint="",
)
DESIGN_2 = Design(seeds=(0, 1), tuning_seeds=(0,), factors=(1 / 3, 1.0), window=2, matched_kl=3.0)
EXPERIMENT_2 = replace(EXPERIMENT, design=DESIGN_2)


def test_every_arm_is_a_registered_method_with_valid_keys() -> None:
    for experiment in (EXPERIMENT, LANGUAGE):
        for arm in experiment.arms:
            dpo = ["models.dpo=x"] if ALGORITHMS[arm.stage].has_dpo else []
            recipe = ROOT / experiment.recipes / f"{arm.recipe}.yaml"
            config = load_recipe(recipe, [f"stage={arm.stage}", *dpo, *arm.overrides])
            assert config.stage == arm.stage
            checks.refuse(checks.model_problems(config))
        assert {arm.tuned_as for arm in experiment.arms} <= {arm.name for arm in experiment.arms}
        assert len(experiment.design.seeds) >= 5


def _many_rollouts() -> ScoredRollouts:
    scored = golden_scored()
    return replace(
        scored, rollouts=tuple(replace(r, prompt_id=f"p{i}") for i, r in enumerate(scored.rollouts))
    )


def test_shuffling_keeps_the_sum_and_the_padding_and_moves_the_rewards() -> None:
    scored = _many_rollouts()
    dpo_BR = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 0.0], [6.0, 7.0, 8.0, 0.0, 0.0, 0.0]])
    moved_BR = shuffled(dpo_BR, scored)
    assert torch.equal(moved_BR.sort(1).values, dpo_BR.sort(1).values)
    assert not moved_BR[0, 5:].any() and not moved_BR[1, 3:].any()
    assert not torch.equal(moved_BR, dpo_BR)
    assert torch.equal(moved_BR, shuffled(dpo_BR, scored))


def test_shuffled_rto_pays_what_rto_pays_in_all() -> None:
    scored, config = _many_rollouts(), rto.Config()
    plain = ALGORITHMS["rto"].build(config, frozenset)
    ours = shuffle_dpo_rewards(plain, Path()).credit(scored, 0.01, no_reduction).rewards
    theirs = plain.credit(scored, 0.01, no_reduction).rewards
    torch.testing.assert_close(ours.total_BR().sum(1), theirs.total_BR().sum(1))
    assert not torch.equal(ours.dpo_BR, theirs.dpo_BR)


def test_the_oracle_pays_the_true_reward_of_every_token_and_no_score(tmp_path: Path) -> None:
    scored = golden_scored()
    (tmp_path / "task").mkdir()
    TABLE.save(tmp_path / "task/true_reward.json")
    algorithm = pay_true_rewards(ALGORITHMS["ppo"].build(ppo.Config(), frozenset), tmp_path)
    rewards = algorithm.credit(scored, 0.0, no_reduction).rewards
    # Prompts end with 3 and responses are 4s: the first token earns 2, the others lose 0.5; each costs 0.25.
    expected = [[1.75, -0.75, -0.75, -0.75, -0.75, 0.0], [1.75, -0.75, -0.75, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards.total_BR(), torch.tensor(expected).double() / 4.0)


def _curve(returns: list[float], kl: list[float]) -> Curve:
    steps = np.arange(1.0, len(returns) + 1)
    return Curve(10 * steps, np.array(returns), np.array(kl), np.full(len(returns), 5.0))


def test_numbers_are_read_off_smoothed_curves() -> None:
    curve = _curve([0.0, 2.0, 4.0, 10.0], [0.0, 2.0, 4.0, 6.0])
    smooth = curve.smoothed(2)
    assert smooth.returns.tolist() == [1.0, 3.0, 7.0] and smooth.episodes.tolist() == [20.0, 30.0, 40.0]
    short = _curve([1.0, 3.0], [0.0, 4.0]).smoothed(5)  # a trial of two steps has one mean, and a page
    assert (short.returns.tolist(), short.kl.tolist(), short.episodes.tolist()) == ([2.0], [2.0], [20.0])
    assert last_quarter(curve) == 10.0 and last_quarter(_curve([1.0, 3.0], [0.0, 4.0])) == 3.0
    assert last_quarter(_curve([*range(9)], [0.0] * 9)) == (7 + 8) / 2
    assert episodes_to(curve, 3.0, window=2) == 30.0
    assert episodes_to(curve, 7.5, window=2) is None
    assert return_at_kl(curve, 2.0, window=2) == pytest.approx(2.0)  # KL 1 and 3 give 1 and 3
    assert return_at_kl(curve, 0.5, window=2) == 1.0
    assert return_at_kl(curve, 6.0, window=2) is None


def _write_run(
    root: Path, seed: int, name: str, stage: str, returns: list[float], is_finished: bool = True
) -> None:
    folder = seed_folder(root, seed) / name
    dpo = ["models.dpo=x"] if ALGORITHMS[stage].has_dpo else []
    save(load_recipe(RECIPES / "reinforcement.yaml", [f"vars.method={stage}", *dpo]), folder)
    rows = [
        {"step": i + 1, "task/true_return": r, "objective/kl": float(i), "rollout/response_tokens": 40.0}
        for i, r in enumerate(returns)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if is_finished:
        (folder / "hf").mkdir()


def _write_evaluation(root: Path, seed: int, name: str, value: float) -> None:
    one = Estimate(value, 0.1)
    evaluation = Evaluation(name, one, one, Estimate(5.0, 0.1), Estimate(40.0, 0.1), 8, 8)
    save_evaluation(evaluation, seed_folder(root, seed) / "evaluations" / name)


def _write_experiment(root: Path) -> None:
    """PPO does best at factor 1 and RTO at 1/3; on seed s everything is s higher."""
    for seed in DESIGN_2.seeds:
        for system, value in (("sft", 0.0), ("dpo", 3.0)):
            _write_evaluation(root, seed, system, value + seed)
        for arm in ARMS:
            for factor in DESIGN_2.factors:
                is_best = (factor == 1.0) == (arm.tuned_as == "ppo")
                slope = (2.0 if arm.name == "rto" else 1.0) * (1.0 if is_best else 0.1)
                returns = [seed + slope * step for step in range(11)]
                name = run_name(arm.name, factor)
                _write_run(root, seed, name, arm.stage, returns)
                _write_evaluation(root, seed, name, returns[-1])


def test_report_has_hand_computed_numbers(tmp_path: Path) -> None:
    _write_experiment(tmp_path)
    assert best_factor(EXPERIMENT_2, tmp_path, "ppo") == 1.0
    assert best_factor(EXPERIMENT_2, tmp_path, "rto") == 1 / 3
    table = write_report(EXPERIMENT_2, tmp_path)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table.splitlines() if "|" in line}
    # PPO ends at 9.5 over its last two steps, so the threshold is 8.55: it is passed by the mean of steps 9 and 10
    # (8.5 is below) at step 11 of 128 episodes each; RTO passes it by steps 4 and 5 at step 6.
    assert rows["ppo"][4] == str(11 * 128) and rows["rto"][4] == str(6 * 128)
    assert rows["rto"][5] == f"{11 / 6:.2f}" and rows["rto"][1] == "x 0.33"
    assert rows["rto"][2] == "20.500 ± 0.500" and rows["sft"][4] == "-"
    assert rows["rto"][3] == "2 of 2" and rows["ddpo"][3] == "0 of 2"
    assert rows["ppo"][6] == "3.500 ± 0.500"  # KL is the step, so the return at 3 nats is 3 (+ the seed)
    written = (tmp_path / "table.md").read_text()
    assert "| ppo | x 1 | 9.50, 1408 |" in written  # last quarter: steps 10 and 11
    assert "| rto | x 0.33 | 19.00, 768 |" in written and "| ppo | x 0.33 | 0.95, never |" in written
    for name in ("return_by_episodes", "return_by_kl", "response_tokens", "episodes_to_threshold"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "| rto | +10 ± 0 | - | +3 ± 0 | - |" in written
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4 and "src=" not in page and "20.500 ± 0.500" in page
    entries = {entry["arm"]: entry for entry in json.loads((tmp_path / "table.json").read_text())}
    assert entries["rto"]["episodes_to_threshold"] == [768.0, 768.0]


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    # Mean 0.04; the deviation of 0.05 and 0.03 is 0.01 sqrt(2), over sqrt(2) seeds 0.01.
    assert paired([0.05, 0.03], 2) == ("+0.04 ± 0.01", "+4.0")
    assert paired([0.05, 0.03], 5) == ("+0.04 ± 0.01 (2 of 5)", "+4.0")
    assert paired([-0.5], 3) == ("-0.5 (1 of 3)", "-") and paired([], 3) == ("-", "-")
    _write_experiment(tmp_path)
    _write_evaluation(tmp_path, 1, run_name("rto", 1 / 3), 24.0)
    rows = {row[0]: row[1:] for row in paired_rows(summarise(EXPERIMENT_2, tmp_path), EXPERIMENT_2)}
    # At the end 20 - 10 and 24 - 11; RTO earns twice what PPO does at a KL of 3: 6 and 7 against 3 and 4.
    assert rows["rto"] == ("+11.5 ± 1.5", "+7.7", "+3 ± 0", "-")
    assert "ppo" not in rows and "sft" not in rows


def test_nothing_is_reached_where_ppo_gained_nothing(tmp_path: Path) -> None:
    _write_experiment(tmp_path)
    _write_evaluation(tmp_path, 0, "sft", 9.5)  # what PPO ends at over its last two steps
    episodes = {arm.name: [one.episodes for one in arm.seeds] for arm in summarise(EXPERIMENT_2, tmp_path)}
    assert episodes["ppo"] == [None, 1408.0] and episodes["rto"] == [None, 768.0]


def test_repeated_responses_have_fewer_distinct_bigrams() -> None:
    assert distinct_bigrams(["a b c", "A b d"]) == 3 / 4
    assert distinct_bigrams(["a", ""]) is None


def test_responses_with_line_separators_are_counted_in_the_report(tmp_path: Path) -> None:
    _write_experiment(tmp_path)
    for seed in DESIGN_2.seeds:
        rows = [{"response": "a b\u2028a b"}, {"response": "c\u0085d"}]  # as keep_rows writes them
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        folder = seed_folder(tmp_path, seed) / "evaluations" / "ppo_x1"
        (folder / "evaluation.jsonl").write_text(text, encoding="utf-8")
    arms = {arm.name: arm for arm in summarise(EXPERIMENT_2, tmp_path)}
    assert [one.distinct for one in arms["ppo"].seeds] == [3 / 4, 3 / 4]  # a b, b a, a b; c d


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    _write_experiment(tmp_path)
    (seed_folder(tmp_path, 1) / "semi_rto_x0.33" / "hf").rmdir()
    with pytest.raises(RunFolderError, match=r"semi_rto_x0\.33 is not finished"):
        write_report(EXPERIMENT_2, tmp_path)


def test_a_rate_that_was_chosen_before_needs_no_other_runs(tmp_path: Path) -> None:
    assert best_factor(tuned_before(EXPERIMENT_2, 1.0), tmp_path, "rto") == 1.0  # though there is none yet
    _write_experiment(tmp_path)
    for folder in tmp_path.glob("*/*_x0.33"):
        shutil.rmtree(folder)
    table = write_report(tuned_before(EXPERIMENT_2, 1.0), tmp_path)
    assert "x 1" in table and "x 0.33" not in table
    assert "| rto | x 1 | 1.90, never |" in (tmp_path / "table.md").read_text()  # a tenth of the slope of 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--seeds", "7"], "the design has the seeds"),
        (["--seeds", "a"], "0,1"),
        (["--num-seeds", "9"], "the design has 5 seeds"),
        (["--factor", "2"], "--factor 2: the design has the factors 0.33, 1, 3"),
    ],
)
def test_what_is_outside_the_design_is_refused(arguments: list[str], part: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=part):
        CliRunner().invoke(
            app, ["sample-efficiency", str(tmp_path), "--phase", "tune", *arguments], catch_exceptions=False
        )
