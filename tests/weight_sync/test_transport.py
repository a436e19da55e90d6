"""The communicator between threads of one process, each with its own end."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rto_megatron.weight_sync.control_channel import TransportError
from rto_megatron.weight_sync.manifest import Manifest, PieceSpec
from rto_megatron.weight_sync.sender import Sender, agree_on_manifest
from rto_megatron.weight_sync.transport import (
    LOOPBACK,
    Communicator,
    DisagreementError,
    Rendezvous,
    listen,
)


def spec(name: str, length: int) -> PieceSpec:
    return PieceSpec(name, "float32", (length,), 0, 0, 0, length)


def run_ranks[T](
    world_size: int, work: Callable[[Communicator], T], timeout_s: float = 10
) -> list[T | Exception]:
    """Runs `work` on every rank of a communicator; returns what it returned or raised."""
    listener = listen(LOOPBACK)
    meeting = Rendezvous(LOOPBACK, listener.getsockname()[1], 1, world_size, "test", timeout_s, "cpu")

    def rank_main(rank: int) -> T | Exception:
        try:
            end = Communicator(meeting, rank, torch.device("cpu"), listener if rank == 0 else None)
            end.join()
            return work(end)
        except (DisagreementError, TransportError) as error:
            return error

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(rank_main, range(world_size)))


def test_broadcast_reaches_every_rank_from_any_source() -> None:
    def work(communicator: Communicator) -> list[int]:
        received = []
        for source in range(3):
            buffer = torch.full((4,), communicator.rank, dtype=torch.uint8)
            communicator.broadcast(buffer, source)
            received += buffer.tolist()
        return received

    assert run_ranks(3, work) == [[0] * 4 + [1] * 4 + [2] * 4] * 3


def test_an_error_of_one_rank_stops_all_with_its_words() -> None:
    errors = run_ranks(
        3, lambda communicator: communicator.agree("tensor lost" if communicator.rank == 1 else None)
    )
    assert [str(error) for error in errors] == ["rank 1: tensor lost"] * 3


def test_another_manifest_on_one_rank_is_named_on_all() -> None:
    def work(communicator: Communicator) -> None:
        length = 4 if communicator.rank < 2 else 5
        agree_on_manifest(Manifest(100, (spec("norm", length),)), 1, communicator, None)

    errors = run_ranks(3, work)
    expected = "entry 0: norm float32 [4] from sender 0 against norm float32 [5] from sender 0"
    assert [str(error) for error in errors] == [
        f"ranks [2] hold another weight manifest than rank 0: {expected}"
    ] * 3


def test_a_source_that_breaks_its_promise_is_named() -> None:
    manifest = Manifest(100, (spec("a", 2), spec("b", 2)))
    wrong_name = [("a", torch.zeros(2)), ("c", torch.zeros(2))]
    wrong_shape = [("a", torch.zeros(3)), ("b", torch.zeros(2))]
    wrong_dtype = [("a", torch.zeros(2)), ("b", torch.zeros(2).bfloat16())]
    too_few = [("a", torch.zeros(2))]
    too_many = [("a", torch.zeros(2)), ("b", torch.zeros(2)), ("c", torch.zeros(2))]
    for pairs, words in (
        (wrong_name, r"yielded c float32 \[2\], its specs declare b float32 \[2\]"),
        (wrong_shape, r"yielded a float32 \[3\]"),
        (wrong_dtype, r"yielded b bfloat16 \[2\]"),
        (too_few, r"ended before b float32 \[2\]"),
        (too_many, "more pieces than it declared"),
    ):
        (error,) = run_ranks(
            1, lambda communicator, pairs=pairs: Sender(manifest, communicator).send(1, iter(pairs))
        )
        assert isinstance(error, DisagreementError)
        with pytest.raises(DisagreementError, match=words):
            raise error


def test_a_silent_rank_is_named_after_the_time_limit() -> None:
    def work(communicator: Communicator) -> None:
        if communicator.rank == 1:
            time.sleep(2.5)
        else:
            communicator.exchange("here")

    first, second = run_ranks(2, work, timeout_s=1)
    assert isinstance(first, TransportError) and "rank 1" in str(first)
    assert second is None


def test_a_missing_broadcast_ends_after_the_time_limit() -> None:
    def work(communicator: Communicator) -> None:
        if communicator.rank == 1:
            communicator.broadcast(torch.zeros(4), 0)
        else:
            time.sleep(2.5)

    _, error = run_ranks(2, work, timeout_s=1)
    assert isinstance(error, TransportError) and "rank 0" in str(error)


def test_an_abort_ends_every_wait_with_its_reason() -> None:
    def work(communicator: Communicator) -> None:
        if communicator.rank == 0:
            communicator.abort("the server is gone")
            time.sleep(1)  # its store must outlive the others' waits
        elif communicator.rank == 1:
            communicator.exchange("here")
        else:
            communicator.broadcast(torch.zeros(4), 0)

    first, *others = run_ranks(3, work, timeout_s=60)
    assert first is None
    assert all(isinstance(one, TransportError) and "the server is gone" in str(one) for one in others)


def test_a_rank_that_gives_up_ends_its_broadcasts_in_flight() -> None:
    has_joined, has_ended = threading.Event(), threading.Event()

    def work(communicator: Communicator) -> bool:
        if communicator.rank == 0:
            has_joined.set()
            return has_ended.wait(50)  # in the group, and sends nothing
        assert has_joined.wait(50)
        broadcast = communicator.start_broadcast(torch.zeros(4), 0)
        communicator.give_up("the server is gone")
        with pytest.raises(RuntimeError, match="closed by peer"):  # not "Timed out"
            broadcast.in_flight.wait()
        has_ended.set()
        return True

    assert run_ranks(2, work, timeout_s=60) == [True, True]


def test_nobody_waits_for_what_was_on_its_way_when_its_ranks_gave_up() -> None:
    # Longer than a test may take. A group that is left with half a message in it waits for this limit.
    timeout_s = 600
    num_bytes = 256 << 20
    has_begun = threading.Event()

    def work(communicator: Communicator) -> None:
        buffer = torch.full((num_bytes,), 1 - communicator.rank, dtype=torch.uint8)
        communicator.start_broadcast(buffer, 0)
        if communicator.rank == 1:
            while not buffer[0]:
                time.sleep(1e-4)
            has_begun.set()
        assert has_begun.wait(50)
        communicator.give_up("a trainer rank failed")
        with pytest.raises(TransportError, match="given up"):
            communicator.start_broadcast(buffer, 0)

    assert run_ranks(2, work, timeout_s) == [None, None]


def test_a_rank_that_loses_a_peer_tells_the_others() -> None:
    def work(communicator: Communicator) -> None:
        communicator.exchange("joined")  # who leaves before could not be told from who never came
        if communicator.rank == 0:
            communicator.exchange("here")
        elif communicator.rank == 1:
            communicator.broadcast(torch.zeros(4), 2)

    first, second, _ = run_ranks(3, work, timeout_s=60)  # rank 2 leaves
    assert isinstance(first, TransportError) and isinstance(second, TransportError)
    assert str(second).startswith("weight transfer: broadcast from rank 2 failed")
    assert str(first) == f"weight transfer given up: {second}"
