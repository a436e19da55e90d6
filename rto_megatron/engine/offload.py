"""Parts of the trainer that a phase does not need wait in host memory; the device's memory is free meanwhile.

A part is parked by its storages: their bytes are copied to the host and the storages emptied, so that every view of
them stays a view (parameters in the buffers of Megatron's data parallelism, masters in the optimizer) and is whole
again when the bytes are back. Moves are synchronous. Where the device is the host itself bytes move all the same.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

from rto_megatron.config.step_phases import NEEDED, StepPhase
from rto_megatron.config.training import Parkable
from rto_megatron.engine.absent import AbsentModel, RoleModel
from rto_megatron.engine.megatron import FrozenModel, Model, TrainedModel
from rto_megatron.engine.optimizer import state_tensors
from rto_megatron.platform.copies import host_pieces
from rto_megatron.types import Metrics

Content = Literal["changes", "stays", "dropped"]
_GIB = 1 << 30


class ParkedPart:
    """Tensors that are parked and brought back together, bit for bit.

    Args:
        tensors: found anew each time, since an optimizer makes its state when it steps first.
        beside: whose storages belong to another part.
        content: `changes` between two moves, `stays` as it was first parked, or is `dropped`: zeros come back.

    Example:
        ParkedPart(lambda: [weight], content="stays").park()
    """

    def __init__(
        self,
        tensors: Callable[[], Sequence[Tensor]],
        beside: Callable[[], Sequence[Tensor]] = tuple,
        content: Content = "changes",
    ) -> None:
        self._tensors = tensors
        self._beside = beside
        self._content = content
        # Of each storage, in host memory, pinned where the device is a GPU.
        self._copies: list[list[Tensor]] = []
        self._parked: list[tuple[UntypedStorage, int]] = []  # with their sizes in bytes

    @property
    def num_bytes(self) -> int:
        """What is freed at this moment."""
        return sum(size for _, size in self._parked)

    def park(self) -> None:
        """Empties the storages; does nothing where they are empty."""
        if self._parked:
            return
        others = {storage._cdata for storage in _storages(self._beside())}
        found = [one for one in _storages(self._tensors()) if one._cdata not in others and one.nbytes()]
        sizes = [storage.nbytes() for storage in found]
        if self._content != "dropped":
            self._copy(found, sizes)
        for storage in found:
            storage.resize_(0)
        self._parked = list(zip(found, sizes, strict=True))

    def _copy(self, found: Sequence[UntypedStorage], sizes: Sequence[int]) -> None:
        if [sum(piece.numel() for piece in pieces) for pieces in self._copies] != sizes:
            is_pinned = any(storage.device.type == "cuda" for storage in found)
            self._copies = []  # before there are others
            self._copies = [host_pieces(size, is_pinned) for size in sizes]
        elif self._content == "stays":
            return
        for pieces, storage in zip(self._copies, found, strict=True):
            for piece, there in zip(pieces, _pieces_of(storage, pieces), strict=True):
                piece.copy_(there, non_blocking=True)
        _wait_for(found)  # the copies must be whole before the memory is given away

    def unpark(self) -> None:
        """Fills the storages again; does nothing where they are full."""
        for number, (storage, size) in enumerate(self._parked):
            storage.resize_(size)
            if self._content == "dropped":
                _bytes_of(storage).zero_()
                continue
            pieces = self._copies[number]
            for piece, there in zip(pieces, _pieces_of(storage, pieces), strict=True):
                there.copy_(piece, non_blocking=True)
        _wait_for([storage for storage, _ in self._parked])
        self._parked = []


class HostMemory:
    """Where named parts of the trainer wait; with no parts it does nothing. All ranks enter the same phases.

    Args:
        parts: name -> part, in the order in which they are parked.
        said: takes what is freed by a name when it is parked first.

    Example:
        memory = HostMemory(parts)
        memory.enter("score")
    """

    def __init__(
        self,
        parts: Mapping[Parkable, ParkedPart] | None = None,
        said: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._parts = dict(parts or {})
        self._said = said
        self._told: set[str] = set()
        self._seconds = 0.0
        self._most = 0  # bytes that were parked at a time

    def enter(self, phase: StepPhase) -> None:
        """Brings back what the phase needs, once the memory of what it does not need is free."""
        if not self._parts:
            return
        start = time.monotonic()
        for name, part in self._parts.items():
            if name not in NEEDED[phase]:
                part.park()
                self._tell(name, part)
        self._most = max(self._most, sum(part.num_bytes for part in self._parts.values()))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for name, part in self._parts.items():
            if name in NEEDED[phase]:
                part.unpark()
        self._seconds += time.monotonic() - start

    def _tell(self, name: str, part: ParkedPart) -> None:
        if name not in self._told:
            self._told.add(name)
            self._said(
                f"offload: {name} frees {part.num_bytes / _GIB:.3f} GiB of a rank while it is not needed"
            )

    def measured(self) -> Metrics:
        """Sums for the logs since the last call: seconds of moves, and the most that was parked at a time."""
        if not self._parts:
            return {}
        seconds, most, self._seconds, self._most = self._seconds, self._most, 0.0, 0
        return {"time/offload_s": (seconds, 1.0), "memory/parked_gib": (most / _GIB, 1.0)}


def host_memory(
    names: Sequence[Parkable], models: Mapping[str, RoleModel], said: Callable[[str], None]
) -> HostMemory:
    """Parks the named roles, and the gradients and optimizers of all trained ones.

    Args:
        models: role -> model; those of other ranks are no affair of this one.
    """
    trained = [model for model in models.values() if isinstance(model, TrainedModel)]

    def gradients() -> list[Tensor]:
        return [tensor for model in trained for tensor in model.gradient_buffers()]

    def states() -> list[Tensor]:
        return [tensor for model in trained for tensor in state_tensors(model.optimizer)]

    def others() -> list[Tensor]:
        """What an optimizer's numbers may share memory with."""
        return [*gradients(), *(tensor for model in trained for tensor in _weights(model))]

    parts: dict[Parkable, ParkedPart] = {}
    for name in names:
        if name == "optimizer":
            parts[name] = ParkedPart(states, others)
        elif name == "gradients":
            parts[name] = ParkedPart(gradients, content="dropped")
        elif not isinstance(model := models[name], AbsentModel):
            is_constant = isinstance(model, FrozenModel) and name != "policy_ema"
            content: Content = "stays" if is_constant else "changes"
            parts[name] = ParkedPart(partial(_weights, model), content=content)
    return HostMemory(parts, said)


def _weights(model: Model) -> list[Tensor]:
    return [*model.module.parameters(), *model.module.buffers()]


def _storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Each once. They are known by the address of what they are, as an emptied one has no memory to be known by."""
    found: dict[int, UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found.setdefault(storage._cdata, storage)
    return list(found.values())


def _bytes_of(storage: UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))


def _pieces_of(storage: UntypedStorage, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """The storage's bytes, cut as its copy is."""
    cut: Sequence[Tensor] = _bytes_of(storage).split([piece.numel() for piece in pieces])
    return cut


def _wait_for(storages: Sequence[UntypedStorage]) -> None:
    if any(storage.device.type == "cuda" for storage in storages):
        torch.cuda.current_stream().synchronize()
