"""What a push consists of: an ordered list of tensors, how it is cut into buckets, and one hash of it all."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGNMENT = 16  # bytes; a view of any dtype needs an aligned offset, the digest reads whole 8-byte words
_PROTOCOL = 1  # raised when the wire format changes, so that unlike releases refuse each other


@dataclass(frozen=True)
class TensorSpec:
    """One tensor under its Hugging Face name; `dtype` is a key of DTYPES, `sender` its pipeline stage."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sender: int

    @property
    def num_bytes(self) -> int:
        """Size without padding."""
        count = DTYPES[self.dtype].itemsize
        for length in self.shape:
            count *= length
        return count

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)} from sender {self.sender}"


class WeightSource(Protocol):
    """The trainer's weights under Hugging Face names, with tensor-parallel shards already gathered."""

    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model, identical on every rank, without moving data."""
        ...

    def tensors(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one pipeline stage in the order of `specs`, as a fresh pass.

        A collective over the stage's tensor-parallel ranks: all of them must iterate it to the end.
        """
        ...


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a bucket, in bytes."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Tensors of one sender that travel in one broadcast; `num_bytes` is a multiple of the alignment."""

    sender: int
    slots: tuple[Slot, ...]
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """One push: all its tensors in wire order."""

    version: int
    bucket_bytes: int
    specs: tuple[TensorSpec, ...]

    def to_json(self) -> str:
        """Canonical text; `sha256` is its hash."""
        rows = [[spec.name, spec.dtype, list(spec.shape), spec.sender] for spec in self.specs]
        return json.dumps([_PROTOCOL, self.version, self.bucket_bytes, rows], separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Reads `to_json`.

        Raises:
            ValueError: another protocol version.
        """
        protocol, version, bucket_bytes, rows = json.loads(text)
        if protocol != _PROTOCOL:
            raise ValueError(
                f"weight manifest of protocol {protocol}, expected {_PROTOCOL}; use one rto-megatron release"
            )
        specs = tuple(TensorSpec(name, dtype, tuple(shape), sender) for name, dtype, shape, sender in rows)
        return Manifest(version, bucket_bytes, specs)

    def sha256(self) -> str:
        """Hash that every sender and worker must share before a byte is sent."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def buckets(self) -> tuple[Bucket, ...]:
        """Cuts the tensors, in order, into buckets of one sender; one over `bucket_bytes` travels alone.

        Raises:
            ValueError: a name occurs twice or a dtype cannot be sent.
        """
        _check_specs(self.specs)
        buckets: list[Bucket] = []
        slots: list[Slot] = []
        filled = 0
        for spec in self.specs:
            padded = -(-spec.num_bytes // _ALIGNMENT) * _ALIGNMENT
            if slots and (slots[-1].spec.sender != spec.sender or filled + padded > self.bucket_bytes):
                buckets.append(Bucket(slots[-1].spec.sender, tuple(slots), filled))
                slots, filled = [], 0
            slots.append(Slot(spec, filled))
            filled += padded
        if slots:
            buckets.append(Bucket(slots[-1].spec.sender, tuple(slots), filled))
        return tuple(buckets)


def first_difference(ours: Manifest, theirs: Manifest) -> str:
    """Says in words where two manifests part; empty when they are equal."""
    if (ours.version, ours.bucket_bytes) != (theirs.version, theirs.bucket_bytes):
        return (
            f"version {ours.version} in buckets of {ours.bucket_bytes} bytes against "
            f"version {theirs.version} in buckets of {theirs.bucket_bytes} bytes"
        )
    for index in range(max(len(ours.specs), len(theirs.specs))):
        one = str(ours.specs[index]) if index < len(ours.specs) else "the end"
        other = str(theirs.specs[index]) if index < len(theirs.specs) else "the end"
        if one != other:
            return f"entry {index}: {one} against {other}"
    return ""


def bucket_buffer(bucket: Bucket, device: torch.device) -> Tensor:
    """An uninitialised uint8 buffer for a bucket and, behind it, its digest."""
    return torch.empty(bucket.num_bytes + _ALIGNMENT, dtype=torch.uint8, device=device)


def payload(buffer: Tensor) -> Tensor:
    """The part of a bucket buffer that holds tensors, uint8."""
    return buffer[:-_ALIGNMENT]


def trailer(buffer: Tensor) -> Tensor:
    """The digest's place in a bucket buffer, int64 [1]."""
    return buffer[-_ALIGNMENT : -_ALIGNMENT + 8].view(torch.int64)


def slot_view(buffer: Tensor, slot: Slot) -> Tensor:
    """The tensor of a slot as a view of the bucket buffer."""
    raw = buffer[slot.offset : slot.offset + slot.spec.num_bytes]
    return raw.view(DTYPES[slot.spec.dtype]).view(slot.spec.shape)


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise ValueError(
                f"{spec.name} has dtype {spec.dtype}, weights are sent as one of {sorted(DTYPES)}"
            )
        if spec.name in seen:
            raise ValueError(f"{spec.name} occurs twice among the weights to send")
        seen.add(spec.name)
