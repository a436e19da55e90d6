"""Where the boxes of tensors lie in a worker's parameters: known from the rehearsal, looked up during the load."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Place:
    """A part of a parameter.

    Args:
        parameter: full name.
        offset: of the first element from the parameter's, in elements.
        sizes: of the part.
        strides: of the part, in elements.
    """

    parameter: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(view: Tensor, name: str, parameter: Tensor) -> "Place":
        """The part that `view` shows of a parameter whose storage it shares."""
        offset = view.storage_offset() - parameter.storage_offset()
        return Place(name, offset, tuple(view.shape), view.stride())

    def view(self, parameter: Tensor) -> Tensor:
        """The part of `parameter`, which has the strides of the one that was asked about."""
        return parameter.as_strided(self.sizes, self.strides, parameter.storage_offset() + self.offset)


@dataclass(frozen=True)
class Written:
    """A parameter as the loader filled it; vLLM's reload drops its memory once the numbers are in their last place."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: StorageWeakRef

    def has_layout_of(self, tensor: Tensor) -> bool:
        """Whether a part of this parameter lies at the same place in `tensor`."""
        return tuple(tensor.shape) == self.shape and tensor.stride() == self.strides


class WrittenParameters:
    """The parameters of a model that are being written, by their memory."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = {name: (module, own) for name, module, own, _ in owned_parameters(model)}
        self._known: dict[int, Written] = {}

    def known(self, tensor: Tensor) -> Written | None:
        """The parameter that `tensor` is a part of, if a loader wrote it."""
        address = tensor.untyped_storage().data_ptr()
        written = self._known.get(address)
        if written is not None and written.storage.expired():
            del self._known[address]
            return None
        return written

    def place(self, target: Tensor) -> Place | None:
        """The part that a loader writes, None where it is no parameter's."""
        address = target.untyped_storage().data_ptr()
        known = self.known(target)
        for name in self._slots if known is None else (known.name,):
            module, own = self._slots[name]
            parameter = module._parameters.get(own)
            if parameter is not None and parameter.untyped_storage().data_ptr() == address:
                if known is None:
                    storage = StorageWeakRef(parameter.untyped_storage())
                    self._known[address] = Written(name, tuple(parameter.shape), parameter.stride(), storage)
                return Place.of(target, name, parameter)
        return None


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Full name, owner, name there and value of every parameter; tied ones once for each owner."""
    for prefix, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{own}" if prefix else own, module, own, parameter
