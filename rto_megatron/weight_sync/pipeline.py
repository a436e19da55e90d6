"""Two buckets at a time: one is on its way while the next is prepared, or the one before is used."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from rto_megatron.weight_sync.manifest import Bucket
from rto_megatron.weight_sync.transport import Broadcast, Communicator


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
