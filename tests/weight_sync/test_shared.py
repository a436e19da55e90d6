"""The wire through shared memory, between forked processes: each has its own end, as trainer ranks and workers have."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from rto_megatron.generation.vllm.worker.receiver import Receiver, Staged
from rto_megatron.generation.vllm.worker.regions import whole
from rto_megatron.weight_sync.control_channel import ControlChannel, TransportError
from rto_megatron.weight_sync.manifest import Manifest, PieceSpec
from rto_megatron.weight_sync.sender import Sender
from rto_megatron.weight_sync.shared import (
    HostStagingBuffer,
    ipc_handle,
    ipc_text,
    open_staging_buffer,
    partners,
    shared,
)
from rto_megatron.weight_sync.transport import LOOPBACK, Communicator, MakeWire, Rendezvous, Wire, listen

CPU = torch.device("cpu")


KEPT: list[Communicator] = []  # the store lives as long as rank 0's end


def on_ranks[T](
    num_senders: int,
    world_size: int,
    work: Callable[[Communicator], T],
    timeout_s: float = 20,
    killed: int | None = None,
    make_wire: MakeWire = shared,
) -> list[T | str | int]:
    """Runs `work` on forked ranks; returns what it returned, or the text of a TransportError.

    Args:
        killed: the rank that ends itself; its exit code stands in for what it would return.
    """
    listener = listen(LOOPBACK)
    meeting = Rendezvous(
        host=LOOPBACK,
        port=listener.getsockname()[1],
        num_senders=num_senders,
        world_size=world_size,
        name="test",
        timeout_s=timeout_s,
        device_type="cpu",
        wire="shared",
    )

    def rank_main() -> T | str | int:
        rank = int(os.environ["RANK"])
        if rank == killed and (child := os.fork()):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        communicator = Communicator(meeting, rank, CPU, listener if rank == 0 else None, make_wire)
        KEPT.append(communicator)
        try:
            communicator.join()
            return work(communicator)
        except TransportError as error:
            return str(error)

    try:
        return run_ranks(world_size, rank_main, timeout_seconds=60)
    finally:
        listener.close()


def numbers(version: int, spec: PieceSpec) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * version + sum(spec.name.encode()) + spec.start)
    return torch.randn(spec.size, generator=generator)


def specs(num_senders: int) -> tuple[PieceSpec, ...]:
    """Each sender holds a run of every tensor; the embedding's run is larger than a bucket."""
    shapes = {"embed": (64 * num_senders, 96), "a": (2 * num_senders, 32), "b": (4 * num_senders,)}
    return tuple(
        PieceSpec(
            name,
            "float32",
            shape,
            sender,
            0,
            sender * (shape[0] // num_senders),
            shape[0] // num_senders,
        )
        for name, shape in shapes.items()
        for sender in range(num_senders)
    )


def pieces(manifest: Manifest, sender: int, version: int) -> Iterator[tuple[str, Tensor]]:
    return iter([(spec.name, numbers(version, spec)) for spec in manifest.specs if spec.sender == sender])


@pytest.mark.parametrize(("num_senders", "num_workers"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)])
def test_every_worker_gets_every_push_whole_also_a_tensor_larger_than_a_bucket(
    num_senders: int, num_workers: int
) -> None:
    manifest = Manifest(4096, specs(num_senders))
    assert max(bucket.num_bytes for bucket in manifest.buckets()) == 64 * 96 * 4
    needs = {name: (whole(spec.shape),) for name, spec in manifest.tensors().items()}

    def work(communicator: Communicator) -> list[dict[str, Tensor]]:
        if communicator.rank < num_senders:
            sender = Sender(manifest, communicator)
            for version in (1, 2, 3):
                sender.send(version, pieces(manifest, communicator.rank, version))
            return []
        receiver = Receiver(manifest, needs, communicator)
        held: list[Staged] = []
        for version in (1, 2, 3):
            agree_as_sender_does(manifest, version, communicator)
            held.append(receiver.receive(version))
        return [dict(staged.tensors(manifest.tensors())) for staged in held]

    answers = on_ranks(num_senders, num_senders + num_workers, work)
    for pushes in answers[num_senders:]:
        assert not isinstance(pushes, str), pushes
        for version, received in zip((1, 2, 3), pushes, strict=True):
            for spec in manifest.specs:
                run = received[spec.name][spec.start : spec.start + spec.length]
                assert torch.equal(run, numbers(version, spec)), (version, spec)


def agree_as_sender_does(manifest: Manifest, version: int, communicator: Communicator) -> None:
    communicator.agree(None, f"{version}/{manifest.sha256()}")


def test_a_slot_is_not_filled_again_before_its_slowest_reader_is_done() -> None:
    num_buckets = 7

    def work(communicator: Communicator) -> list[int]:
        if communicator.rank == 0:
            buffers = communicator.send_buffers(5000)
            in_flight = None
            for number in range(num_buckets):
                # As Sender does: the next bucket is packed while the one before may still be read.
                buffers[number % 2].fill_(number)
                begun = communicator.start_broadcast(buffers[number % 2], 0)
                if in_flight is not None:
                    communicator.finish(in_flight)
                in_flight = begun
            assert in_flight is not None
            communicator.finish(in_flight)
            return []
        seen = []
        for _ in range(num_buckets):
            buffer = torch.empty(5000, dtype=torch.uint8)
            time.sleep(0.1 * (communicator.rank - 1))
            communicator.broadcast(buffer, 0)
            seen += buffer.unique().tolist()
        return seen

    assert on_ranks(1, 3, work)[1:] == [list(range(num_buckets))] * 2


def test_many_buckets_leave_no_words_behind_in_the_store() -> None:
    def work(communicator: Communicator) -> int:
        buffer = torch.empty(64, dtype=torch.uint8)
        buffers = communicator.send_buffers(64) if communicator.rank == 0 else (buffer, buffer)
        for number in range(50):
            communicator.broadcast(buffers[number % 2], 0)
        communicator.exchange("")
        return communicator._channel.store.num_keys()

    one, other = on_ranks(1, 2, work)
    assert isinstance(one, int) and one < 12, (one, other)


def test_a_staging_buffer_has_no_name_that_could_outlive_its_processes() -> None:
    staging = HostStagingBuffer(1 << 20)
    process, file, _ = json.loads(staging.handle())
    there = Path(f"/proc/{process}/fd/{file}")
    assert there.readlink().name == "memfd:rto-staging (deleted)"
    mapped = open_staging_buffer(staging.handle(), CPU)
    staging.memory.fill_(7)
    del staging
    assert not there.exists()  # closed with its owner, and the reader's memory lives on
    assert mapped.unique().tolist() == [7]
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    del mapped
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open - 1  # python's mmap holds one


@pytest.mark.parametrize("killed", [0, 1, 3], ids=["store's sender", "other sender", "worker"])
def test_a_killed_end_is_noticed_within_the_limit(killed: int) -> None:
    def broadcast_twice(communicator: Communicator) -> float:
        buffer = torch.zeros(1 << 20, dtype=torch.uint8)
        is_sender = communicator.rank < 2
        buffers = communicator.send_buffers(1 << 20) if is_sender else (buffer, buffer)
        started = time.monotonic()
        with pytest.raises(TransportError):
            communicator.broadcast(buffers[0], 0)
            if communicator.rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            communicator.broadcast(buffers[1], 1)
            communicator.broadcast(buffers[0], 0)
            communicator.exchange("")
        return time.monotonic() - started

    waits = on_ranks(2, 4, broadcast_twice, timeout_s=2, killed=killed)
    assert waits[killed] == -signal.SIGKILL
    assert all(0 <= float(wait) < 5 for rank, wait in enumerate(waits) if rank != killed), waits


def test_an_abort_ends_the_wait_of_every_rank_with_its_words() -> None:
    def work(communicator: Communicator) -> None:
        if communicator.rank == 2:
            time.sleep(0.3)
            communicator.abort("the server is gone")
            return
        buffer = torch.zeros(64, dtype=torch.uint8)
        buffers = communicator.send_buffers(64) if communicator.rank == 0 else (buffer, buffer)
        for number in range(2):
            communicator.broadcast(buffers[number], 0)

    sender, reader, aborter = on_ranks(1, 3, work, timeout_s=30)
    assert sender == "weight transfer given up: the server is gone" and aborter is None
    assert reader == sender


def test_workers_find_partners_on_their_device_evenly() -> None:
    assert partners(["x", "x", "x", "x", "x"], 2) == {2: 0, 3: 1, 4: 0}
    assert partners(["gpu 0", "gpu 1", "gpu 1", "gpu 0"], 2) == {2: 1, 3: 0}
    with pytest.raises(TransportError, match="worker 1 of the pool is on gpu 2, where no trainer rank is"):
        partners(["gpu 0", "gpu 1", "gpu 1", "gpu 2"], 2)


def _elsewhere(channel: ControlChannel, meeting: Rendezvous, device: torch.device) -> Wire:
    """The shared wire, whose ranks say that they are in different places."""
    wire = shared(channel, meeting, device)
    wire.memory = "here" if channel.rank == 0 else "there"
    return wire


def test_a_worker_elsewhere_is_refused_on_every_rank() -> None:
    answers = on_ranks(1, 2, lambda communicator: None, make_wire=_elsewhere)
    assert answers == [answers[0]] * 2 and "is on there, where no trainer rank is" in str(answers[0])


def test_a_cuda_handle_survives_as_text() -> None:
    handle = (0, b"\x00\xff\x7f", 1 << 40, 512, b"/torch_1_2\x00", 3, b"", True)
    assert ipc_handle(ipc_text(handle)) == handle


def test_another_file_than_the_shared_one_is_refused() -> None:
    staging = HostStagingBuffer(64)
    process, file, inode = json.loads(staging.handle())
    with pytest.raises(RuntimeError, match="is another file"):
        open_staging_buffer(json.dumps([process, file, inode + 1]), CPU)
    with pytest.raises(RuntimeError, match="cannot open the memory"):
        open_staging_buffer(json.dumps([process, 999, inode]), CPU)
