"""A GPU that is not there: its tensors have a place, a shape and a dtype, and no numbers. The host's are real.

To read a number off it is an error, as it would be a stop of a GPU's queue. A backward pass cannot be taken on it:
autograd asks CUDA's driver for a stream for each device it meets.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
_KINDS = {torch.float32: "Float", torch.bfloat16: "BFloat16"}


class FakeGpu(TorchDispatchMode):
    """Counts the copies to the GPU, and keeps what was told to Adam's kernel.

    Example:
        with FakeGpu() as gpu:
            token_batch(sequences, True, 1, GPU)
        gpu.waited == []
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_copies = 0
        self.waited: list[
            torch.Size
        ] = []  # of copies that the host waits for, or that pageable memory is read for
        self.kernel: list[tuple[object, ...]] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_there = any(isinstance(one, FakeTensor) for one in tensors)
        if not is_there and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        if func is aten._to_copy.default and not is_there:
            self.num_copies += 1
            if not (kwargs.get("non_blocking") and id(args[0]) in _pinned):
                self.waited.append(args[0].shape)
        if func.namespace == "c10d":  # of a group of one rank, which has nothing to hear
            return func(*tree_map(_emptied, args), **kwargs)
        if func is aten._fused_adamw_.default:
            self.kernel.append(args)
        with self._fake:
            return func(*args, **kwargs)


def _emptied(leaf: object) -> object:
    return torch.empty(0, device="cpu") if isinstance(leaf, FakeTensor) else leaf


_pinned: dict[int, Tensor] = {}  # id -> what is kept, so that no other tensor gets the id


def _pin(tensor: Tensor) -> Tensor:
    """In the place of `pin_memory`, which there is no driver for."""
    pinned = tensor.clone()
    _pinned[id(pinned)] = pinned
    return pinned


def _kind_or_cast(tensor: Tensor, dtype: torch.dtype | None = None) -> str | Tensor:
    """In the place of `type`, whose names Megatron compares."""
    return f"torch.cuda.{_KINDS[tensor.dtype]}Tensor" if dtype is None else tensor.to(dtype)


def pretend() -> None:
    """Undoes what `platform.cpu` does to tensors of GPUs, and has no need of a driver."""
    torch.Tensor.pin_memory = _pin
    torch.Tensor.type = _kind_or_cast
    torch.nn.Module.to = lambda self, device: self  # which swaps tensors, and fake ones cannot be swapped
    torch.cuda.current_device = lambda: GPU
    torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)  # or `torch.tensor` would write to the GPU itself
    for factory in ("zeros", "ones", "empty", "tensor", "empty_like"):
        setattr(torch, factory, getattr(torch, factory).__wrapped__)
