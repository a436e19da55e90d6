"""A device without memory: what is computed there has a shape, a dtype and a size, and no numbers.

Two kinds of tensors meet. Whole numbers and flags that the host makes (token ids, offsets, positions, masks) are real,
since they decide shapes; so are numbers that Python writes down. Weights, and all that is computed from them, are
torch's fake tensors. What a program asks of those it is told: flags are true, whole numbers 0, others 1.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rto_megatron.platform.cpu import CPU
from rto_megatron.simulation.ledger import Ledger
from rto_megatron.simulation.rank_tally import RankTally
from rto_megatron.simulation.remembered import Remembered

aten = torch.ops.aten
_WHERE = torch.ops.prim.device.default  # asked for most often of all, and of no operation
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class FakeMachine(TorchDispatchMode):
    """Everything that torch is asked for inside of it is fake where it would be on the device.

    Example:
        with FakeMachine(ledger, tally):
            model = build_model(shape, config, topology, False)
    """

    def __init__(self, ledger: Ledger, tally: RankTally) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.ledger = ledger
        self.tally = tally
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._remembered = Remembered(self._fake, CPU)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is _WHERE:
            (tensor,) = args
            assert isinstance(tensor, Tensor)
            return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        kwargs = kwargs or {}
        tensors = list(_tensors_of(args)) + list(_tensors_of(kwargs.values()))
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if tensors and not fakes:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.tally.read()
            return _told(fakes[0])
        out = self._made(func, args, kwargs, fakes)
        if not tensors and _is_of_the_host(out):
            return func(*args, **kwargs)
        self.tally.count(func, args, kwargs, out)
        for made in _tensors_of((out,)):
            if isinstance(made, FakeTensor):
                self.ledger.note(made)
        return out

    def _made(
        self,
        func: torch._ops.OpOverload,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        fakes: Sequence[FakeTensor],
    ) -> object:
        """What an operation makes: as before of tensors like these, or as torch says."""
        asked = self._remembered.question(func, args, kwargs)
        out = self._remembered.answer(asked, fakes)
        if out is NotImplemented:
            out = self._on_the_device(func, args, kwargs)
            self._remembered.remember(asked, fakes, out)
        return out

    def _on_the_device(
        self, func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        if func is aten.masked_select.default:
            source, chosen = args
            assert isinstance(source, Tensor) and isinstance(chosen, Tensor)
            if not isinstance(chosen, FakeTensor):
                num_chosen = int(chosen.expand(torch.broadcast_shapes(source.shape, chosen.shape)).sum())
                with self._fake:
                    return source.new_empty(num_chosen)
        if func in _INDEXED:
            source, indices, *others = args
            assert isinstance(indices, Sequence)
            args = (source, [place for index in indices for place in _positions(index)], *others)
        if func.namespace == "c10d" and "coalesced" in func.overloadpacket.__name__:
            # Torch knows no shapes of these; the fake group answers for any tensors, and what comes back is no tensor.
            return func(*tree_map(_emptied, args), **kwargs)
        with self._fake:
            return func(*args, **kwargs)


def _tensors_of(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_of(value)


def _emptied(leaf: object) -> object:
    return torch.empty(0) if isinstance(leaf, FakeTensor) else leaf


def _told(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 0


def _is_of_the_host(made: object) -> bool:
    """Whole numbers and flags that nothing on the device decides."""
    return isinstance(made, Tensor) and not made.is_floating_point()


def _positions(index: object) -> Sequence[object]:
    """A real mask as the positions that it chooses, of which there is a known number."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    return index.nonzero(as_tuple=True)
