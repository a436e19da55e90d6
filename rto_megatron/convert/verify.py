"""Proof that a Hugging Face folder and a Megatron checkpoint hold the same model, tensor by tensor and bit by bit."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Semaphore
from types import TracebackType

import torch
from torch import Tensor

from rto_megatron.convert.conversion_options import Advance
from rto_megatron.errors import ConversionError, refuse_if
from rto_megatron.models.weight_map import Joined, QkvRows
from rto_megatron.storage.hf_model import HfModel
from rto_megatron.storage.megatron_tensors import MegatronTensors

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_digests(
    hf: HfModel,
    megatron: MegatronTensors,
    dtype: torch.dtype,
    recorded: Mapping[str, str],
    advance: Advance,
) -> dict[str, str]:
    """Reads every parameter of both from the disk, and compares them there and back.

    Backward: the Megatron parameter's Hugging Face tensors are those of the folder. Forward: the folder's tensors
    make up the Megatron parameter.

    Args:
        hf: complete by `HfModel.require_complete`, as `megatron` is by its constructor.
        dtype: in which they are compared.
        recorded: sha256 by name that an earlier conversion noted about the source; may be empty.

    Returns:
        sha256 by name of what both hold.

    Raises:
        ConversionError: names every tensor that differs, and says what it holds instead where that can be seen.
    """
    wrong: dict[str, _Found] = {}
    with Digests() as digests:
        for parameter in megatron.parameters:
            wanted = parameter.dtype(dtype)
            theirs = [hf.read(name, size).to(wanted) for name, size in parameter.sizes()]
            ours = [tensor.to(wanted) for tensor in megatron.hf(parameter)]
            for name, want, found in zip(parameter.hf, theirs, ours, strict=True):
                digests.add(name, want)
                if not _same_bits(want, found):
                    wrong[name] = _Found(tensor_digest(found), _turned(found))
                advance(want.nbytes)
            is_right = not wrong.keys() & set(parameter.hf)
            # Of all layouts these alone move rows: the others' parameters are their tensors one below the other.
            if isinstance(parameter.layout, QkvRows | Joined) and is_right:
                whole = megatron.whole(parameter).to(wanted)
                if not _same_bits(parameter.layout.shard(theirs, 0, 1), whole):
                    raise ConversionError(
                        f"{parameter.megatron} is not what {', '.join(parameter.hf)} make up"
                    )
        known = digests.by_name()
    holder = {digest: name for name, digest in known.items()}
    problems = [f"{name} {_difference(name, found, known, holder)}" for name, found in wrong.items()]
    problems += [
        f"{name} is not what the conversion_report.json of the source recorded: sha256 {known[name][:12]}, then "
        f"{noted[:12]}; it was damaged since, or changed on purpose: remove the report then"
        for name, noted in recorded.items()
        if name in known and known[name] != noted and name not in wrong
    ]
    places = f"{hf.folder.path} and {megatron.folder}"
    refuse_if(problems, f"{len(problems)} of {len(known)} tensors differ between {places}", ConversionError)
    return known


@dataclass(frozen=True)
class _Found:
    """What stands in the place of a tensor."""

    digest: str
    turned: str | None  # digest of a square matrix's transpose


def _turned(found: Tensor) -> str | None:
    is_square = found.dim() == 2 and found.shape[0] == found.shape[1]
    return tensor_digest(found.T) if is_square else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal as bytes: a NaN equals itself, and 0 differs from -0."""
    kind = _INTEGERS[one.itemsize]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def _difference(name: str, found: _Found, known: Mapping[str, str], holder: Mapping[str, str]) -> str:
    """What a wrong tensor is, if it is another one or the right one turned over."""
    if found.digest in holder:
        return f"holds the numbers of {holder[found.digest]}"
    if found.turned == known[name]:
        return "is transposed"
    return f"has other numbers: sha256 {found.digest[:12]} in Megatron, {known[name][:12]} in the folder"


_WAITING = 2  # bounds the tensors that are kept alive for the thread


def tensor_digest(tensor: Tensor) -> str:
    """Hex sha256 over dtype, shape and bytes: a transposed tensor has another digest even where it is all zeros."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Digests:
    """Collects digests; the tensors must not change until the thread has read them.

    Example:
        digests = Digests()
        digests.add("lm_head.weight", tensor)
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digests")
        self._room = Semaphore(_WAITING)
        self._of_name: dict[str, Future[str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Has a tensor hashed; waits while too many are waiting."""
        self._room.acquire()
        future = self._thread.submit(tensor_digest, tensor)
        future.add_done_callback(lambda _: self._room.release())
        self._of_name[name] = future

    def by_name(self) -> dict[str, str]:
        """All digests."""
        return {name: future.result() for name, future in self._of_name.items()}

    def __enter__(self) -> "Digests":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
