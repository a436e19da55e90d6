"""Run a function as several ranks of one torch.distributed job: forked, so that imports are paid once.

Import what the ranks need (megatron.core above all) at the top of the test module, and start no process
group, DataLoader worker or thread in the test process itself.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import BinaryIO


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback."""


@dataclass(frozen=True)
class _Rank:
    number: int
    pid: int
    answers: Connection
    stacks: BinaryIO


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on.

    Below those that the system gives to connections by itself: one of them could be taken before a rank listens on it.
    """
    while True:
        port = secrets.choice(range(10_000, 20_000))
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_ranks[**P, R](
    world_size: int, fn: Callable[P, R], *args: P.args, timeout_seconds: float = 120.0, **kwargs: P.kwargs
) -> list[R]:
    """Call `fn(*args)` in `world_size` forked processes with the environment that torchrun gives.

    Args:
        world_size: number of processes.
        fn: any function, closures included; starts and leaves process groups as it likes.
        timeout_seconds: hard limit for all ranks together; then every rank is killed.

    Returns:
        What each rank returned, by rank; tensors travel by value.

    Raises:
        RankError: with the traceback of the first rank that failed, or every rank's stack at the time-out.
    """
    port = free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    ranks = [_start(number, world_size, port, lambda: fn(*args, **kwargs)) for number in range(world_size)]
    try:
        return _collect(ranks, time.monotonic() + timeout_seconds, timeout_seconds)
    finally:
        for rank in ranks:
            _kill(rank)


def _start(number: int, world_size: int, port: int, call: Callable[[], object]) -> _Rank:
    receiver, sender = Pipe(duplex=False)
    stacks = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the rank
    # What is garbage here stays as it is in a rank: the destructor of a process group waits for threads it has not.
    gc.freeze()
    pid = os.fork()
    if pid:
        gc.unfreeze()
        sender.close()
        return _Rank(number, pid, receiver, stacks)
    os.setsid()
    os.environ.update(
        RANK=str(number),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(number),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    try:
        answer = pickle.dumps((True, call()))
    except BaseException:  # a rank must answer whatever happens, pytest.fail and sys.exit included
        answer = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send_bytes(answer)
    # The others may still need this rank's sockets and store: the parent ends all ranks together.
    while True:
        signal.pause()


def _collect[R](ranks: Sequence[_Rank], deadline: float, timeout_seconds: float) -> list[R]:
    results: dict[int, R] = {}
    pending = {rank.answers: rank for rank in ranks}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = "\n".join(_stack_of(rank) for rank in pending.values())
            raise RankError(f"no answer within {timeout_seconds} s from these ranks:\n{stacks}")
        for answers in ready:
            rank = pending.pop(answers)
            try:
                succeeded, value = pickle.loads(answers.recv_bytes())  # noqa: S301 -- written by our own child
            except EOFError:
                _, status = os.waitpid(rank.pid, 0)
                raise RankError(f"rank {rank.number} died, wait status {status}") from None
            if not succeeded:
                raise RankError(f"rank {rank.number} of {len(ranks)}:\n{value}")
            results[rank.number] = value
    return [results[rank.number] for rank in ranks]


def _stack_of(rank: _Rank) -> str:
    os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(0.3)
    rank.stacks.seek(0)
    return f"rank {rank.number}:\n{rank.stacks.read().decode()}"


def _kill(rank: _Rank) -> None:
    # The whole session: a rank may have started processes of its own, such as the checkpoint writer's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    # Again by itself: a rank that has not reached setsid leads no session yet.
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(rank.pid, 0)
    rank.answers.close()
    rank.stacks.close()
