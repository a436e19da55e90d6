"""What a trainer rank does during a push: pack the tensors it holds into buckets and broadcast them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rto_megatron.models.weight_map import dtype_name
from rto_megatron.weight_sync.digest import digest
from rto_megatron.weight_sync.manifest import (
    DTYPES,
    Bucket,
    Manifest,
    TensorSpec,
    bucket_buffer,
    first_difference,
    payload,
    slot_view,
    trailer,
)
from rto_megatron.weight_sync.transport import Communicator


def send(manifest: Manifest, tensors: Iterator[tuple[str, Tensor]], communicator: Communicator) -> None:
    """Sends one push. Called by all senders while the workers run the receiving side (vllm_plugin.py).

    Args:
        manifest: equal on all ranks.
        tensors: this sender's tensors in manifest order, on any device.
        communicator: this sender's rank in it is its sender index.

    Raises:
        DisagreementError: a rank refused; the workers hold what they held before.
        TransportError: the communicator is lost.
    """
    agree_on_manifest(manifest, communicator, None)
    buffer: Tensor | None = None
    fault: str | None = None
    for bucket in manifest.buckets():
        buffer = _buffer_for(bucket, buffer, communicator.device)
        window = buffer[: _window_bytes(bucket)]
        if bucket.sender == communicator.rank:
            fault = _pack(bucket, tensors, window) or fault
        communicator.broadcast(window, bucket.sender)
    if fault is None and next(tensors, None) is not None:
        fault = "the weight source yields more tensors than it declared"
    communicator.agree(fault)


def agree_on_manifest(manifest: Manifest, communicator: Communicator, error: str | None) -> None:
    """Makes sure that all ranks are about to move the same tensors. Called by all ranks.

    Raises:
        DisagreementError: with the first entry that differs, or with the errors of the ranks that have one.
    """

    def explain() -> str:
        texts = communicator.exchange(manifest.to_json())
        parted = [rank for rank, text in enumerate(texts) if text != texts[0]]
        difference = first_difference(Manifest.from_json(texts[0]), Manifest.from_json(texts[parted[0]]))
        return f"ranks {parted} hold another weight manifest than rank 0: {difference}"

    communicator.agree(error, manifest.sha256(), explain)


def _pack(bucket: Bucket, tensors: Iterator[tuple[str, Tensor]], window: Tensor) -> str | None:
    """Fills a bucket. A fault is returned, not raised: the other ranks already wait for the broadcast."""
    packed = payload(window)
    packed.zero_()  # padding is part of the digest
    fault = None
    for slot in bucket.slots:
        name, tensor = next(tensors, ("nothing", None))
        fault = fault or _mismatch(slot.spec, name, tensor)
        if fault is None and tensor is not None:
            slot_view(window, slot).copy_(tensor.detach())
    trailer(window).fill_(digest(packed))
    return fault


def _mismatch(spec: TensorSpec, name: str, tensor: Tensor | None) -> str | None:
    if tensor is None:
        return f"the weight source ended before {spec}"
    if name == spec.name and tensor.dtype == DTYPES[spec.dtype] and tuple(tensor.shape) == spec.shape:
        return None
    dtype = dtype_name(tensor.dtype)
    return f"the weight source yielded {name} {dtype} {list(tensor.shape)}, its specs declare {spec}"


def _window_bytes(bucket: Bucket) -> int:
    return bucket_buffer(bucket, torch.device("meta")).numel()


def _buffer_for(bucket: Bucket, buffer: Tensor | None, device: torch.device) -> Tensor:
    if buffer is None or buffer.numel() < _window_bytes(bucket):
        return bucket_buffer(bucket, device)
    return buffer
