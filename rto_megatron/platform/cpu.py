"""Megatron-core 0.19.2 on a machine without CUDA: numbered patches of torch and megatron, no-ops with CUDA.

`install()` must run before anything else imports megatron.core, and only in trainer ranks. Every patch is one
function; PATCHES gives the order. A patch is here because something that this package runs fails without it:
GPT, dense or with experts, over TP, PP, SP, EP and DP, DDP, the distributed optimizer, recompute, checkpoints.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence, Set
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo, Store, distributed_c10d
from torch.utils._device import _device_constructors

from rto_megatron.platform.patches import apply_missing, replace

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
    replace(torch.cuda, "current_device", _current_device)


def p2_synchronize() -> None:
    """Waiting for the device returns at once.

    Call sites: pipeline_parallel/p2p_communication.py and preload_tensors of
    dist_checkpointing/strategies/filesystem_async.py.
    """
    replace(torch.cuda, "synchronize", _synchronize)


class _Stream:
    """A stream on which everything has already happened; it stands for its events as well."""

    def wait_stream(self, stream: object) -> None:
        return None

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        return None


_STREAM = _Stream()


def _current_stream(device: object = None) -> _Stream:
    return _STREAM


def _on_stream(stream: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def p3_current_stream() -> None:
    """The current stream is one that is always done.

    Call sites: start_grad_sync and start_param_sync of distributed/param_and_grad_buffer.py.
    """
    replace(torch.cuda, "current_stream", _current_stream)


def p4_rng_state() -> None:
    """The "CUDA" random state is that of the CPU generator.

    Call sites: CudaRNGStatesTracker.add, model_parallel_cuda_manual_seed and the recomputation of
    tensor_parallel/random.py.
    """
    replace(torch.cuda, "manual_seed", _manual_seed)
    for module in (torch.cuda, torch.cuda.random):
        replace(module, "get_rng_state", _get_rng_state)
        replace(module, "set_rng_state", _set_rng_state)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def create(*args: object, **kwargs: object) -> Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def p5_factories() -> None:
    """Tensor factories read the literal device="cuda" as the CPU.

    Call sites: total_num_tokens of pipeline_parallel/schedules.py, norms of optimizer/clip_grads.py,
    found_inf and scale of optimizer/optimizer.py, the causal mask of transformer/utils.py, and the exchange
    of loaded tensors in dist_checkpointing/exchange_utils.py.
    """
    # `with torch.device("meta")` knows factories by identity, from its first use on: it must meet the originals.
    _device_constructors()
    for name in ("zeros", "ones", "empty", "tensor", "empty_like"):
        replace(torch, name, _on_cpu(getattr(torch, name)))


def p6_tensor_cuda() -> None:
    """`tensor.cuda()` stays where it is.

    Call sites: get_parameter_state_dp_zero of optimizer/distrib_optimizer.py when saving, and
    dist_checkpointing/exchange_utils.py when loading.
    """

    def cuda(self: Tensor, device: object = None, non_blocking: bool = False) -> Tensor:
        return self

    replace(torch.Tensor, "cuda", cuda)


def p7_type_names() -> None:
    """`tensor.type()` answers megatron.core, and nobody else, with the name of the CUDA type.

    Call sites compare that string: optimizer/optimizer.py:1009, distrib_optimizer.py:401, clip_grads.py:174.
    """
    type_of: Callable[..., str | Tensor] = torch.Tensor.type

    def type_or_cast(self: Tensor, dtype: object = None, **kwargs: object) -> str | Tensor:
        if dtype is not None:
            return type_of(self, dtype, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        name = str(type_of(self))
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.") else name

    replace(torch.Tensor, "type", type_or_cast)


def p8_rng_tracker() -> None:
    """The RNG tracker restores the CPU generator, and does not warn that this generator moved.

    Call site: _set_cuda_rng_state of tensor_parallel/random.py queues its work until CUDA starts, which is
    never: without the patch the seeds of the tracker are silently ignored.
    """
    from megatron.core.tensor_parallel import random

    def set_rng_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    replace(random, "_set_cuda_rng_state", set_rng_state)
    logging.getLogger(random.__name__).addFilter(_is_not_about_the_generator)


def p9_side_streams() -> None:
    """Work for a side stream is done at once.

    Call sites: the constructor and _maybe_dtoh_and_synchronize of MoEAlltoAllTokenDispatcher in
    transformer/moe/token_dispatcher.py.
    """
    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "stream", _on_stream)


def _compile_when_called(compile_now: Callable[..., Callable[..., object]]) -> Callable[..., object]:
    def compile_later(model: Callable[..., object] | None = None, **options: object) -> Callable[..., object]:
        if model is None:
            return lambda found: compile_later(found, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))

        @functools.wraps(model)
        def call(*args: object, **kwargs: object) -> object:
            return compiled()(*args, **kwargs)

        return call

    return compile_later


def p10_compile() -> None:
    """A function that is decorated with torch.compile is compiled when it is called first.

    Call sites: every function under jit_fuser, from fusions/fused_bias_geglu.py on. Decorating one loads inductor,
    a quarter of the seconds in which a rank starts, and none of them is called on a CPU.
    """
    replace(torch, "compile", _compile_when_called(torch.compile))


class _OnSharedDevices(ProcessGroupGloo):
    """A group whose connections all other groups' event loops serve too."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # a name that the stub spells otherwise
        options._devices = _gloo_devices(os.getpid())
        options._timeout = timeout
        super().__init__(store, rank, size, options)


@functools.cache
def _gloo_devices(process: int) -> list[ProcessGroupGloo.Device]:
    """Those that gloo would choose, made once in a process: a forked one has not the threads of its parent."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if names is None:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]


def p11_gloo_devices() -> None:
    """All process groups share gloo's devices, each of which is a thread that wakes up a hundred times a second.

    Call sites: the groups of a layout, of which a rank makes one collection or more.
    """
    replace(distributed_c10d, "ProcessGroupGloo", _OnSharedDevices)


def _as_host_numbers(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def p12_split_sizes() -> None:
    """Split sizes of an exchange of tokens become numbers on the host.

    Call site: _maybe_dtoh_and_synchronize of transformer/moe/token_dispatcher.py moves only tensors that are on a GPU,
    and gloo's all-to-all refuses sizes that are a tensor.
    """
    from megatron.core.transformer.moe import token_dispatcher

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", _as_host_numbers)


def _gather_uneven(gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def gather_padded(
        rows: Tensor,
        group: ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(rows, group, output_split_sizes, use_global_buffer)
        padded = rows.new_zeros(max(output_split_sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        whole = gather(padded, group).chunk(group.size())
        return torch.cat([part[:size] for part, size in zip(whole, output_split_sizes, strict=True)])

    return gather_padded


def _scatter_uneven(scatter: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scatter_by_sum(
        rows: Tensor,
        group: ProcessGroup,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(rows, group, input_split_sizes, use_global_buffer)
        total = rows.contiguous().clone()
        distributed_c10d.all_reduce(total, group=group)
        own: Tensor = total.split([int(size) for size in input_split_sizes])[group.rank()]
        return own.clone()

    return scatter_by_sum


def p13_uneven_parts() -> None:
    """Parts of unequal length are gathered padded, and their sums scattered by an all-reduce.

    Call sites: the exchange over the tensor ranks of an expert in transformer/moe/token_dispatcher.py, through
    tensor_parallel/mappings.py. gloo takes equal parts alone.
    """
    from megatron.core.tensor_parallel import mappings

    replace(mappings, "_gather_along_first_dim", _gather_uneven(mappings._gather_along_first_dim))
    replace(
        mappings, "_reduce_scatter_along_first_dim", _scatter_uneven(mappings._reduce_scatter_along_first_dim)
    )


def _is_not_about_the_generator(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("CPU RNG state changed")


PATCHES: dict[str, Callable[[], None]] = {
    "P10": p10_compile,  # before P8, which imports megatron.core
    "P1": p1_current_device,
    "P2": p2_synchronize,
    "P3": p3_current_stream,
    "P4": p4_rng_state,
    "P5": p5_factories,
    "P6": p6_tensor_cuda,
    "P7": p7_type_names,
    "P8": p8_rng_tracker,
    "P9": p9_side_streams,
    "P11": p11_gloo_devices,
    "P12": p12_split_sizes,
    "P13": p13_uneven_parts,
}


def install(skip: Set[str] = frozenset()) -> None:
    """Apply the patches that this process does not have yet; does nothing where CUDA is available.

    Args:
        skip: names of patches to leave out, for the tests that show what each one is for.
    """
    if torch.cuda.is_available():
        return
    apply_missing(PATCHES, _applied, skip)
