"""The archives of the language experiment give the numbers that docs/language.md and README.md state."""

import tarfile
from pathlib import Path
from statistics import fmean

from rto_megatron.experiments.design import on_first_seeds, tuned_before
from rto_megatron.experiments.language.attribution import attribution, credit_of, rules_of
from rto_megatron.experiments.language.language_arms import EXPERIMENT
from rto_megatron.experiments.page import arm_rows, paired_rows
from rto_megatron.experiments.summary import ArmResult, summarise
from rto_megatron.reporting.rollout_files import kept_steps, read_rollouts

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {
    "start": "start", "dpo": "DPO, 50 steps", "ppo": "PPO, 30 steps", "rto": "RTO", "rs_ppo": "RS-PPO",
    "shuffled_rto": "shuffled RTO (control)", "dense_oracle": "dense oracle",
}  # fmt: skip
IN_README = ("true return", "reward model", "final KL", "response tokens")


def _row(arm: ArmResult, seed: int) -> str:
    one = arm.seeds[seed]
    found = one.evaluation
    assert one.distinct is not None
    true, score, kl = (
        f"{value.mean:.{digits}f} ± {value.standard_error:.{digits}f}"
        for value, digits in ((found.rewards["rules"], 3), (found.rewards["model"], 2), (found.kl, 2))
    )
    far = "0" if found.kl.mean == 0 else kl
    end = ["", ""]
    if one.curve is not None:
        end = ["never" if one.at_matched_kl is None else f"{one.at_matched_kl:.3f}"]
        end += ["never" if one.episodes is None else f"{one.episodes:.0f}"]
    cells = [
        NAMES[arm.name], true, score, far, f"{found.response_tokens.mean:.1f}", f"{one.distinct:.2f}", *end,
    ]  # fmt: skip
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _tokens_row(seed: int, folder: Path) -> str:
    found = attribution(folder / "rto_x1", folder / "task/prompts_train.jsonl")
    assert None not in (found.kept, found.broke, found.others, found.ranked)
    kept, broke, others = (f"{one:+.2f}" for one in (found.kept, found.broke, found.others))
    below = f"{100 * (found.ranked or 0):.0f} of 100"
    cells = [seed, f"{found.num_tokens:,}", f"{found.correlation:.2f}", below, kept, broke, others]
    return "| " + " | ".join(map(str, cells)) + " |"


def _ends_row(seed: int, folder: Path) -> str:
    """By what stands in the rollouts: a log-ratio is of the end where a response stopped by itself."""
    rules = rules_of(folder / "task/prompts_train.jsonl")
    soon, in_time, others = [], [], []
    for one in read_rollouts(folder / "rto_x1", kept_steps(folder / "rto_x1")).to_pylist():
        paid = credit_of(one["prompt_id"], one["pieces"], one["finish_reason"], rules)
        pairs = list(zip(one["token/dpo_logratio"], paid, strict=True))
        if one["finish_reason"] == "stop":
            ratio, credit = pairs.pop()
            (soon if credit < 0 else in_time).append(ratio)
        others += [ratio for ratio, credit in pairs if credit < 0]
    return f"| {seed} | " + " | ".join(f"{fmean(one):+.2f}" for one in (soon, in_time, others)) + " |"


def test_the_page_states_what_the_archives_hold(tmp_path: Path) -> None:
    archives = sorted(DOCS.glob("evidence/language_seed*.tar.xz"))
    for path in archives:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")
    page = (DOCS / "language.md").read_text()
    experiment = tuned_before(on_first_seeds(EXPERIMENT, len(archives)), 1.0)
    results = summarise(experiment, tmp_path)
    assert {arm.name for arm in results} == NAMES.keys()
    for arm in results:
        for seed in experiment.design.seeds:
            assert _row(arm, seed) in page
    for cells in (*arm_rows(results, experiment), *paired_rows(results, experiment)):
        assert "| " + " | ".join(cells) + " |" in page
    front = (DOCS.parent / "README.md").read_text()
    header, *of_arms = arm_rows(results, experiment)
    for arm, cells in zip(results, of_arms, strict=True):
        shown = [NAMES[arm.name], *(cells[header.index(column)] for column in IN_README)]
        assert "| " + " | ".join(shown) + " |" in front
    for seed in experiment.design.seeds:
        assert _tokens_row(seed, tmp_path / f"seed{seed}") in page
        assert _ends_row(seed, tmp_path / f"seed{seed}") in page
