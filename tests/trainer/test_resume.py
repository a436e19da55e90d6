"""N steps, a checkpoint and N more steps equal 2 N steps, bit for bit."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine.layouts import LAYOUTS
from megatron.core import dist_checkpointing
from ranks import RankError, run_ranks
from torch import Tensor
from trainer.tiny_runs import ages, configure, train

from rto_megatron.engine.saving import point_to
from rto_megatron.platform.safe_metadata import safe_reading
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.storage.checkpoints import finished_checkpoints
from rto_megatron.trainer.resume import ROLLOUTS_AHEAD


@dataclass(frozen=True)
class Saved:
    """Everything that the checkpoint of a step holds."""

    tensors: dict[str, Tensor]  # weights, optimizer moments and fp32 masters, whole
    common: dict[str, str]  # everything else of the optimizers, such as parameter groups, printed
    state: dict[str, object]


def _read(checkpoint: Path) -> Saved:
    dist.init_process_group("gloo")
    saved = Saved({}, {}, json.loads((checkpoint / "state.json").read_text()))
    for weights in sorted(checkpoint.glob("*/weights")):
        with safe_reading(weights):
            _flatten(weights.parent.name, dist_checkpointing.load_plain_tensors(str(weights)), saved)
    return saved


def _flatten(name: str, value: object, saved: Saved) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{name}/{key}", inner, saved)
    elif isinstance(value, Tensor):
        saved.tensors[name] = value
    else:
        saved.common[name] = str(value)


def read_checkpoint(run_dir: Path, step: int) -> Saved:
    """The checkpoint of `step`."""
    (saved,) = run_ranks(1, _read, run_dir / "checkpoints" / f"step_{step:06d}")
    return saved


def cut_back(run_dir: Path, copy: Path) -> Path:
    """What a run leaves that was killed after step 3: the checkpoint of step 2 and the metrics of three steps."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints/step_000004")
    point_to(copy / "checkpoints/step_000002")
    shutil.rmtree(copy / "hf")
    log = copy / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    return copy


def assert_equal_runs(first: Path, second: Path) -> Saved:
    """Same final checkpoint, same export, same metrics but for the clock."""
    one, other = read_checkpoint(first, 4), read_checkpoint(second, 4)
    assert one.state == other.state
    assert one.common == other.common
    assert one.tensors.keys() == other.tensors.keys()
    assert [key for key in one.tensors if not torch.equal(one.tensors[key], other.tensors[key])] == []
    logs = [
        [
            {k: v for k, v in entry.items() if not k.startswith(("time", "memory"))}
            for entry in read_metrics(run)
        ]
        for run in (first, second)
    ]
    assert [entry["step"] for entry in logs[0]] == [1, 2, 3, 4]
    assert logs[0] == logs[1]
    exports = [sorted((run / "hf").glob("*.safetensors")) for run in (first, second)]
    assert [f.read_bytes() for f in exports[0]] == [f.read_bytes() for f in exports[1]] != []
    return one


CASES = {
    "one": ("one", {}),
    "tp2": ("tp2", {}),
    "pp2-two-ahead": ("pp2", {"rollout__ahead": 2, "algorithm__pool_importance_cap": 2.0}),
    "dp2-written-beside-one-ahead": (
        "dp2",
        {
            "parallel__distributed_optimizer": True,
            "parallel__overlap_grad_reduce": True,
            "run__async_save": True,
            "rollout__ahead": 1,
            "algorithm__pool_importance_cap": 2.0,
        },
    ),
    "tp2-critic-and-reward-dp2-sharded": (
        "tp2",
        {"parallel__roles": {"critic": {}, "reward": {}}, "parallel__distributed_optimizer": True},
    ),
    # The lead has no critic, whose step and parameter groups it writes all the same.
    "tp2-critic-and-reward-on-own-ranks": (
        "tp2_of_4",
        {
            "parallel__roles": {"critic": {"ranks": "2-3"}, "reward": {"ranks": "2-3", "tensor": 2}},
            "algorithm__ema_beta": 0.9,
        },
    ),
    "bf16-dp2-sharded": ("dp2", {"parallel__distributed_optimizer": True, "precision__dtype": "bf16"}),
}


# What one rank and two tensor ranks do is part of the others.
SLOW = {"one", "tp2"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES]
)
def test_resumed_rto_equals_uninterrupted_rto(case: str, files: Path, tmp_path: Path) -> None:
    layout, changes = CASES[case]
    num_ranks = LAYOUTS[layout][0]
    adaptive = {"kl_target": 0.05, "kl_horizon": 50}

    def run(folder: str) -> list[str | None]:
        config = configure("rto", files, tmp_path / folder, layout, **changes)
        config = config.model_copy(update={"algorithm": config.algorithm.model_copy(update=adaptive)})
        return run_ranks(num_ranks, train, config)

    assert run("whole") == [None] * num_ranks
    cut_back(tmp_path / "whole", tmp_path / "resumed")
    assert run("resumed") == [None] * num_ranks
    saved = assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
    print(case, len(saved.tensors), "tensors, coefficient", saved.state["kl"])
    _assert_worth_comparing(saved, read_checkpoint(tmp_path / "whole", 2))
    ahead = changes.get("rollout__ahead", 0)
    assert ages(tmp_path / "resumed") == {0: [0, 0, 0, 0], 1: [0, 1, 1, 1], 2: [0, 1, 2, 1]}[ahead]
    held = [(checkpoint / ROLLOUTS_AHEAD).exists() for checkpoint in finished_checkpoints(tmp_path / "whole")]
    assert held == [ahead > 0, False]


def _assert_worth_comparing(last: Saved, middle: Saved) -> None:
    """Everything that has to survive did move between the two checkpoints."""
    assert last.state["kl"] != middle.state["kl"]
    assert last.state["data"] != middle.state["data"]
    for key, tensor in last.tensors.items():
        assert not torch.equal(tensor, middle.tensors[key]), key
    for role in ("policy", "critic"):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert any(key.startswith(f"{role}/optimizer") and moment in key for key in last.tensors)


def test_runs_whose_pool_died_resume(files: Path, tmp_path: Path) -> None:
    """While it sampled, and in a push, which loses no checkpoint."""
    whole = configure("rto", files, tmp_path / "whole")
    assert run_ranks(1, train, whole) == [None]
    for name, message, how in (
        ("sampling", "the pool died at version 3", {"dies_at": 3}),
        ("pushed to", "the pool died in the push of version 2", {"push_dies_at": 2}),
    ):
        died = configure("rto", files, tmp_path / name)
        assert run_ranks(1, train, died, **how) == [message]
        assert [path.name for path in finished_checkpoints(died.run.dir)] == ["step_000002"]
        assert run_ranks(1, train, died) == [None]
        assert_equal_runs(whole.run.dir, died.run.dir)


@pytest.mark.parametrize(("stage", "layout"), [("sft", "one"), ("reward_model", "tp2"), ("dpo", "pp2")])
def test_resumed_offline_stage_equals_uninterrupted(
    stage: str, layout: str, files: Path, tmp_path: Path
) -> None:
    num_ranks = LAYOUTS[layout][0]
    whole, resumed = (configure(stage, files, tmp_path / name, layout) for name in ("whole", "resumed"))
    assert run_ranks(num_ranks, train, whole) == [None] * num_ranks
    cut_back(tmp_path / "whole", tmp_path / "resumed")
    assert run_ranks(num_ranks, train, resumed) == [None] * num_ranks
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
    configs = [json.loads((tmp_path / name / "hf/config.json").read_text()) for name in ("whole", "resumed")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_sgd_equals_uninterrupted(dtype: str, files: Path, tmp_path: Path) -> None:
    plain = {"optimizer__kind": "sgd", "optimizer__lr": 0.5, "precision__dtype": dtype}
    whole, resumed = (configure("sft", files, tmp_path / name, **plain) for name in ("whole", "resumed"))
    assert run_ranks(1, train, whole) == [None]
    cut_back(tmp_path / "whole", tmp_path / "resumed")
    assert run_ranks(1, train, resumed) == [None]
    saved = assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
    middle = read_checkpoint(tmp_path / "whole", 2)
    assert [key for key, tensor in saved.tensors.items() if torch.equal(tensor, middle.tensors[key])] == []


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two replicas."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_ranks(2, train, configure("sft", files, run_dir, "dp2")) == [None] * 2
    return run_dir


SITES = ("ckpt_shard:{}:1", "ckpt_manifest:{}:0", "ckpt_rename:{}:0", "ckpt_pointer:{}:0")


@pytest.mark.parametrize(
    ("site", "step"),
    [
        *((site, 4) for site in SITES),
        *(pytest.param(site, 2, marks=() if "rename" in site else pytest.mark.slow) for site in SITES),
    ],
)
def test_a_run_killed_in_a_save_resumes_bit_for_bit(
    site: str, step: int, undisturbed: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = f"{site.format(step)}:kill"
    monkeypatch.setenv("RTO_FAULT", fault)
    monkeypatch.setenv("RTO_FAULT_LOG", str(tmp_path / "fired"))
    config = configure("sft", files, tmp_path / "run", "dp2")
    with pytest.raises(RankError, match=r"died, wait status 9|closed by peer|reset by peer"):
        run_ranks(2, train, config)
    stood = [path.name for path in finished_checkpoints(tmp_path / "run")]
    assert stood == [f"step_{one:06d}" for one in (2, 4) if one < step or (one == step and "pointer" in site)]
    assert run_ranks(2, train, config) == [None] * 2
    assert (tmp_path / "fired").read_text() == f"{fault}\n"
    assert_equal_runs(undisturbed, tmp_path / "run")


def test_a_finished_run_of_more_steps_is_refused(files: Path, tmp_path: Path) -> None:
    assert run_ranks(1, train, configure("sft", files, tmp_path, run__steps=2)) == [None]
    (error,) = run_ranks(1, train, configure("sft", files, tmp_path, run__steps=1))
    assert error is not None and "already holds step 2, more than the 1 steps asked for" in error


def test_a_resume_under_another_configuration_is_refused(files: Path, tmp_path: Path) -> None:
    assert run_ranks(1, train, configure("sft", files, tmp_path, run__steps=2)) == [None]
    changed = configure("sft", files, tmp_path, run__seed=7, batch__train=6, data__max_length=150)
    (error,) = run_ranks(1, train, changed)
    assert (
        error is not None
        and f"{tmp_path} holds a checkpoint of a run that was configured differently" in error
    )
    for line in (
        "run.seed: 42 in the checkpoint, 7 in the configuration",
        "batch.train: 4 in the checkpoint, 6 in the configuration",
        "data.max_length: 200 in the checkpoint, 150 in the configuration",
        "name another run.dir",
    ):
        assert line in error
    assert error.count("in the checkpoint") == 3
    (other_stage,) = run_ranks(1, train, configure("dpo", files, tmp_path))
    assert (
        other_stage is not None
        and "stage: 'sft' in the checkpoint, 'dpo' in the configuration" in other_stage
    )


def test_a_resume_may_be_longer_and_arranged_differently(files: Path, tmp_path: Path) -> None:
    assert run_ranks(1, train, configure("sft", files, tmp_path, run__steps=2)) == [None]
    free = {"run__save_every": 1, "batch__micro": 1, "batch__packed": False, "precision__recompute": True,
            "precision__kernels": "auto"}  # fmt: skip
    assert run_ranks(2, train, configure("sft", files, tmp_path, "tp2", run__steps=3, **free)) == [None] * 2
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]


def test_files_of_an_attempt_without_a_checkpoint_are_replaced(files: Path, tmp_path: Path) -> None:
    stale = tmp_path / "model_files/policy"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{")
    assert run_ranks(1, train, configure("sft", files, tmp_path, run__steps=1)) == [None]
    assert sorted(path.name for path in stale.iterdir()) == sorted(
        path.name for path in (files / "models/policy").iterdir() if path.suffix != ".safetensors"
    )
    assert (stale / "config.json").read_text() == (files / "models/policy/config.json").read_text()
