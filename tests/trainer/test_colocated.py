"""The whole loop with the pool in the trainer's place: weights through shared memory, vLLM asleep while it trains."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from pool_server import VOCAB_SIZE, PoolServer
from ranks import run_ranks
from trainer.test_with_pool import _logprobs, pool_files  # noqa: F401 (a fixture)
from trainer.tiny_runs import configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.rollout.client import ServerClient
from rto_megatron.rollout.phases import PoolPhases
from rto_megatron.trainer.metrics import read_metrics
from rto_megatron.trainer.rto import train_rto
from rto_megatron.weight_sync.canary import canary_token_ids

pytestmark = pytest.mark.pool
TOLERANCE = 1e-4  # nats, fp32 on both sides


def _train(config: ReinforcementStage) -> list[str]:
    """Trains; returns the moves that this rank asked of the server, in order."""
    moves = []
    request = ServerClient.request

    def noted(client: ServerClient, method: str, route: str, *rest: object, **named: object) -> object:
        if route.startswith(("/sleep", "/wake_up", "/finish_weight_update", "/resume")):
            moves.append(route.partition("&")[0])
        return request(client, method, route, *rest, **named)  # type: ignore[arg-type]

    ServerClient.request = noted  # type: ignore[assignment, method-assign]
    train_rto(config, join(config))
    return moves


@pytest.mark.parametrize("layout", ["one", "tp2", "dp2"])
def test_the_served_logprobs_are_the_trainers_at_every_step(
    layout: str,
    pool_files: Path,  # noqa: F811
    pool_server: PoolServer,
    tmp_path: Path,
) -> None:
    config = configure(
        "rto",
        pool_files,
        tmp_path / "run",
        layout,
        run__steps=3,
        run__save_every=None,
        optimizer__lr=1e-2,
        rollout__servers=(pool_server.address,),
        rollout__token_file=pool_server.token_file,
        rollout__colocated=True,
        rollout__gpu_memory_fraction=0.4,
        rollout__logprob_tolerance=TOLERANCE,
        rollout__sync_timeout_s=60.0,
        sampling__max_response_tokens=24,
    )
    with ServerClient(pool_server.address, pool_server.token, 60) as client:
        # As the launcher leaves it: asleep before the first rank starts.
        PoolPhases().make_room(client)
    lead, *others = run_ranks(LAYOUTS[layout][0], _train, config)
    moves = [move for move in lead if not move.startswith("/resume")]
    push = ["/sleep?level=2", "/wake_up?tags=weights", "/finish_weight_update", "/wake_up?tags=kv_cache"]
    step = [*push, "/sleep?level=2"]
    assert moves == [*step, *step, *step, *push]  # the pool is left with the trained policy
    # A pause that is lifted early would have vLLM generate without a cache.
    assert all(lead[number - 1] == push[-1] for number, move in enumerate(lead) if move == "/resume")
    assert others == [[]] * (LAYOUTS[layout][0] - 1)
    gaps = [entry["pool/logprob_gap_max"] for entry in read_metrics(tmp_path / "run")]
    print(layout, gaps)
    assert len(gaps) == 3 and max(gaps) < TOLERANCE
    token_ids = canary_token_ids(VOCAB_SIZE)
    with ServerClient(pool_server.address, pool_server.token, 60) as client:
        assert client.weight_version() == "3"
        served = torch.tensor(client.prompt_logprobs(list(token_ids)))
    trained = _logprobs(tmp_path / "run" / "hf", token_ids)
    assert (served - trained).abs().max() < TOLERANCE
    assert (served - _logprobs(pool_files / "models/policy", token_ids)).abs().max() > 100 * TOLERANCE
