"""The check finds a resumed run equal, and names whatever a resume loses."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from trainer.tiny_runs import configure
from typer.testing import CliRunner

from rto_megatron.algorithms.kl_controller import KLController
from rto_megatron.cli.main import app
from rto_megatron.cli.resume_check import resume_check_rank, resumed_layout, run_both, told
from rto_megatron.config import load
from rto_megatron.config.schema import TrainStage
from rto_megatron.data.batches import Batches
from rto_megatron.engine.checkpoint import load_weights
from rto_megatron.engine.megatron import Model
from rto_megatron.errors import RecipeError
from rto_megatron.proofs.resume_compare import Item, compare, compare_layouts
from rto_megatron.proofs.resumed_runs import read_config, resumed_run, run_observed, whole_run
from rto_megatron.trainer import online, run, sampler

ADAPTIVE = {"algorithm__kl_target": 0.05, "algorithm__kl_horizon": 50}


def _compared(judge: Callable[[Path, Path, int], list[Item]], root: Path) -> list[Item]:
    dist.init_process_group("gloo")
    return judge(root / "whole", root / "resumed", 1)


def _train(config: TrainStage, num_ranks: int) -> None:
    run_ranks(num_ranks, run_observed, config)


def _verdict(items: list[Item], tolerance: float) -> tuple[bool, str]:
    lines: list[str] = []
    is_kept = told(items, tolerance, lines.append)
    print("\n".join(lines))
    assert len(lines) == len(items) + 1
    return is_kept, lines[-1]


def _order_of_sums(config: Path) -> tuple[bool, bool, str | None]:
    resume_check_rank(config)
    is_fixed, is_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    return is_fixed, is_warning, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_the_runs_that_are_compared_add_up_in_one_order(files: Path, tmp_path: Path) -> None:
    run = whole_run(configure("dpo", files, tmp_path / "dpo"), 1, tmp_path / "whole")
    # What attention's backward pass asks torch for, and what its products are refused without, on a GPU.
    assert run_ranks(1, _order_of_sums, run.run.dir / "config.yaml") == [(True, False, ":4096:8")]


def test_the_command_finds_a_resumed_rto_run_equal(files: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "rto.yaml"
    recipe.write_text(load.dump(configure("rto", files, tmp_path / "run", **ADAPTIVE)))
    command = [sys.executable, "-m", "rto_megatron.cli.main", "resume-check", str(recipe), "--steps", "1"]
    ended = subprocess.run(
        [*command, "batch.rollout=4"], check=False, capture_output=True, text=True, timeout=400
    )
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0
    *rows, verdict = ended.stdout.strip().splitlines()[-22:]
    assert verdict == "the resumed run equals the whole one bit for bit, in 21 items"
    for name in (
        *(f"{role}: {what}" for role in ("policy", "critic") for what in ("weights", "Adam's first moments")),
        *(
            f"{role}: {what}"
            for role in ("policy", "critic")
            for what in ("optimizer's step", "param_groups")
        ),
        "policy: Adam's second moments",
        "KL controller",
        "data position",
        "step counter",
        "learning rates",
        "logged metrics",
        "random generators",
        "prompts, versions and seeds of requests",
        "exported model",
    ):
        assert any(row.startswith(name) and row.endswith("  equal") for row in rows), name
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "layout", "replicas", "resume_at", "keys"),
    [
        ("dpo", "tp2", 1, None, {}),
        ("dpo", "tp2", 1, "1x1x2", {}),
        # What two replicas had ahead is taken by one.
        ("rto", "one", 2, "1x2x1", {"rollout__ahead": 1, "algorithm__pool_importance_cap": 2.0}),
        pytest.param("rto", "tp2", 1, "1x2x1", {"parallel__roles": {"critic": {}}}, marks=pytest.mark.slow),
        (
            "rto",
            "dp2_of_3",
            2,
            "1x2x1",
            {"parallel__roles": {"critic": {"ranks": "2"}}, "parallel__distributed_optimizer": True},
        ),
        (
            "rto",
            "pp2_v2",
            1,
            "1x1x1,context=2",
            {"parallel__roles": {"critic": {"pipeline": 2, "stages": (1, 3)}}},
        ),
        ("dpo", "cp2", 1, "1x2x1,virtual=2", {}),
        ("dpo", "pp2_v2", 1, None, {}),
    ],
)
def test_a_resumed_run_keeps_everything_at_its_own_layout_and_nearly_at_another(
    stage: str,
    layout: str,
    replicas: int,
    resume_at: str | None,
    keys: dict[str, object],
    files: Path,
    tmp_path: Path,
) -> None:
    config = configure(stage, files, tmp_path / "run", layout, **keys)
    assert isinstance(config, TrainStage)
    parallel, num_ranks = resumed_layout(config, resume_at, replicas)
    run_both(config, 1, replicas, parallel, num_ranks, tmp_path, _train)
    judge, tolerance = (compare, 0.0) if resume_at is None else (compare_layouts, 0.02)
    (items,) = run_ranks(1, _compared, judge, tmp_path)
    is_kept, verdict = _verdict(items, tolerance)
    assert is_kept, verdict
    assert all(item.difference < 1e-3 for item in items)
    assert len(items) >= (9 if resume_at is None else 7)


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainStage:
    """Two steps of RTO in bf16, whose masters and weights are two things."""
    root = tmp_path_factory.mktemp("whole")
    config = configure("rto", files, root / "run", precision__dtype="bf16", **ADAPTIVE)
    assert isinstance(config, TrainStage)
    config = whole_run(config, 1, root / "whole")
    _train(config, 1)
    return config


def _weights_alone(path: Path, model: Model) -> None:
    load_weights(path, model)


def _lose_optimizers() -> None:
    run.restore = _weights_alone


def _lose_critic_moments() -> None:
    restore = run.restore
    run.restore = lambda path, model: (_weights_alone if path.name == "critic" else restore)(path, model)


def _lose_masters() -> None:
    restore = run.restore

    def restore_rounded(path: Path, model: Model) -> None:
        restore(path, model)
        model.optimizer.reload_model_params()

    run.restore = restore_rounded


def _reset_kl() -> None:
    KLController.restored = lambda controller, state: controller


def _forget_data_position() -> None:
    Batches.restore = lambda batches, state: None


def _restart_seeds() -> None:
    seed_step = run.seed_step
    run.seed_step = lambda seed, step, rank: seed_step(seed, step - 1, rank)


def _restart_sampling_seeds() -> None:
    sampling = sampler.sampling
    sampler.sampling = lambda config, setup, step, draw: sampling(config, setup, step - 1, draw)


def _restart_schedule() -> None:
    learning_rate = online.learning_rate
    online.learning_rate = lambda config, step, num_steps: learning_rate(config, 0, num_steps)


# what a resume loses -> (how, the item that is named first, items that must be among those that differ)
LOSSES: dict[str, tuple[Callable[[], None], str, tuple[str, ...]]] = {
    "optimizer state": (
        _lose_optimizers,
        "critic: optimizer's step",
        ("policy: Adam's first moments", "policy: Adam's second moments", "critic: Adam's first moments"),
    ),
    "the critic's moments": (
        _lose_critic_moments,
        "critic: optimizer's step",
        ("critic: Adam's first moments",),
    ),
    "fp32 masters": (_lose_masters, "critic: fp32 master weights", ("policy: fp32 master weights",)),
    "the KL coefficient": (_reset_kl, "policy: weights", ("KL controller",)),
    "the data position": (_forget_data_position, "critic: weights", ("data position",)),
    "the seeds of steps": (_restart_seeds, "random generators", ()),
    "the seeds of requests": (_restart_sampling_seeds, "prompts, versions and seeds of requests", ()),
    "the learning-rate schedule": (_restart_schedule, "critic: weights", ("learning rates",)),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_resume_loses_is_named(loss: str, whole: TrainStage, tmp_path: Path) -> None:
    lose, first, others = LOSSES[loss]

    def resume() -> None:
        lose()
        run_observed(resumed)

    (tmp_path / "whole").symlink_to(whole.run.dir)
    resumed = resumed_run(whole, 1, tmp_path / "resumed", whole.parallel)
    run_ranks(1, resume)
    (items,) = run_ranks(1, _compared, compare, tmp_path)
    is_kept, verdict = _verdict(items, 0.0)
    assert not is_kept
    lost = [item.name for item in items if item.difference]
    assert {first, *others} <= set(lost)
    assert verdict.startswith(f"the resumed run differs, first in {lost[0]}: ")
    if loss in ("the critic's moments", "the seeds of steps", "the seeds of requests"):
        assert not any(name.startswith("policy") for name in lost)


def test_a_stage_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    recipe = Path("launchers/recipes/quickstart/evaluate.yaml")
    with pytest.raises(RecipeError, match="stage evaluate trains nothing"):
        read_config(recipe, ["evaluate.name=x", "models.policy=x"])


@pytest.mark.parametrize("at", ["1x2", "1x2x0", "1x2x1,stages=2", "1x2x1,context=0", "1x2x1 virtual=2"])
def test_what_is_no_layout_to_resume_at_is_refused(at: str, files: Path, tmp_path: Path) -> None:
    config = configure("sft", files, tmp_path / "run")
    assert isinstance(config, TrainStage)
    with pytest.raises(
        RecipeError, match=f"--resume-at {at}: expected tensor x pipeline x data-parallel size"
    ):
        resumed_layout(config, at, 1)


def test_a_tolerance_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    recipe = "launchers/recipes/quickstart/sft.yaml"
    given = ["resume-check", recipe, f"vars.root={tmp_path}", "--tolerance", "0.5"]
    with pytest.raises(RecipeError, match=r"--tolerance 0\.5 has no effect without --resume-at"):
        CliRunner().invoke(app, given, catch_exceptions=False)


@pytest.mark.parametrize("taken", ["notes.txt", "whole/config.yaml", ""])
def test_a_scratch_folder_that_holds_something_is_refused(taken: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / taken).parent.mkdir(parents=True, exist_ok=True)
    (scratch / taken).write_text("mine")
    given = ["resume-check", "launchers/recipes/quickstart/sft.yaml", "--scratch", str(scratch)]
    with pytest.raises(RecipeError, match=r"--scratch \S+scratch: expected a new or empty folder"):
        CliRunner().invoke(app, given, catch_exceptions=False)
