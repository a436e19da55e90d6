"""The doctor on two ranks: one report, by rank 0, that names what differs and where."""

import json
import os
from pathlib import Path

import pytest
from ranks import run_ranks
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.platform.device import prepare

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"


def _doctor(root: Path, debug_on_last: str) -> tuple[int, str]:
    prepare()
    os.environ["NCCL_DEBUG"] = debug_on_last if os.environ["RANK"] == "1" else "WARN"
    overrides = [f"vars.root={root}", f"models.policy={root}/models/policy"]
    shown = CliRunner().invoke(
        app, ["doctor", str(RECIPES / "quickstart" / "sft.yaml"), *overrides, "--json"]
    )
    return shown.exit_code, shown.stdout


@pytest.mark.parametrize(("debug_on_last", "status"), [("WARN", 0), ("INFO", 1)])
def test_a_variable_that_differs_on_one_rank_is_a_problem(
    debug_on_last: str, status: int, tiny_files: Path
) -> None:
    (lead_status, said), other = run_ranks(2, _doctor, tiny_files, debug_on_last)
    assert other == (0, "")
    assert lead_status == status, said
    findings = json.loads(said)["findings"]
    assert {finding["check"] for finding in findings} >= {
        "ranks",
        "models",
        "disk",
        "checkpoints",
        "clocks of ranks",
    }
    problems = [finding for finding in findings if finding["level"] == "problem"]
    if status:
        (problem,) = problems
        assert "NCCL_DEBUG differs: WARN on rank 0 (" in problem["found"]
        assert "INFO on rank 1 (" in problem["found"]
    else:
        assert not problems
    both = next(finding for finding in findings if finding["check"] == "ranks")
    assert both["where"].startswith("ranks 0 1 (")
