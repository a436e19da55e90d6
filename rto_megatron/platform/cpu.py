"""Megatron-core 0.19.2 on a machine without CUDA: numbered patches of torch and megatron, no-ops with CUDA.

`install()` must run before anything else imports megatron.core, and only in trainer ranks. Every patch is one
function; PATCHES gives the order. A patch is here because something that this package runs fails without it:
dense GPT with TP, PP, SP and DP, DDP, the distributed optimizer, recompute, torch_dist checkpoints.
"""

import functools
import logging
import sys
from collections.abc import Callable, Set

import torch
from torch import Tensor

CPU = torch.device("cpu")
_applied: set[str] = set()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _current_device() -> torch.device:
    return CPU


def _synchronize(device: object = None) -> None:
    return None


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _get_rng_state(device: object = "cuda") -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, device: object = "cuda", graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def p1_current_device() -> None:
    """The current device is the CPU.

    Call sites: every `device=torch.cuda.current_device()`, such as tensor_parallel/layers.py, the buffers of
    distributed/param_and_grad_buffer.py and pipeline_parallel/p2p_communication.py.
    """
    torch.cuda.current_device = _current_device


def p2_synchronize() -> None:
    """Waiting for the device returns at once.

    Call sites: pipeline_parallel/p2p_communication.py, dist_checkpointing/strategies/filesystem_async.py, timers.py.
    """
    torch.cuda.synchronize = _synchronize


class _Stream:
    """The only stream: everything on it has already happened."""

    def wait_stream(self, stream: "_Stream") -> None:
        return None

    def synchronize(self) -> None:
        return None


_STREAM = _Stream()


def _current_stream(device: object = None) -> _Stream:
    return _STREAM


def p3_current_stream() -> None:
    """The current stream is one that is always done.

    Call sites: DistributedDataParallel.__init__ and start of the gradient reductions in
    distributed/param_and_grad_buffer.py.
    """
    torch.cuda.current_stream = _current_stream


def p4_rng_state() -> None:
    """The "CUDA" random state is that of the CPU generator.

    Call sites: CudaRNGStatesTracker.add, model_parallel_cuda_manual_seed and the recomputation of
    tensor_parallel/random.py.
    """
    torch.cuda.manual_seed = _manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = _set_rng_state


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def create(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def p5_factories() -> None:
    """Tensor factories read the literal device="cuda" as the CPU.

    Call sites: total_num_tokens of pipeline_parallel/schedules.py, grad norms of optimizer/clip_grads.py, found_inf and
    scale of optimizer/optimizer.py, the causal mask of transformer/utils.py, dist_checkpointing/exchange_utils.py.
    """
    for name in ("zeros", "ones", "empty", "tensor", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def p6_moves() -> None:
    """`tensor.cuda()` and `tensor.to("cuda")` stay on the CPU.

    Call sites: optimizer/optimizer.py, optimizer/distrib_optimizer.py, dist_checkpointing/exchange_utils.py.
    """
    to = torch.Tensor.to

    def to_cpu(self: Tensor, *args, **kwargs) -> Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    def cuda(self: Tensor, device: object = None, non_blocking: bool = False) -> Tensor:
        return self

    torch.Tensor.cuda = cuda
    torch.Tensor.to = to_cpu


def p7_type_names() -> None:
    """`tensor.type()` answers megatron.core, and nobody else, with the name of the CUDA type.

    Call sites compare that string: optimizer/optimizer.py:1009, distrib_optimizer.py:401, clip_grads.py:174.
    """
    type_of = torch.Tensor.type

    def type_or_cast(self: Tensor, dtype: object = None, **kwargs) -> str | Tensor:
        if dtype is not None:
            return type_of(self, dtype, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        name = type_of(self)
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.") else name

    torch.Tensor.type = type_or_cast


def p8_no_compilation() -> None:
    """megatron's jit_fuser leaves functions as they are.

    jit.py makes it torch.compile, which needs a C++ compiler and minutes per process on a CPU; importing megatron.core
    already decorates functions with it.
    """
    compile_function = torch.compile
    torch.compile = lambda function=None, **kwargs: function if function is not None else (lambda f: f)
    import megatron.core.jit

    torch.compile = compile_function
    megatron.core.jit.disable_jit_fuser()


def p9_rng_tracker() -> None:
    """The RNG tracker restores the CPU generator; its warning that this generator moved says nothing here.

    tensor_parallel/random.py:_set_cuda_rng_state queues its work until CUDA starts, which is never: without the patch
    every seed of the tracker is silently ignored.
    """
    from megatron.core.tensor_parallel import random

    def set_rng_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._set_cuda_rng_state = set_rng_state
    logging.getLogger(random.__name__).addFilter(
        lambda record: not record.msg.startswith("CPU RNG state changed")
    )


PATCHES: dict[str, Callable[[], None]] = {
    "P1": p1_current_device,
    "P2": p2_synchronize,
    "P3": p3_current_stream,
    "P4": p4_rng_state,
    "P5": p5_factories,
    "P6": p6_moves,
    "P7": p7_type_names,
    "P8": p8_no_compilation,
    "P9": p9_rng_tracker,
}


def install(skip: Set[str] = frozenset()) -> None:
    """Apply the patches that this process does not have yet; does nothing where CUDA is available.

    Args:
        skip: names of patches to leave out, for the tests that show what each one is for.
    """
    if torch.cuda.is_available():
        return
    for name, apply in PATCHES.items():
        if name not in skip and name not in _applied:
            apply()
            _applied.add(name)
