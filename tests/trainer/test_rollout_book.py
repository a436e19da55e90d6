"""What a run keeps of its rollouts: right by another library, the same on two replicas, bounded, once per step."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from engine.layouts import LAYOUTS
from ranks import run_ranks
from trainer.tiny_runs import configure, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.errors import UserError
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.reporting.rollout_files import kept_steps, read_rollouts
from rto_megatron.reporting.rollout_query import RolloutQuery, find_rollouts


def _run(files: Path, run_dir: Path, layout: str, **changes: object) -> pa.Table:
    config = configure("rto", files, run_dir, layout, **changes)
    assert run_ranks(LAYOUTS[layout][0], train, config) == [None] * LAYOUTS[layout][0]
    return read_rollouts(run_dir)


@pytest.fixture(scope="module")
def run_dir(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of RTO, of which the last two are kept."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    _run(files, folder, "one", run__steps=3, run__keep_rollouts=2)
    return folder


def _logprobs(folder: Path, row: dict[str, Any]) -> list[float]:
    """transformers' log-probs of the response's tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    logp = model(ids).logits[0].log_softmax(-1)
    start = len(row["prompt_ids"])
    return [float(logp[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])]


def _assert_speed(logged: dict[str, float], rows: list[dict[str, Any]], files: Path) -> None:
    """Five forwards of each response, and three more for each of the passes of policy and critic over it."""
    shape = AutoModelForCausalLM.from_pretrained(files / "models/policy").config
    hidden, heads, kv_heads = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
    size = hidden // heads
    layer = hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * shape.intermediate_size
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]

    def forward(head: int, read: list[int], asked: list[int]) -> int:
        products = 2 * (shape.num_hidden_layers * layer * sum(read) + hidden * head * sum(asked))
        return products + 2 * shape.num_hidden_layers * heads * size * sum(one**2 for one in read)

    # The reward model reads a cut response with an end of sequence behind it.
    closed = [one + (row["finish_reason"] == "length") for one, row in zip(lengths, rows, strict=True)]
    # Policy, reference, DPO model, whose head is read at responses; critic and reward model, whose head has one row.
    answers = [len(row["response_ids"]) for row in rows]
    flops = (3 + 3) * forward(shape.vocab_size, lengths, answers)
    flops += (1 + 3) * forward(1, lengths, lengths) + forward(1, closed, closed)
    assert logged["time/model_tflops"] == pytest.approx(flops / 2 / logged["time/step_s"] / 1e12, rel=1e-6)
    assert logged["time/mfu"] == pytest.approx(logged["time/model_tflops"] / 0.5)
    assert logged["memory/peak_gib"] > 0.05


def test_log_probs_texts_and_sums_are_those_of_the_models(files: Path, tmp_path: Path) -> None:
    # Of the first step, whose policy is the folder's.
    traced = {"run__profile": (1,), "run__peak_tflops": 0.5}
    table = _run(files, tmp_path / "run", "dp2", run__steps=1, **traced)
    assert table.num_rows == 8 and len(kept_steps(tmp_path / "run")[1]) == 2
    tokenizer = AutoTokenizer.from_pretrained(files / "tokenizer")
    row = max(table.to_pylist(), key=lambda one: one["num_tokens"])
    policy, reference, dpo = (
        _logprobs(files / "models" / role, row) for role in ("policy", "reference", "dpo")
    )
    assert row["token/logp_policy"] == pytest.approx(policy, rel=1e-4)
    assert row["token/logp_ref"] == pytest.approx(reference, rel=1e-4)
    ratio = [one - other for one, other in zip(dpo, reference, strict=True)]
    assert row["token/dpo_logratio"] == pytest.approx(ratio, abs=1e-4)
    assert (row["step"], row["version"], row["age"], row["sample"]) == (1, 0, 0, 0)
    assert row["response"] == tokenizer.decode(row["response_ids"])
    assert "".join(row["pieces"]).strip() == row["response"].strip()
    parts = zip(*(row[f"token/reward_{name}"] for name in ("score", "dpo", "kl")), strict=True)
    assert row["token/reward"] == pytest.approx([sum(one) for one in parts], abs=1e-6)
    assert row["reward"] == pytest.approx(sum(row["token/reward"]), abs=1e-5)
    for rank in (0, 1):
        with gzip.open(tmp_path / f"run/profile/step_00000001_rank_{rank:05d}.json.gz") as file:
            assert any("aten::mm" in event.get("name", "") for event in json.load(file)["traceEvents"])
    _assert_speed(read_metrics(tmp_path / "run")[0], table.to_pylist(), files)
    # Two replicas keep what one rank keeps; their whitening is over both.
    mean = torch.cat([torch.tensor(one) for one in table["token/advantage"].to_pylist()]).mean()
    assert float(mean) == pytest.approx(0.0, abs=1e-5)


def test_old_steps_go_and_a_resumed_run_keeps_every_step_once(files: Path, run_dir: Path) -> None:
    assert list(kept_steps(run_dir)) == [2, 3]
    logged = read_metrics(run_dir)
    assert all(0 < entry["time/rollouts_s"] < entry["time/update_s"] for entry in logged)
    # A file of a replica that a resumed run no longer has, of a step behind its checkpoint.
    (run_dir / "rollouts/step_00000004_replica_00007.parquet").touch()
    table = _run(files, run_dir, "one", run__steps=4, run__keep_rollouts=3)
    assert list(kept_steps(run_dir)) == [2, 3, 4]
    assert table["step"].to_pylist() == [2] * 8 + [3] * 8 + [4] * 8


def test_the_command_filters_sorts_and_prints(run_dir: Path) -> None:
    rows = [row for row in read_rollouts(run_dir).to_pylist() if row["step"] == 3]
    middle = sorted(row["reward"] for row in rows)[4]
    expected = sorted((row["reward"] for row in rows if row["reward"] >= middle), reverse=True)
    choice = ["--step", "3", "--at-least", str(middle), "--sort", "reward", "--descending"]
    printed = CliRunner().invoke(app, ["rollouts", str(run_dir), *choice, "--json"])
    found = [json.loads(line) for line in printed.output.splitlines()]
    assert [one["reward"] for one in found] == expected
    assert len(found[0]["token/value"]) == found[0]["num_tokens"]
    of_prompt = ["--prompt", rows[0]["prompt_id"], "--finish", rows[0]["finish_reason"], "--limit", "1"]
    text = CliRunner().invoke(app, ["rollouts", str(run_dir), "--step", "3", *of_prompt]).output
    assert f"1 of {sum(row['prompt_id'] == rows[0]['prompt_id'] for row in rows)} rollouts" in text
    assert rows[0]["response"].split()[0] in text


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (RolloutQuery(steps=(1, 9)), r"of step 1, 9; it keeps those of 2-\d; run.keep_rollouts"),
        (RolloutQuery(sort="rewards"), "'rewards' of the rollouts is not there; did you mean reward"),
        (RolloutQuery(by="token/value"), "'token/value' of the rollouts is a list"),
        (RolloutQuery(prompt_ids=("q1",)), "no rollouts of prompt q1"),
    ],
)
def test_what_is_not_there_is_named(run_dir: Path, query: RolloutQuery, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_rollouts(run_dir, query)


def test_without_rollouts_the_key_is_named(files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.keep_rollouts"):
        read_rollouts(tmp_path)
