"""Stages whose micro-batches go by tokens, and read a prompt once, compute what one sequence at a time does."""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from models.test_mixtral import write_mixtral
from ranks import run_ranks
from trainer.test_options import exported
from trainer.test_resume import assert_equal_runs, cut_back
from trainer.tiny_runs import ENGINE_VOCAB, WORDS, HeldPush, configure, join, train, write_rows

from rto_megatron.config.schema import ReinforcementStage, Stage
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.types import Prompt, Rollout

SGD = {"kind": "sgd", "lr": 0.05, "schedule": "constant", "warmup_fraction": 0.0}
CLOCKS = ("time", "memory", "perf")


class ByPrompt(ScriptedEngine):
    """Draws from a prompt's id and the version alone, so that any number of replicas samples the same."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        seen: Counter[str] = Counter()
        drawn = []
        for prompt in prompts:
            drawn.append(self._draw(seen[prompt.id], prompt, replace(sampling, seed=5)))
            seen[prompt.id] += 1
        return drawn


def _train_online(config: ReinforcementStage) -> None:
    place = join(config)
    engine = ByPrompt(ENGINE_VOCAB) if place.is_replica_lead else None
    train_online(config, place, ConnectedPool(engine, HeldPush(engine)))


def _runs(stage: str, files: Path, root: Path, layouts: Sequence[str], **keys: object) -> list[Path]:
    """The same run by single sequences on one rank, each with its prompt, then by tokens in each layout."""
    found = []
    for layout, how in [
        ("one", {"micro": 1, "share_prompts": False}),
        *((name, {"tokens": 40}) for name in layouts),
    ]:
        run_dir = root / f"{layout}_{len(found)}"
        batch = {"train": 6, "rollout": 6} if stage == "rto" else {"train": 5}
        config = configure(stage, files, run_dir, layout, batch={**batch, **how}, **keys)
        run_ranks(LAYOUTS[layout][0], _go, config)
        found.append(run_dir)
    return found


def _go(config: Stage) -> None:
    if isinstance(config, ReinforcementStage):
        _train_online(config)
    else:
        assert train(config) is None


def _assert_same(first: Path, second: Path) -> None:
    for one, other in zip(read_metrics(first), read_metrics(second), strict=True):
        expected, found = (
            {key: value for key, value in entry.items() if not key.startswith(CLOCKS)}
            for entry in (one, other)
        )
        assert {"loss", "loss/policy_avg"} & expected.keys()
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    one, other = exported(first / "hf"), exported(second / "hf")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert float((weight - other[name]).abs().max() / weight.abs().max()) < 1e-6, name


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_an_offline_stage_by_tokens_equals_single_examples(stage: str, files: Path, tmp_path: Path) -> None:
    keys = {
        "optimizer": SGD,
        "run__steps": 2,
        "run__save_every": None,
        "data__eval": str(files / "pairs.jsonl"),
    }
    alone, *others = _runs(stage, files, tmp_path, ["dp2", "pp2"], **keys)
    for other in others:
        _assert_same(alone, other)


def test_experts_by_tokens_equal_single_examples(files: Path, tmp_path: Path) -> None:
    write_mixtral(tmp_path / "mixtral")
    shutil.copytree(files / "tokenizer", tmp_path / "mixtral", dirs_exist_ok=True)
    keys = {
        "optimizer": SGD,
        "run__steps": 1,
        "run__save_every": None,
        "models__policy": tmp_path / "mixtral",
        "parallel__overlap_grad_reduce": True,  # of experts without a token too
    }
    alone, other = _runs("sft", files, tmp_path, ["dp2"], **keys)
    _assert_same(alone, other)


def test_an_online_stage_by_tokens_equals_single_responses_in_every_pass(files: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "texts.jsonl", [{"text": " ".join(WORDS[number:])} for number in range(8)])
    keys = {
        "data__pretrain": str(tmp_path / "texts.jsonl"),
        "optimizer": SGD,
        "critic_optimizer": SGD,
        "run__steps": 2,
        "run__save_every": None,
        "algorithm": {"samples_per_prompt": 2, "epochs": 2},
        "parallel__overlap_grad_reduce": True,  # after the last of a number of micro-batches that changes
    }
    alone, *others = _runs("rto", files, tmp_path, ["dp2", "tp2_sp"], **keys)
    for other in others:
        _assert_same(alone, other)
        assert all(0.3 < entry["memory/budget_fill_fraction"] <= 1 for entry in read_metrics(other))
    loads = [[entry["time/busiest_rank_ratio"] for entry in read_metrics(other)] for other in others]
    assert min(loads[0]) > 1 and loads[1] == [1.0, 1.0]  # tensor ranks compute alike, replicas about so


def test_a_resumed_run_by_tokens_is_bit_equal_and_may_go_on_by_number(files: Path, tmp_path: Path) -> None:
    keys = {"algorithm": {"samples_per_prompt": 2, "epochs": 2}}
    by_tokens = {"batch": {"train": 4, "rollout": 4, "tokens": 30}, **keys}
    whole, resumed = (
        configure("grpo", files, tmp_path / name, "dp2", **by_tokens) for name in ("whole", "resumed")
    )
    assert run_ranks(2, train, whole) == [None] * 2
    cut_back(tmp_path / "whole", tmp_path / "resumed")
    shutil.copytree(tmp_path / "resumed", tmp_path / "by_number")
    assert run_ranks(2, train, resumed) == [None] * 2
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
    by_number = {"batch": {"train": 4, "rollout": 4, "micro": 2}, **keys}
    config = configure("grpo", files, tmp_path / "by_number", "one", **by_number)
    assert run_ranks(1, train, config) == [None]


def test_long_rollouts_are_alone_with_a_warning(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {"run__steps": 1, "run__save_every": None, "sampling__max_response_tokens": 30}
    config = configure("grpo", files, tmp_path, batch={"train": 4, "rollout": 4, "tokens": 25}, **keys)
    assert run_ranks(1, train, config) == [None]
    said = " ".join(capfd.readouterr().out.split())
    assert re.search(
        r"step 1: of the rollouts \d+ of \d+ take more than batch\.tokens=25, up to \d+; each", said
    )


def test_a_budget_is_held_against_the_data(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {"run__steps": 1, "run__save_every": None}
    small = configure("dpo", files, tmp_path / "small", batch={"train": 4, "tokens": 12}, **keys)
    (error,) = run_ranks(1, train, small)
    assert error is not None and "batch.tokens=12 is below the longest prompt of" in error
    least = int(error.split("set batch.tokens to ")[1].split()[0])
    capfd.readouterr()
    enough = configure("dpo", files, tmp_path / "enough", batch={"train": 4, "tokens": least}, **keys)
    assert run_ranks(1, train, enough) == [None]
    said = " ".join(capfd.readouterr().out.split())
    assert "of 20 take more than batch.tokens=" in said and "alone in a micro-batch" in said
