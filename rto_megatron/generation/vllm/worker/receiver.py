"""What a worker does during a push: receive buckets, check every piece, and keep what its shard needs until the commit.

Kept is one copy of the worker's shard, in host memory (pinned where the wire is a GPU): the old weights stay
intact and serve on after a push that failed, and device memory is left to the key-value cache. On the device a
push needs two buckets.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_megatron.generation.vllm.worker.regions import Region, piece_region, whole
from rto_megatron.platform.copies import HostPool
from rto_megatron.weight_sync.manifest import (
    DTYPES,
    Bucket,
    Manifest,
    PieceSpec,
    bucket_buffer,
    digest,
    digests,
    slot_view,
)
from rto_megatron.weight_sync.sender import broadcast_each, declared_token
from rto_megatron.weight_sync.transport import Communicator

_SHOWN = 5


@dataclass(frozen=True)
class Staged:
    """A push that arrived whole and was checked.

    Args:
        token: hash of the version and of every piece's digest; equal on all ranks.
        boxes: tensor name -> box that this worker needs -> its numbers, in host memory.
        expected: tensor name -> box -> digest of the numbers.

    Example:
        model.load_weights(staged.tensors(tensors))
    """

    token: str
    boxes: Mapping[str, Mapping[Region, Tensor]]
    expected: Mapping[str, Mapping[Region, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Host memory that is held."""
        return sum(
            box.numel() * box.element_size() for boxes in self.boxes.values() for box in boxes.values()
        )

    def tensors(self, tensors: Mapping[str, PieceSpec]) -> Iterator[tuple[str, Tensor]]:
        """Complete tensors for the loader, one at a time; what this worker does not need of them is not set."""
        for name, boxes in self.boxes.items():
            shape = tensors[name].shape
            full = boxes.get(whole(shape))
            if full is None:
                full = torch.empty(shape, dtype=DTYPES[tensors[name].dtype])
                for box, numbers in boxes.items():
                    box.of(full).copy_(numbers)
            yield name, full


class Receiver:
    """Receives a push; its buffers on a device are freed with it.

    Args:
        manifest: equal on all ranks.
        needs: tensor name -> the boxes that this worker loads.
        communicator: joined.

    Example:
        staged = Receiver(manifest, needs, communicator).receive(version=3)
    """

    def __init__(
        self, manifest: Manifest, needs: Mapping[str, tuple[Region, ...]], communicator: Communicator
    ) -> None:
        self._manifest = manifest
        self._needs = {name: tuple(dict.fromkeys(boxes)) for name, boxes in needs.items()}
        self._communicator = communicator
        self._buffers: dict[int, Tensor] = {}

    def receive(self, version: int) -> Staged:
        """Takes part in one push; called by all workers while the senders `send`.

        Raises:
            DisagreementError: a piece did not arrive as it was sent, or another rank has an error.
            TransportError: the communicator is lost.
        """
        staging = _Staging(self._needs, self._communicator.device, self._needed_bytes())
        for bucket, buffer in broadcast_each(self._communicator, self._manifest.buckets(), self._buffer):
            staging.take(bucket, buffer, self._stays(bucket))
        damaged = staging.damaged
        self._communicator.agree(
            f"arrived with other numbers than were sent: {', '.join(damaged[:_SHOWN])}" if damaged else None
        )
        return Staged(declared_token(version, staging.digests), staging.boxes, staging.expected_digests())

    def _needed_bytes(self) -> int:
        tensors = self._manifest.tensors()
        return sum(
            math.prod(box.sizes) * DTYPES[tensors[name].dtype].itemsize
            for name, boxes in self._needs.items()
            for box in boxes
        )

    def _buffer(self, number: int, bucket: Bucket) -> Tensor:
        """A fresh buffer for a bucket that stays, else one of two."""
        device = self._communicator.device
        if self._stays(bucket):
            return bucket_buffer(bucket, device)
        buffer = self._buffers.get(number % 2)
        if buffer is None or buffer.numel() < bucket.buffer_bytes:
            buffer = self._buffers[number % 2] = bucket_buffer(bucket, device)
        return buffer[: bucket.buffer_bytes]

    def _stays(self, bucket: Bucket) -> bool:
        """Whether a bucket is kept until the commit, as most of it is in host memory just as it is needed.

        Of another one the pieces are copied: pages that were never touched cost more than the copy.
        """
        if self._communicator.device.type != "cpu":
            return False
        needed = sum(
            slot.spec.num_bytes
            for slot in bucket.slots
            if piece_region(slot.spec) in self._needs.get(slot.spec.name, ())
        )
        return 2 * needed > bucket.num_bytes


class _Staging:
    """A push as it arrives."""

    def __init__(
        self, needs: Mapping[str, tuple[Region, ...]], device: torch.device, needed_bytes: int
    ) -> None:
        self._needs = needs
        self._device = device
        self._pinned = HostPool(needed_bytes, is_pinned=True) if device.type == "cuda" else None
        self._known: dict[tuple[str, Region], Tensor] = {}
        self.boxes: dict[str, dict[Region, Tensor]] = {}
        self.digests: list[Tensor] = []
        self.damaged: list[str] = []

    def take(self, bucket: Bucket, buffer: Tensor, stays: bool) -> None:
        pieces = [slot_view(buffer, slot) for slot in bucket.slots]
        arrived = torch.stack([digest(piece) for piece in pieces])
        self.digests.append(arrived.cpu())
        is_damaged = (arrived != digests(bucket, buffer)).tolist()
        self.damaged += [str(slot.spec) for slot, bad in zip(bucket.slots, is_damaged, strict=True) if bad]
        for slot, piece, of_piece in zip(bucket.slots, pieces, arrived, strict=True):
            for box in self._needs.get(slot.spec.name, ()):
                self._keep(slot.spec, piece, of_piece, box, stays)

    def _keep(self, spec: PieceSpec, piece: Tensor, of_piece: Tensor, box: Region, stays: bool) -> None:
        run = piece_region(spec)
        common = run.meet(box)
        if common is None:
            return
        of_name = self.boxes.setdefault(spec.name, {})
        if common == box:
            view = box.of(piece, run.starts)
            self._known[spec.name, box] = of_piece if box == run else digest(view)
            if box == run and stays:
                of_name[box] = piece
                return
        if box not in of_name:
            pinned, sizes = self._pinned, box.sizes
            of_name[box] = (
                torch.empty(sizes, dtype=piece.dtype) if pinned is None else pinned.take(sizes, piece.dtype)
            )
        common.of(of_name[box], box.starts).copy_(common.of(piece, run.starts), non_blocking=True)

    def expected_digests(self) -> dict[str, dict[Region, Tensor]]:
        """The digest of every box, on the CPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return {
            name: {
                box: self._known[name, box].cpu() if (name, box) in self._known else digest(numbers)
                for box, numbers in boxes.items()
            }
            for name, boxes in self.boxes.items()
        }
