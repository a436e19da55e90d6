"""What a trainer rank does during a push: pack the pieces it holds into buckets and broadcast them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rto_megatron.models.weight_map import dtype_name
from rto_megatron.weight_sync.manifest import (
    DTYPES,
    Bucket,
    Manifest,
    PieceSpec,
    digest,
    digests,
    first_difference,
    slot_view,
)
from rto_megatron.weight_sync.transport import Broadcast, Communicator


class Sender:
    """Sends the pushes of one communicator from two buckets in turn: one is packed while the other travels.

    Args:
        manifest: equal on all ranks.
        communicator: joined; this sender's rank in it is its sender index.

    Example:
        Sender(manifest, communicator).send(version=3, pieces=pieces)
    """

    def __init__(self, manifest: Manifest, communicator: Communicator) -> None:
        self._manifest = manifest
        self._communicator = communicator
        largest = max((bucket.buffer_bytes for bucket in manifest.buckets()), default=0)
        self._buffers = communicator.send_buffers(largest)
        self._token = ""

    def send(self, version: int, pieces: Iterator[tuple[str, Tensor]]) -> None:
        """Sends one push. Called by all senders while the workers receive (receiver.py).

        Args:
            version: of the weights.
            pieces: this sender's, in manifest order, on any device.

        Raises:
            DisagreementError: a rank refused; the workers hold what they held before.
            TransportError: the communicator is lost.
        """
        agree_on_manifest(self._manifest, version, self._communicator, None)
        fault: str | None = None

        def filled(number: int, bucket: Bucket) -> Tensor:
            nonlocal fault
            staged = self._buffers[number % 2][: bucket.buffer_bytes]
            if bucket.sender == self._communicator.rank:
                fault = _pack(bucket, pieces, staged) or fault
            return staged

        declared = [
            digests(bucket, staged).to("cpu", copy=True)
            for bucket, staged in broadcast_each(self._communicator, self._manifest.buckets(), filled)
        ]
        if fault is None and next(pieces, None) is not None:
            fault = "the weight source yields more pieces than it declared"
        self._communicator.agree(fault)
        self._token = declared_token(version, declared)

    def confirm(self) -> None:
        """Waits until every worker has loaded what was sent. Called by all senders while the workers commit.

        Raises:
            DisagreementError: a worker loaded something else.
            TransportError: the communicator is lost.
        """
        self._communicator.agree(None, self._token)


def declared_token(version: int, of_buckets: Sequence[Tensor]) -> str:
    """Hash of a push's version and of the digests of all its pieces, in wire order."""
    hashed = hashlib.sha256(str(version).encode())
    for of_bucket in of_buckets:
        hashed.update(of_bucket.numpy().tobytes())
    return hashed.hexdigest()


def agree_on_manifest(
    manifest: Manifest, version: int, communicator: Communicator, error: str | None
) -> None:
    """Makes sure that all ranks are about to move the same pieces of the same version. Called by all ranks.

    Raises:
        DisagreementError: with the first entry that differs, or with the errors of the ranks that have one.
    """
    explain = _explain(manifest, version, communicator)
    communicator.agree(error, f"{version}/{manifest.sha256()}", explain)


def _explain(manifest: Manifest, version: int, communicator: Communicator) -> Callable[[], str]:
    def explain() -> str:
        texts = communicator.exchange(f"{version}/{manifest.to_json()}")
        parted = [rank for rank, text in enumerate(texts) if text != texts[0]]
        (version_0, first), (version_1, other) = (texts[rank].split("/", 1) for rank in (0, parted[0]))
        difference = first_difference(Manifest.from_json(first), Manifest.from_json(other))
        versions = f"version {version_0} against version {version_1}"
        return f"ranks {parted} hold another weight manifest than rank 0: {difference or versions}"

    return explain


def _pack(bucket: Bucket, pieces: Iterator[tuple[str, Tensor]], staged: Tensor) -> str | None:
    """Fills a bucket. A fault is returned, not raised: the other ranks already wait for the broadcast.

    The digests are those of the source, not of the bucket: a bucket that was filled wrongly will not match them.
    """
    fault = None
    of_pieces = []
    for slot in bucket.slots:
        name, piece = next(pieces, ("nothing", None))
        fault = fault or _mismatch(slot.spec, name, piece)
        if fault is not None or piece is None:
            break
        piece = piece.detach()
        of_pieces.append(digest(piece))
        slot_view(staged, slot).copy_(piece)
    if fault is None:
        digests(bucket, staged).copy_(torch.stack(of_pieces))
    return fault


def _mismatch(spec: PieceSpec, name: str, piece: Tensor | None) -> str | None:
    if piece is None:
        return f"the weight source ended before {spec}"
    if name == spec.name and piece.dtype == DTYPES[spec.dtype] and tuple(piece.shape) == spec.size:
        return None
    return f"the weight source yielded {name} {dtype_name(piece.dtype)} {list(piece.shape)}, its specs declare {spec}"


def broadcast_each(
    communicator: Communicator, buckets: Sequence[Bucket], buffer_of: Callable[[int, Bucket], Tensor]
) -> Iterator[tuple[Bucket, Tensor]]:
    """Broadcasts buckets in order and yields each, with its buffer, when it has arrived. Called by all ranks.

    Args:
        buffer_of: the buffer of a bucket, filled on its sender, from (number, bucket); the one of bucket n - 2 is
            free by then, the one of bucket n - 1 is in use.

    Raises:
        TransportError: the communicator is lost.
    """
    in_flight: tuple[Broadcast, Bucket, Tensor] | None = None
    for number, bucket in enumerate(buckets):
        buffer = buffer_of(number, bucket)
        begun = (communicator.start_broadcast(buffer, bucket.sender), bucket, buffer)
        if in_flight is not None:
            yield _arrived(communicator, *in_flight)
        in_flight = begun
    if in_flight is not None:
        yield _arrived(communicator, *in_flight)


def _arrived(
    communicator: Communicator, broadcast: Broadcast, bucket: Bucket, buffer: Tensor
) -> tuple[Bucket, Tensor]:
    communicator.finish(broadcast)
    return bucket, buffer
