"""What is kept of rollouts does not depend on the layout that scored them: row by row, number by number."""

from pathlib import Path
from typing import Any

import pytest
from engine.layouts import LAYOUTS
from ranks import run_ranks
from trainer.tiny_runs import ENGINE_VOCAB, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.proofs.resumed_runs import ScriptedPool, ScriptedPush
from rto_megatron.reporting.rollout_files import read_rollouts
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online

# Two steps, the second on rollouts that are a step old; the update is too small for rounding to show in what follows.
KEYS: dict[str, object] = {
    "run__steps": 2,
    "run__save_every": None,
    "optimizer": {"lr": 1e-7},
    "critic_optimizer": {"lr": 1e-7},
    "rollout__ahead": 1,
    "algorithm": {"samples_per_prompt": 2, "pool_importance_cap": 2.0, "truncated": "bootstrap"},
    "batch": {"rollout": 4, "train": 4, "micro": 2},
    "rewards": [{"kind": "model", "weight": 0.5}, {"kind": "overlong", "buffer_tokens": 4}],
}


def _train(config: ReinforcementStage) -> None:
    place = join(config)
    pool = ScriptedPool(ENGINE_VOCAB) if place.is_replica_lead else None
    train_online(config, place, ConnectedPool(pool, ScriptedPush(pool)))


def _rows(files: Path, folder: Path, layout: str) -> list[dict[str, Any]]:
    run_ranks(LAYOUTS[layout][0], _train, configure("rto", files, folder / layout, layout, **KEYS))
    rows = read_rollouts(folder / layout).to_pylist()
    return sorted(rows, key=lambda row: (row["step"], row["prompt_id"], row["sample"]))


def _numbers(row: dict[str, Any], column: str) -> list[float]:
    value = row[column]
    return value if isinstance(value, list) else [value]


def test_rows_of_every_layout_are_those_of_one_rank(files: Path, tmp_path: Path) -> None:
    alone = _rows(files, tmp_path, "one")
    assert len(alone) == 16 and {row["age"] for row in alone} == {0, 1}
    measured = [
        name
        for name in alone[0]
        if name.startswith(("token/", "source/", "paid/")) or name in ("score", "reward")
    ]
    # Rewards are differences of log-probs, whose rounding stays where they are small.
    largest = {name: max(1.0, *(abs(x) for row in alone for x in _numbers(row, name))) for name in measured}
    for layout in ("tp2_sp", "pp2", "dp2"):
        for row, expected in zip(_rows(files, tmp_path, layout), alone, strict=True):
            assert row.keys() == expected.keys()
            assert [row[name] for name in row.keys() - largest] == [
                expected[name] for name in row.keys() - largest
            ]
            for name in measured:
                wanted = pytest.approx(_numbers(expected, name), abs=5e-6 * largest[name], rel=0)
                assert _numbers(row, name) == wanted, (layout, name)
