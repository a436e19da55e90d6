"""The whole loop against a real vLLM server, weights pushed from Megatron shards at several layouts."""

from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from pool_server import PoolServer
from ranks import run_ranks
from trainer.pool_runs import TOLERANCE, require_served, three_steps
from trainer.tiny_runs import AHEAD, ages, configure, join

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.reporting.metric_names import POOL, metrics_of
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.online import train_online

pytestmark = pytest.mark.pool


def _train(config: ReinforcementStage) -> None:
    train_online(config, join(config))


@pytest.mark.parametrize(
    ("layout", "roles"),
    [
        ("tp2_of_4", {"critic": {"ranks": "2-3"}, "reward": {"ranks": "2-3", "tensor": 2}}),
        pytest.param("pp2", {}, marks=pytest.mark.slow),  # stages are among the last layout too
        ("dp2", {}),
        ("cp2", {"reward": {}}),
        ("tp2_pp2_sp", {"critic": {"tensor": 2}, "reward": {}}),
    ],
)
def test_the_pool_samples_with_the_weights_of_every_step(
    layout: str, roles: dict[str, object], pool_files: Path, pool_server: PoolServer, tmp_path: Path
) -> None:
    config = three_steps(tmp_path / "run", pool_files, pool_server, layout, parallel__roles=roles)
    run_ranks(LAYOUTS[layout][0], _train, config)
    require_served(tmp_path / "run", pool_files, pool_server)


def test_two_replicas_sample_ahead_of_a_push(
    pool_files: Path, pool_server: PoolServer, tmp_path: Path
) -> None:
    run_ranks(2, _train, three_steps(tmp_path / "run", pool_files, pool_server, "dp2", **AHEAD))
    first, *others = read_metrics(tmp_path / "run")
    assert ages(tmp_path / "run") == [0, 1, 1]
    # The pool answers for the weights that it held, which are the trainer's in the first step alone.
    assert first["pool/logprob_gap_max"] < TOLERANCE
    for entry in others:
        assert entry["pool/logprob_gap_mean"] > 10 * TOLERANCE
        assert 1e-4 < abs(entry["pool/importance_mean"] - 1) < 0.5
    with ServerClient(pool_server.address, pool_server.token, 60) as client:
        assert client.weight_version() == "3"


def _train_all(configs: list[ReinforcementStage]) -> None:
    for config in configs:
        _train(config)


def test_every_sampling_method_trains_with_the_pool(
    pool_files: Path, pool_server: PoolServer, tmp_path: Path
) -> None:
    names = [name for name, method in ALGORITHMS.items() if isinstance(method, OnlineMethod)]
    delimiters = {"semi_rto": {"algorithm__delimiters": ("red", "sun")}}
    pairs = {"algorithm__samples_per_prompt": 2, "batch__rollout": 4}
    configs = [
        configure(
            name,
            pool_files,
            tmp_path / name,
            run__steps=1,
            run__save_every=None,
            rollout__servers=(pool_server.address,),
            rollout__token_file=pool_server.token_file,
            rollout__logprob_tolerance=TOLERANCE,
            rollout__logprob_gap_alarm=TOLERANCE,
            rollout__sync_timeout_s=60.0,
            sampling__max_response_tokens=16,
            sampling__temperature=0.8,
            algorithm__pool_importance_cap=2.0,
            **delimiters.get(name, {}),
            **(pairs if ALGORITHMS[name].config().samples_per_prompt > 1 else {}),
        )
        for name in names
    ]
    run_ranks(1, _train_all, configs, timeout_seconds=300)
    for config in configs:
        (metrics,) = read_metrics(config.run.dir)
        print(config.stage, f"gap {metrics['pool/logprob_gap_max']:.1e}")
        assert metrics["pool/logprob_gap_max"] < TOLERANCE
        assert metrics["pool/logprob_gap_alarm"] == metrics["pool/importance_capped_fraction"] == 0
        assert metrics["pool/importance_mean"] == pytest.approx(1, abs=TOLERANCE)
        assert metrics["policy/grad_norm"] > 0
        assert metrics["rollout/response_tokens"] <= 16
        listed = metrics_of(config.stage)
        assert metrics.keys() - {"step", "time"} <= listed.keys()
        assert {name for name, metric in listed.items() if metric.needs == POOL} <= metrics.keys()
