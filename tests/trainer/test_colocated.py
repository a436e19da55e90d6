"""The whole loop with the pool in the trainer's place: weights through shared memory, vLLM asleep while it trains."""

from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from pool_server import PoolServer
from ranks import run_ranks
from trainer.pool_runs import require_served, three_steps
from trainer.tiny_runs import join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.generation.vllm.client.phases import PoolPhases
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.trainer.online import train_online

pytestmark = pytest.mark.pool
EVERYTHING = ("policy", "critic", "reference", "reward", "dpo", "gradients", "optimizer")


def _train(config: ReinforcementStage) -> list[str]:
    """Trains; returns the moves that this rank asked of the server, in order."""
    moves = []
    request = ServerClient.request

    def noted(client: ServerClient, method: str, route: str, *rest: object, **named: object) -> object:
        if route.startswith(("/sleep", "/wake_up", "/finish_weight_update", "/resume")):
            moves.append(route.partition("&")[0])
        return request(client, method, route, *rest, **named)  # type: ignore[arg-type]

    ServerClient.request = noted  # type: ignore[assignment, method-assign]
    train_online(config, join(config))
    return moves


@pytest.mark.parametrize(("layout", "offload"), [("one", ()), ("tp2", ()), ("dp2", EVERYTHING)])
def test_the_served_logprobs_are_the_trainers_at_every_step(
    layout: str,
    offload: tuple[str, ...],
    pool_files: Path,
    pool_server: PoolServer,
    tmp_path: Path,
) -> None:
    config = three_steps(
        tmp_path / "run",
        pool_files,
        pool_server,
        layout,
        rollout__colocated=True,
        rollout__gpu_memory_fraction=0.4,
        offload=offload,
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
    require_served(tmp_path / "run", pool_files, pool_server)
