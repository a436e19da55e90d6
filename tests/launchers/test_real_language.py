"""The script around the stages of a real language model: order, what is kept, the user's own data, a pool that ends."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from launchers.pretending import is_running, pretending_checkout

PARTS = ("preferences_train", "preferences_test", "prompts_train", "prompts_test")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = pretending_checkout(tmp_path / "checkout")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    return folder


def run(
    checkout: Path, *options: str, fails: str = "nothing", dtype: str = "bf16"
) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launchers/real_language.sh", "--root", "run", "--model", "model", *options]
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout), "FAILS": fails, "HANGS": "nothing"}
    environment["DTYPE"] = dtype
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def asked(checkout: Path) -> list[str]:
    return [line for line in (checkout / "asked").read_text().splitlines() if not line.startswith("pool")]


def stages(checkout: Path) -> list[str]:
    return [Path(line.split()[3]).stem for line in asked(checkout) if line.startswith("launch")]


def test_pairs_are_made_of_rated_answers_and_every_policy_is_evaluated(checkout: Path) -> None:
    done = run(checkout, "--budget", "small")
    assert done.returncode == 0, done.stderr
    learnt = ["sample", "sample", "reward_model", "dpo", "ppo", "rto"]
    assert stages(checkout) == [*learnt, *["evaluate"] * 4]
    pairs = [line for line in asked(checkout) if line.startswith("data pairs")]
    assert [line.split()[2] for line in pairs] == [
        "run/sampled/evaluation.jsonl",
        "run/sampled_test/evaluation.jsonl",
    ]
    rto = next(line for line in asked(checkout) if "real_language/rto.yaml" in line)
    assert (
        "vars.root=run vars.model=model precision.dtype=bf16 vars.prompts=run/task/prompts_train.jsonl" in rto
    )
    assert "rollout.servers=[http://127.0.0.1:4242]" in rto and "run.steps=2" in rto
    assert [line for line in asked(checkout) if line.startswith(("report", "view"))] == [
        "report run/evaluations", "view run/rto run/ppo --out run/view.html",
    ]  # fmt: skip
    assert "[8/8]" in done.stdout and "left" in done.stdout and "run/view.html" in done.stdout
    assert not is_running(checkout / "pool.pid")


def test_models_are_in_the_dtype_that_the_cpu_had_where_the_run_began(checkout: Path) -> None:
    began = run(checkout, fails="real_language/rto.yaml", dtype="fp32")
    assert "no products of bf16" in began.stdout
    assert run(checkout, dtype="bf16").returncode == 0
    lines = (checkout / "asked").read_text().splitlines()
    assert all("precision.dtype=fp32" in line for line in lines if line.startswith("launch"))
    assert [line.split()[3] for line in lines if line.startswith("pool")] == ["fp32", "fp32"]


def test_what_was_rated_before_is_not_sampled_again(checkout: Path) -> None:
    for name in ("sampled", "sampled_test", "evaluations/start"):
        (checkout / "run" / name).mkdir(parents=True)
        (checkout / "run" / name / "evaluation.json").write_text("{}")
    done = run(checkout)
    assert done.returncode == 0, done.stderr
    assert stages(checkout) == ["reward_model", "dpo", "ppo", "rto", *["evaluate"] * 3]


def own_data(checkout: Path) -> None:
    (checkout / "mine").mkdir()
    for name in (
        "preferences_train.jsonl.gz",
        "preferences_test.parquet",
        "prompts_train.jsonl",
        "prompts_test.jsonl",
    ):
        (checkout / "mine" / name).touch()


def test_own_data_take_the_place_of_the_program(checkout: Path) -> None:
    own_data(checkout)
    done = run(checkout, "--data", "mine")
    assert done.returncode == 0, done.stderr
    assert stages(checkout) == ["reward_model", "dpo", "ppo", "rto", *["evaluate"] * 4]
    lines = asked(checkout)
    assert [Path(line.split()[1]).stem for line in lines[:3]] == ["reward_model", "rto", "evaluate"]
    assert (
        "vars.pairs=mine/preferences_train.jsonl.gz vars.held_out_pairs=mine/preferences_test.parquet"
        in lines[0]
    )
    assert all(
        "rewards=[{kind: model}]" in line for line in lines if "evaluate.yaml" in line or "rto.yaml" in line
    )
    assert "rated by the program" not in done.stdout and "[6/6]" in done.stdout
    (next_run,) = (line for line in done.stdout.splitlines() if "run.dir=run/rto_more" in line)
    assert {"vars.prompts=mine/prompts_train.jsonl", "rewards=[{kind: model}]"} <= set(shlex.split(next_run))


@pytest.mark.parametrize("stage", ["reward_model", "rto", "evaluate"])
def test_data_that_cannot_be_read_are_told_before_anything_is_trained(stage: str, checkout: Path) -> None:
    own_data(checkout)
    refused = run(checkout, "--data", "mine", fails=f"check launchers/recipes/real_language/{stage}.yaml")
    assert refused.returncode == 1 and "error: models.policy is missing" in refused.stderr
    assert stages(checkout) == [] and not (checkout / "pool.pid").exists()


@pytest.mark.parametrize("missing", PARTS)
def test_data_without_a_part_are_refused_at_once(missing: str, checkout: Path) -> None:
    (checkout / "mine").mkdir()
    for name in PARTS:
        if name != missing:
            (checkout / f"mine/{name}.jsonl").touch()
    refused = run(checkout, "--data", "mine")
    assert refused.returncode == 2 and f"mine has no {missing}.jsonl" in refused.stderr
    assert refused.stderr.count("error:") == 1 and not (checkout / "asked").exists()


def test_a_folder_without_a_model_is_refused_at_once(checkout: Path) -> None:
    (checkout / "model/config.json").unlink()
    refused = run(checkout)
    assert refused.returncode == 2 and "--model model holds no config.json" in refused.stderr
    assert not (checkout / "asked").exists()


def test_a_failed_stage_names_the_way_on_with_all_options(checkout: Path) -> None:
    failed = run(checkout, "--budget", "small", fails="real_language/dpo.yaml")
    assert failed.returncode == 1 and "error: models.policy is missing" in failed.stderr
    assert "real_language.sh --budget small --root run --model model" in failed.stderr
    assert not is_running(checkout / "pool.pid")
