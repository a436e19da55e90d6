"""The device of this rank and the one call that makes megatron.core importable on it."""

import logging
import os
import warnings
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

import torch

from rto_megatron.config.training import FrozenPrecisionConfig
from rto_megatron.errors import MachineError
from rto_megatron.platform import cpu
from rto_megatron.platform.kernels import Kernels, choose, require_fp8


@dataclass(frozen=True)
class Device:
    """Where this rank computes and how it talks to the others.

    Example:
        Device(torch.device("cpu"), backend="gloo").is_cuda
    """

    torch_device: torch.device
    backend: Literal["nccl", "gloo"]
    kernels: Kernels = "torch"  # of the layers of all roles that are not in float32
    has_fp8: bool = False  # in which those layers' products are in 8 bits

    @property
    def is_cuda(self) -> bool:
        """True where tensors live on a GPU."""
        return self.torch_device.type == "cuda"


def prepare(precision: FrozenPrecisionConfig | None = None) -> Device:
    """Choose this rank's device and patch what megatron.core needs, before megatron.core is first imported.

    Reads LOCAL_RANK (default 0) on machines with CUDA and OMP_NUM_THREADS (default 1) on machines without.
    May be called again: it answers the same.

    Args:
        precision: of the recipe, whose `kernels` are chosen; None: those that were chosen before, or torch.

    Raises:
        UserError: LOCAL_RANK names no GPU, the kernels cannot be used here, or an `apex` is installed that is another
            package.
    """
    # Megatron overlaps tensor-parallel collectives with compute, which needs one queue in launch order. The driver
    # reads it when it starts in this process, so before torch is asked anything of it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    require_usable_apex()
    silence_warnings()
    device = _choose_device(choose(precision))
    if precision is not None and precision.fp8:
        require_fp8(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
        device = replace(device, has_fp8=True)
    cpu.install()
    # Their modules import megatron.core, which must find the patches of cpu in place.
    from rto_megatron.platform import packed_rope, safe_metadata, sync_save, torch_adam, torch_clipping

    packed_rope.install()
    torch_adam.install()
    if device.kernels == "torch":  # the other kernels bring their own
        torch_clipping.install()
    safe_metadata.install()
    sync_save.install()
    return device


def _choose_device(kernels: Kernels) -> Device:
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        return Device(cpu.CPU, "gloo", kernels)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise MachineError(
            f"LOCAL_RANK={local_rank}, but this machine shows {num_gpus} GPUs; "
            f"start at most {num_gpus} ranks per machine"
        )
    torch.cuda.set_device(local_rank)
    return Device(torch.device("cuda", local_rank), "nccl", kernels)


def sum_in_one_order() -> None:
    """Has kernels add up alike each time, in this process, for whoever compares bit for bit.

    On a GPU the backward pass of attention adds up in no fixed order otherwise, which is faster. Call it before
    anything is computed: cuBLAS reads its variable once, and without it torch refuses the products.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def require_usable_apex() -> None:
    """Refuse an installed `apex` that is not NVIDIA's; megatron.core imports whatever has the name.

    Raises:
        MachineError: `apex` is PyPI's web toolkit.
    """
    apex = PathFinder.find_spec("apex")
    if apex is None:
        return
    folders = [Path(folder) for folder in apex.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        raise MachineError(
            f"the package `apex` at {apex.origin or folders} is not NVIDIA's but an unrelated one that has "
            "the same name on PyPI; remove it: pip uninstall apex"
        )


def silence_warnings() -> None:
    """Drop what megatron.core says about packages and features that this package does without."""
    for message, category in _NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for logger in _NEEDLESS_LOGS:
        logging.getLogger(logger).addFilter(_is_worth_reading)


_NEEDLESS_WARNINGS = (
    (r".*Apex (is|are) not installed", UserWarning),
    (r"invalid escape sequence", SyntaxWarning),
    (r"MimoModelConfig is experimental", UserWarning),
    (r"full scope is deprecated", UserWarning),
    # megatron's optimizer looks at .grad of its parameter shards, which are views.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (r"`torch.distributed.\w+` is deprecated", FutureWarning),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    (r"The argument order of load has been changed", UserWarning),
    # Checkpoint metadata is read by each rank for itself.
    (r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning),
    (r"When using async grad allreduce it is recommended", UserWarning),  # set below where there are GPUs
)
_NEEDLESS_LOGS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # What older versions read as well is written beside the new form.
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NEEDLESS_LOGS[record.name])
