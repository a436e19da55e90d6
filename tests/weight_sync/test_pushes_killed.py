"""Servers and trainers killed in the middle of a push. The last file of this folder: it ends the sharded server."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from pool_server import PoolServer, tiny_llama
from ranks import RankError, run_ranks
from torch import Tensor
from trainer_ranks import TOLERANCE, ModelSource, TrainerRanks, served_distance

from rto_megatron.generation.contract import Sampling, StaleWeights
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.types import Prompt
from rto_megatron.weight_sync.push import WeightSync
from rto_megatron.weight_sync.sender import Sender

pytestmark = pytest.mark.pool

TIMEOUT_S = 20.0
FAR_OFF_S = 200.0  # a push that waits for this limit fails: its ranks wait 120 s for each other
MOMENTS = ("sending", "between prepare and commit", "committing")


class Striking(ModelSource):
    """Does something once, when the last stage has sent some buckets."""

    act: Callable[[], None] | None = None

    def pieces(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(super().pieces(sender)):
            if sender == 1 and number == 5 and self.act is not None:
                act, self.act = self.act, None
                act()
            yield pair


def end_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_once_loaded(sender: Sender) -> None:
    """Dies when every worker has loaded the push and waits for the senders' word."""
    communicator = sender._communicator
    workers = range(communicator.num_senders, communicator.world_size)
    while not communicator._channel.are_said(
        [f"{communicator._num_statements + 1}/{rank}" for rank in workers]
    ):
        time.sleep(0.01)
    end_this_process()


def push_and_die(pool: list[PoolServer], moment: str, version: int) -> None:
    """A whole trainer, in a process of its own, that pushes and is killed at that moment."""
    source = Striking(tiny_llama(33), num_stages=2)
    if moment == "sending":
        source.act = end_this_process
    elif moment == "between prepare and commit":
        WeightSync._commit = lambda sync, version: end_this_process()
    else:
        Sender.confirm = end_once_loaded
    TrainerRanks(pool, [source, source], timeout_s=TIMEOUT_S).push(version)


def assert_refuses(server: PoolServer, version: int) -> None:
    prompt, sampling = Prompt("one", (1, 5, 6)), Sampling(max_tokens=2, eos_ids=(2,))
    with pytest.raises(StaleWeights):
        VllmPool([server.address], server.token, timeout_s=60).generate([prompt], sampling, version)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_trainer_leaves_a_server_that_waits_for_the_next(
    pool_server: PoolServer, moment: str
) -> None:
    kill_and_push_again([pool_server], moment, 2000 + 10 * MOMENTS.index(moment))


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_trainer_leaves_servers_that_wait_for_the_next(
    pool_server: PoolServer, sharded_server: PoolServer, moment: str
) -> None:
    kill_and_push_again([pool_server, sharded_server], moment, 2050 + 10 * MOMENTS.index(moment))


def kill_and_push_again(pool: list[PoolServer], moment: str, version: int) -> None:
    """Kills a trainer in its second push; the next trainer finds servers that hold the first and take a third."""
    source = ModelSource(tiny_llama(31), num_stages=2)
    ranks = TrainerRanks(pool, [source, source], timeout_s=TIMEOUT_S)
    assert ranks.push(version).lost == {}
    ranks.close()
    seen = len(pool[-1].log_file.read_text())
    with pytest.raises(RankError, match="died, wait status 9"):
        run_ranks(1, push_and_die, pool, moment, version + 1)
    died = time.monotonic()
    for server in pool:
        # An engine that hangs in a push answers nothing.
        with ServerClient(server.address, server.token, timeout_s=3 * TIMEOUT_S) as client:
            assert client.is_paused()
            assert client.weight_version() == str(version)
        print(f"{moment}: {server.address} answers {time.monotonic() - died:.2f} s after the trainer's death")
        for one in (version, version + 1):
            assert_refuses(server, one)
    said = pool[-1].log_file.read_text()[seen:]
    if moment != "between prepare and commit":  # then no request is under way that could fail
        assert "weight transfer" in said, said
    source.model = tiny_llama(32)
    ranks = TrainerRanks(pool, [source, source], timeout_s=TIMEOUT_S)
    started = time.monotonic()
    assert ranks.push(version + 2).lost == {}
    print(f"{moment}: the next trainer's push took {time.monotonic() - started:.2f} s")
    ranks.close()
    for server in pool:
        assert served_distance(server, source.model) < TOLERANCE


def strike_during_push(well: PoolServer, struck: PoolServer, version: int, strike: Callable[[], None]) -> str:
    """Pushes to two servers of which one is struck midway; returns why it was lost."""
    source = Striking(tiny_llama(41), num_stages=2)
    ranks = TrainerRanks([well, struck], [source, source], timeout_s=FAR_OFF_S)
    assert ranks.push(version).lost == {}
    source.model = tiny_llama(42)
    moments: list[float] = []

    def act() -> None:
        moments.append(time.monotonic())
        strike()

    source.act = act
    report = ranks.push(version + 1)
    print(f"over {time.monotonic() - moments[0]:.2f} s after the strike: {report.lost}, {report.times}")
    assert report.serving == (well.address,)
    assert list(report.lost) == [struck.address]
    assert served_distance(well, source.model) < TOLERANCE
    assert ranks.push(version + 2).serving == (well.address,)
    ranks.close()
    return report.lost[struck.address]


@pytest.mark.slow
def test_a_push_goes_on_without_a_server_whose_engine_is_killed(
    pool_server: PoolServer, sharded_server: PoolServer
) -> None:
    reason = strike_during_push(pool_server, sharded_server, 2100, sharded_server.engine().kill)
    address = sharded_server.address
    assert reason.startswith(f"inference server {address} answered 503 to /update_weights: ")
    assert "the engine of this server has ended" in reason
    sharded_server.process.wait(60)  # raises, where a supervisor would wait for ever


@pytest.mark.slow
def test_a_push_goes_on_without_a_server_that_is_killed(
    pool_server: PoolServer, single_server: PoolServer
) -> None:
    group = single_server.process.pid
    reason = strike_during_push(pool_server, single_server, 2200, lambda: os.killpg(group, signal.SIGKILL))
    assert reason.startswith(f"cannot reach inference server {single_server.address} ")
