"""What a push consists of: the pieces of every tensor, how they are cut into buckets, and one hash of it all."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, zip_longest
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGNMENT = 16  # bytes; a view of any dtype needs an aligned offset
_PROTOCOL = 2  # raised when the wire format changes, so that unlike releases refuse each other


@dataclass(frozen=True)
class PieceSpec:
    """The run of one Hugging Face tensor that one sender holds.

    Args:
        name: of the whole tensor.
        dtype: a key of DTYPES.
        shape: of the whole tensor.
        sender: rank in the communicator.
        dim: along which the tensor is cut.
        start: first index of the run along `dim`.
        length: of the run along `dim`; the whole tensor is (0, 0, shape[0]).

    Example:
        PieceSpec("lm_head.weight", "bfloat16", (128, 64), sender=1, dim=0, start=64, length=64)  # lower half
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sender: int
    dim: int
    start: int
    length: int

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the run."""
        return (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])

    @property
    def num_bytes(self) -> int:
        """Size of the run without padding."""
        return DTYPES[self.dtype].itemsize * math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether the run is the tensor."""
        return self.size == self.shape

    def __str__(self) -> str:
        end = self.start + self.length
        part = "" if self.is_whole else f" {self.start} to {end} of dimension {self.dim}"
        return f"{self.name} {self.dtype} {list(self.shape)}{part} from sender {self.sender}"


class PieceSource(Protocol):
    """The trainer's weights under Hugging Face names, in the pieces that its ranks hold.

    Example:
        for piece in source.pieces(sender=0): send(piece)
    """

    def specs(self) -> tuple[PieceSpec, ...]:
        """Every piece of the model, identical on every rank, without moving data."""
        ...

    def pieces(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        """This sender's pieces in the order of `specs`, as a fresh pass; no collective."""
        ...


@dataclass(frozen=True)
class Slot:
    """Where one piece lies in a bucket, in bytes.

    Example:
        Slot(spec, offset=4096)
    """

    spec: PieceSpec
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Pieces of one sender that travel in one broadcast; `num_bytes` is a multiple of the alignment.

    Example:
        Bucket(sender=0, slots=(slot,), num_bytes=8192).buffer_bytes
    """

    sender: int
    slots: tuple[Slot, ...]
    num_bytes: int

    @property
    def buffer_bytes(self) -> int:
        """The pieces and, behind them, the digest of each."""
        return self.num_bytes + 8 * len(self.slots)


@dataclass(frozen=True)
class Manifest:
    """All pushes of a communicator: the pieces, by sender in the order in which they are packed.

    Example:
        Manifest(bucket_bytes=256 << 20, specs=())
    """

    bucket_bytes: int
    specs: tuple[PieceSpec, ...]

    def to_json(self) -> str:
        """Canonical text; `sha256` is its hash."""
        return json.dumps(
            [_PROTOCOL, self.bucket_bytes, [list(vars(spec).values()) for spec in self.specs]],
            separators=(",", ":"),
        )

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Reads `to_json`.

        Raises:
            ValueError: another protocol version.
        """
        protocol, bucket_bytes, rows = json.loads(text)
        if protocol != _PROTOCOL:
            raise ValueError(
                f"weight manifest of protocol {protocol}, expected {_PROTOCOL}; use one rto-megatron release"
            )
        return Manifest(
            bucket_bytes, tuple(PieceSpec(n, d, tuple(shape), *run) for n, d, shape, *run in rows)
        )

    def sha256(self) -> str:
        """Hash that every sender and worker must share before a byte is sent."""
        return self._sha256

    @property
    def num_bytes(self) -> int:
        """The size of all pieces."""
        return sum(spec.num_bytes for spec in self.specs)

    def tensors(self) -> dict[str, PieceSpec]:
        """The first piece of every tensor, by name, in order."""
        firsts: dict[str, PieceSpec] = {}
        for spec in self.specs:
            firsts.setdefault(spec.name, spec)
        return firsts

    def buckets(self) -> tuple[Bucket, ...]:
        """Cuts each sender's pieces, in order, into buckets; one over `bucket_bytes` travels alone.

        Senders take turns, so that one packs while another sends.

        Raises:
            ValueError: a dtype cannot be sent, or the pieces of a tensor overlap or leave a gap.
        """
        return self._buckets

    # Every push of a run asks for both.
    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def _buckets(self) -> tuple[Bucket, ...]:
        problems = uncut(self.specs)
        if problems:
            raise ValueError("; ".join(problems[:5]))
        senders = sorted({spec.sender for spec in self.specs})
        by_sender = [self._buckets_of(sender) for sender in senders]
        return tuple(bucket for bucket in chain(*zip_longest(*by_sender)) if bucket is not None)

    def _buckets_of(self, sender: int) -> list[Bucket]:
        buckets: list[Bucket] = []
        slots: list[Slot] = []
        filled = 0
        for spec in self.specs:
            if spec.sender != sender:
                continue
            padded = -(-spec.num_bytes // _ALIGNMENT) * _ALIGNMENT
            if slots and filled + padded > self.bucket_bytes:
                buckets.append(Bucket(sender, tuple(slots), filled))
                slots, filled = [], 0
            slots.append(Slot(spec, filled))
            filled += padded
        if slots:
            buckets.append(Bucket(sender, tuple(slots), filled))
        return buckets


def first_difference(ours: Manifest, theirs: Manifest) -> str:
    """Says in words where two manifests part; empty when they are equal."""
    if ours.bucket_bytes != theirs.bucket_bytes:
        return f"buckets of {ours.bucket_bytes} bytes against buckets of {theirs.bucket_bytes} bytes"
    for index, (one, other) in enumerate(zip_longest(ours.specs, theirs.specs)):
        if one != other:
            return f"entry {index}: {one or 'the end'} against {other or 'the end'}"
    return ""


def uncut(specs: Sequence[PieceSpec]) -> list[str]:
    """What is wrong with the pieces, in words: each tensor must be tiled by them, once."""
    problems = [
        f"{spec.name} has dtype {spec.dtype}, weights are sent as one of {sorted(DTYPES)}"
        for spec in specs
        if spec.dtype not in DTYPES
    ]
    by_name: dict[str, list[PieceSpec]] = {}
    for spec in specs:
        by_name.setdefault(spec.name, []).append(spec)
    return problems + [problem for pieces in by_name.values() for problem in _untiled(pieces)]


def _untiled(pieces: list[PieceSpec]) -> Iterator[str]:
    first = pieces[0]
    if len({(piece.dtype, piece.shape, piece.dim) for piece in pieces}) > 1:
        yield f"the pieces of {first.name} disagree: {', '.join(map(str, pieces))}"
        return
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start != end:
            yield f"{piece} does not begin at {end}, where the piece before it ends"
            return
        end += piece.length
    if first.shape and end != first.shape[first.dim]:
        yield f"the pieces of {first.name} {list(first.shape)} end at {end} of dimension {first.dim}"


def bucket_buffer(bucket: Bucket, device: torch.device) -> Tensor:
    """An uninitialised uint8 buffer for a bucket."""
    return torch.empty(bucket.buffer_bytes, dtype=torch.uint8, device=device)


def digests(bucket: Bucket, buffer: Tensor) -> Tensor:
    """The place of the digests of its pieces, as their sender computed them, in a bucket's buffer, int64 [slots]."""
    return buffer[bucket.num_bytes : bucket.buffer_bytes].view(torch.int64)


def slot_view(buffer: Tensor, slot: Slot) -> Tensor:
    """The piece of a slot as a view of the bucket's buffer."""
    raw = buffer[slot.offset : slot.offset + slot.spec.num_bytes]
    return raw.view(DTYPES[slot.spec.dtype]).view(slot.spec.size)


_WORDS_PER_CHUNK = 1 << 20  # bounds the weights and, on CUDA, the products: 8 MiB each
_WORD_BYTES = 8
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as int64: spreads the weights of neighbouring words


def digest(tensor: Tensor, words_per_chunk: int = _WORDS_PER_CHUNK) -> Tensor:
    """Returns sum_i w_i x_i mod 2^64 with odd weights w_i over the 8-byte words x_i of a tensor's elements in order.

    An odd weight is invertible, so any single changed word changes the sum; two exchanged words do unless
    their difference times that of their weights is a multiple of 2^64. Bits are compared, not values.

    Args:
        tensor: any dtype and shape, on CPU or CUDA: both give the same number.
        words_per_chunk: equal on all ranks that compare.

    Returns:
        int64 [], on the tensor's device, so that many digests cost one synchronisation.
    """
    words = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(words.split(words_per_chunk)):
        weights = _weights(tensor.device, words_per_chunk)[: chunk.numel()]
        # CUDA has no integer dot product; on a CPU it is several times faster than the product and sum.
        part = (chunk * weights).sum() if tensor.is_cuda else torch.dot(chunk, weights)
        total += part * (2 * number + 1)
    return total


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int64, the last word filled up with zeros."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    excess = raw.numel() % _WORD_BYTES
    if excess:
        raw = pad(raw, (0, _WORD_BYTES - excess))
    elif raw.data_ptr() % _WORD_BYTES:
        raw = raw.clone()  # a view as words needs an aligned start
    return raw.view(torch.int64)


@lru_cache(maxsize=2)
def _weights(device: torch.device, count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int64, device=device).mul_(_GOLDEN).bitwise_or_(1)
