"""The archive of the language experiment gives the numbers that docs/language.md states."""

import tarfile
from pathlib import Path

from rto_megatron.experiments.design import on_first_seeds, tuned_before
from rto_megatron.experiments.language.attribution import attribution
from rto_megatron.experiments.language.language_arms import EXPERIMENT
from rto_megatron.experiments.summary import ArmResult, summarise

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {
    "start": "start", "dpo": "DPO, 50 steps", "ppo": "PPO, 30 steps", "rto": "RTO", "rs_ppo": "RS-PPO",
    "shuffled_rto": "shuffled RTO (control)", "dense_oracle": "dense oracle",
}  # fmt: skip


def _row(arm: ArmResult) -> str:
    (one,) = arm.seeds
    found = one.evaluation
    assert one.distinct is not None
    true, score, kl = (
        f"{value.mean:.{digits}f} ± {value.standard_error:.{digits}f}"
        for value, digits in ((found.rewards["rules"], 3), (found.rewards["model"], 2), (found.kl, 2))
    )
    far = "0" if found.kl.mean == 0 else kl
    end = ["", ""] if one.at_matched_kl is None else [f"{one.at_matched_kl:.3f}", f"{one.episodes:.0f}"]
    cells = [
        NAMES[arm.name], true, score, far, f"{found.response_tokens.mean:.1f}", f"{one.distinct:.2f}", *end,
    ]  # fmt: skip
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def test_the_page_states_what_the_archive_holds(tmp_path: Path) -> None:
    with tarfile.open(DOCS / "evidence/language_seed0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    page = (DOCS / "language.md").read_text()
    results = summarise(tuned_before(on_first_seeds(EXPERIMENT, 1), 1.0), tmp_path)
    assert {arm.name for arm in results} == NAMES.keys()
    for arm in results:
        assert _row(arm) in page
    found = attribution(tmp_path / "seed0/rto_x1", tmp_path / "seed0/task/prompts_train.jsonl")
    assert (
        f"over {found.num_tokens:,} tokens of RTO's first ten steps; correlation with the program's" in page
    )
    below = f"response in {100 * (found.ranked or 0):.0f} of 100 pairs"
    assert f"credit {found.correlation:.2f};" in page and below in page
