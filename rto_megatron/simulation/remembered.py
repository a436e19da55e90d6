"""What torch said that an operation makes, by the shapes that it was given: the layers of a model ask the same again.

Torch's own cache of fake results takes most of a simulation's time to look up; this one knows that all fake tensors
are on one device and have plain layouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_REAL = "real"  # in the place of a tensor of the host
# These do more than make tensors: with storages, with how a tensor lies, or with a number that is known.
_NEVER = ("set_", "resize_", "lift", "detach_", "_local_scalar_dense")
type _Asked = tuple[object, ...]


@dataclass(frozen=True)
class _Made:
    """One tensor: of a storage of its own, or a view of an argument; or an argument itself, that was written to."""

    argument: int | None  # number of the fake tensor among the arguments
    is_argument: bool = False
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class _Answer:
    made: tuple[_Made, ...]
    kind: type | None  # list or tuple; None: one tensor alone


class Remembered:
    """Answers of one machine.

    Example:
        asked = remembered.question(func, args, kwargs)
        out = remembered.answer(asked, fakes)
    """

    def __init__(self, fake: FakeTensorMode, device: torch.device) -> None:
        self._fake = fake
        self._device = device
        self._answers: dict[_Asked, _Answer] = {}
        self._is_plain: dict[torch._ops.OpOverload, bool] = {}

    def question(
        self, func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> _Asked | None:
        """All that decides what an operation makes; None where more than shapes may."""
        is_plain = self._is_plain.get(func)
        if is_plain is None:
            is_plain = self._is_plain[func] = _decided_by_shapes(func)
        if not is_plain:
            return None
        asked: list[object] = [func, torch.get_default_dtype()]
        try:
            _describe(args, asked)
            for name, value in kwargs.items():
                asked.append(name)
                _describe((value,), asked)
        except _Unknown:
            return None
        return tuple(asked)

    def answer(self, asked: _Asked | None, fakes: Sequence[FakeTensor]) -> object:
        """New tensors as they were made before; NotImplemented where it is not known how.

        Args:
            fakes: among the arguments, in order.
        """
        found = None if asked is None else self._answers.get(asked)
        if found is None:
            return NotImplemented
        made = [self._make(one, fakes) for one in found.made]
        return made[0] if found.kind is None else found.kind(made)

    def remember(self, asked: _Asked | None, fakes: Sequence[FakeTensor], out: object) -> None:
        """What torch said, unless it is more than fresh tensors, views and arguments."""
        if asked is None:
            return
        kind = type(out) if isinstance(out, list | tuple) else None
        outs = list(out) if isinstance(out, list | tuple) else [out]
        if kind not in (None, list, tuple) or not outs:
            return
        storages = [fake.untyped_storage()._cdata for fake in fakes]
        made = [_seen(one, fakes, storages) for one in outs]
        fresh = [
            one.untyped_storage()._cdata for one, how in zip(outs, made, strict=True)
            if how is not None and how.argument is None and isinstance(one, FakeTensor)
        ]  # fmt: skip
        known = [how for how in made if how is not None]
        if len(known) == len(made) and len(set(fresh)) == len(fresh):
            self._answers[asked] = _Answer(tuple(known), kind)

    def _make(self, one: _Made, fakes: Sequence[FakeTensor]) -> FakeTensor:
        if one.is_argument and one.argument is not None:
            return fakes[one.argument]
        empty = torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device="meta")
        if one.argument is not None:
            storage = fakes[one.argument].untyped_storage()
            empty = torch.empty(0, dtype=one.dtype, device="meta").set_(
                storage, one.offset, one.shape, one.stride
            )
        return FakeTensor(self._fake, empty, self._device)


class _Unknown(Exception):  # noqa: N818  (no error: the question is asked of torch)
    """An argument that no tuple can hold."""


def _decided_by_shapes(func: torch._ops.OpOverload) -> bool:
    name = func.overloadpacket.__name__
    tags = func.tags
    if func.namespace != "aten" or name.startswith(_NEVER) or torch.Tag.inplace_view in tags:
        return False
    if func is torch.ops.aten.index.Tensor:
        return True  # by positions: masks are turned into them before
    return torch.Tag.data_dependent_output not in tags and torch.Tag.dynamic_output_shape not in tags


def _describe(values: Sequence[object], asked: list[object]) -> None:
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None:
                raise _Unknown
            asked += (value.shape, value.stride(), value.storage_offset(), value.dtype)
        elif isinstance(value, Tensor):
            if value.dtype in (torch.bool, torch.uint8):
                raise _Unknown
            asked += (_REAL, value.shape, value.stride(), value.dtype)
        elif isinstance(value, list | tuple):
            asked.append(len(value))
            _describe(value, asked)
        elif isinstance(value, torch.Generator):
            asked.append(torch.Generator)  # what it draws has no numbers
        elif isinstance(value, dict):
            raise _Unknown
        else:
            asked += (type(value), value)


def _seen(out: object, fakes: Sequence[FakeTensor], storages: Sequence[int]) -> _Made | None:
    """How a tensor came about; None where that cannot be told."""
    if not isinstance(out, FakeTensor) or out.constant is not None:
        return None
    for number, fake in enumerate(fakes):
        if out is fake:
            return _Made(number, is_argument=True)
    storage = out.untyped_storage()._cdata
    viewed = storages.index(storage) if storage in storages else None
    return _Made(viewed, False, tuple(out.shape), tuple(out.stride()), int(out.storage_offset()), out.dtype)
