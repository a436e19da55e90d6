"""Preference stages at their edges: few held-out examples, an early end, verdicts, tied embeddings, vocabularies."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import write_llama
from torch import Tensor
from trainer.tiny_runs import configure, train, write_rows

from rto_megatron.lifecycle.stopping import STOP_FILE
from rto_megatron.reporting.metrics import read_metrics


def write_verdicts(path: Path, count: int) -> str:
    words = ["red", "blue", "green", "fox"]
    rows = [
        {"prompt": words[i % 4], "completion": f"{words[(i + 1) % 4]} sun", "label": i % 2 == 0}
        for i in range(count)
    ]
    write_rows(path, rows)
    return str(path)


def test_kto_trains_and_evaluates_on_verdicts(files: Path, tmp_path: Path) -> None:
    config = configure(
        "kto",
        files,
        tmp_path / "run",
        "dp2",
        run__steps=2,
        data__train=write_verdicts(tmp_path / "train.jsonl", 8),
        data__eval=write_verdicts(tmp_path / "eval.jsonl", 3),
        data__eval_samples=2,
    )
    assert run_ranks(2, train, config, timeout_seconds=60) == [None] * 2
    entry = read_metrics(tmp_path / "run")[-1]
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"])
    assert "eval/loss" in entry


def test_a_reference_of_another_layout_is_asked_when_one_replica_has_no_pairs_left(
    files: Path, tmp_path: Path
) -> None:
    # Sixteen pairs are evaluated at a time, and the second of two replicas holds no more of the 33.
    rows = (files / "pairs.jsonl").read_text().splitlines(keepends=True)
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join((rows * 2)[:33]))
    keys = {"data__eval": str(held_out), "data__eval_samples": 33, "run__steps": 1, "batch__micro": 1}
    of_reference = {"parallel__roles": {"reference": {"tensor": 2}}}
    one = configure("dpo", files, tmp_path / "one", **keys)
    two = configure("dpo", files, tmp_path / "dp2", "dp2", **keys, **of_reference)
    assert run_ranks(1, train, one, timeout_seconds=60) == [None]
    assert run_ranks(2, train, two, timeout_seconds=60) == [None] * 2
    losses = [read_metrics(tmp_path / layout)[-1]["eval/loss"] for layout in ("one", "dp2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("stage", ["dpo", "tdpo", "kto"])
def test_fewer_held_out_examples_than_replicas_are_evaluated(stage: str, files: Path, tmp_path: Path) -> None:
    # KTO needs two prompts for its baseline, and then one of three replicas has no answer.
    source = write_verdicts(tmp_path / "eval.jsonl", 2) if stage == "kto" else str(files / "pairs.jsonl")
    keys = {"data__eval": source, "data__eval_samples": 2 if stage == "kto" else 1, "batch__train": 6}
    num_replicas = 3 if stage == "kto" else 2
    one, many = (
        configure(stage, files, tmp_path / layout, layout, run__steps=1, batch__micro=1, **keys)
        for layout in ("one", "dp2")
    )
    assert run_ranks(1, train, one, timeout_seconds=60) == [None]
    assert run_ranks(num_replicas, train, many, timeout_seconds=60) == [None] * num_replicas
    losses = [read_metrics(tmp_path / layout)[-1]["eval/loss"] for layout in ("one", "dp2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_reward_model_that_is_told_to_stop_keeps_mean_and_std_of_its_scores(
    files: Path, tmp_path: Path
) -> None:
    (tmp_path / STOP_FILE).touch()
    config = configure("reward_model", files, tmp_path)
    (ending,) = run_ranks(1, train, config)
    assert ending is not None and ending.startswith("told to stop; step 1 of 4 is saved")
    kept = json.loads((tmp_path / "checkpoints/step_000001/reward/hf/config.json").read_text())
    (entry,) = read_metrics(tmp_path)
    count, mean = 12, entry["eval/mean_reward"]  # both answers of six pairs
    variance = (entry["eval/mean_squared_reward"] - mean**2) * count / (count - 1)
    assert kept["mean"] == pytest.approx(mean)
    assert kept["std"] == pytest.approx(variance**0.5)


def _exported(files: Path, run_dir: Path, layout: str, models: Path) -> dict[str, Tensor]:
    config = configure(
        "tdpo", files, run_dir, layout, run__steps=1, run__save_every=None,
        models__policy=models / "policy", models__reference=models / "reference",
        optimizer__kind="sgd", optimizer__lr=0.5, optimizer__max_grad_norm=None, optimizer__warmup_fraction=0.0,
    )  # fmt: skip
    num_ranks = LAYOUTS[layout][0]
    assert run_ranks(num_ranks, train, config) == [None] * num_ranks
    return {n: t for f in (run_dir / "hf").glob("*.safetensors") for n, t in load_file(f).items()}


def _write_models(files: Path, root: Path, is_tied: bool, vocab_sizes: tuple[int, int]) -> None:
    for role, seed, size in zip(("policy", "reference"), (7, 9), vocab_sizes, strict=True):
        write_llama(root / role, seed, vocab_size=size, is_tied=is_tied)
        shutil.copytree(files / "tokenizer", root / role, dirs_exist_ok=True)


def test_tdpo_with_tied_embeddings_equals_one_rank(files: Path, tmp_path: Path) -> None:
    _write_models(files, tmp_path, True, (96, 96))
    start = load_file(tmp_path / "policy/model.safetensors")
    want = _exported(files, tmp_path / "one", "one", tmp_path)
    for layout in ("pp2", "tp2", "tp2_pp2_sp"):
        got = _exported(files, tmp_path / layout, layout, tmp_path)
        worst = max(
            float((got[n] - want[n]).norm() / (want[n] - start[n]).norm().clamp(min=1e-12)) for n in start
        )
        print(layout, f"{worst:.1e}")
        assert worst < 1e-4
    assert not torch.equal(want["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_tdpo_refuses_models_of_unlike_vocabularies(files: Path, tmp_path: Path) -> None:
    _write_models(files, tmp_path, False, (96, 98))
    config = configure(
        "tdpo",
        files,
        tmp_path / "run",
        models__policy=tmp_path / "policy",
        models__reference=tmp_path / "reference",
    )
    (error,) = run_ranks(1, train, config)
    assert error is not None
    assert "models.reference has vocab_size=98 and models.policy 96; stage tdpo compares whole" in error


@pytest.mark.parametrize("steps", [2, None])
def test_a_warmup_as_long_as_the_run_is_refused(steps: int | None, files: Path, tmp_path: Path) -> None:
    config = configure("ppo", files, tmp_path, run__steps=steps, algorithm__critic_warmup_steps=99)
    (error,) = run_ranks(1, train, config)
    assert error is not None and "critic_warmup_steps=99 leaves no step for the policy in a run of" in error


def test_too_few_pretraining_texts_are_named(files: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "texts.jsonl", [{"text": "red fox"}])
    config = configure("ppo", files, tmp_path / "run", data__pretrain=str(tmp_path / "texts.jsonl"))
    (error,) = run_ranks(1, train, config)
    assert error is not None and "texts.jsonl has 1 texts" in error and "name more texts" in error
