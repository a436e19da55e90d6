"""What a process computes layers with, torch or TransformerEngine: chosen once, before megatron.core is imported.

megatron-core 0.19.2 looks for TransformerEngine and apex when it is imported. Where it finds them it takes their
optimizers, their norms of gradients and TransformerEngine's product of routers, for torch's layers as well. A process
that computes with torch must therefore not find them.
"""

import importlib
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from typing import Literal

import torch

from rto_megatron.config.training import FrozenPrecisionConfig
from rto_megatron.errors import MachineError

Kernels = Literal["torch", "transformer_engine"]

_ENGINE: Literal["transformer_engine"] = "transformer_engine"
_LOOKED_FOR = (_ENGINE, "apex")  # by megatron-core
# Of requirements/gpu-extras.txt: the names and shapes of its layers were compared with torch's.
_RELEASE = "2.20."
_FP8_SINCE = (8, 9)
_INSTALL = "bash launchers/install_gpu.sh builds it; or set precision.kernels=torch"


def choose(precision: FrozenPrecisionConfig | None) -> Kernels:
    """What this process computes with from here on; a choice that was made stands.

    Args:
        precision: of the recipe; None: what was chosen before, or else torch.

    Raises:
        MachineError: TransformerEngine is asked for and cannot be used here.
    """
    made = _made()
    if made is not None:
        assert precision is None or precision.kernels in (made, "auto"), f"{made} was chosen before"
        if made == "torch":  # also where megatron.core was imported without being asked for
            _hide()
        return made
    if precision is not None and _wants_engine(precision):
        problem = engine_problem()
        if problem is not None:
            raise MachineError(f"precision.kernels={precision.kernels}, and {problem}")
        return _ENGINE
    _hide()
    return "torch"


def engine_problem() -> str | None:
    """Why TransformerEngine cannot be used on this machine, and what to do; None: it can."""
    if not is_installed():
        return f"TransformerEngine is not installed; {_INSTALL}"
    version = metadata.version("transformer-engine")
    if not version.startswith(_RELEASE):
        return f"TransformerEngine {version} is installed, expected {_RELEASE}*; {_INSTALL}"
    if not torch.cuda.is_available():
        return "torch sees no GPU, without which TransformerEngine has no kernel; set precision.kernels=torch"
    try:
        importlib.import_module(f"{_ENGINE}.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # as a foreign binary may fail
        return (
            f"TransformerEngine {version} cannot be loaded ({type(error).__name__}: {error}): its part for torch is "
            f"missing, or was built against another torch than {torch.__version__}; {_INSTALL}"
        )
    return None


def require_fp8(name: str, capability: tuple[int, int]) -> None:
    """Refuses products in 8 bits on a GPU that has none.

    Args:
        name: of the GPU.
        capability: of CUDA's, as (8, 0).

    Raises:
        MachineError: it is older than Ada and Hopper.
    """
    if capability < _FP8_SINCE:
        raise MachineError(
            f"precision.fp8=true: {name} (compute capability {capability[0]}.{capability[1]}) has no products in 8 "
            f"bits, which there are from {_FP8_SINCE[0]}.{_FP8_SINCE[1]} on (Ada, Hopper); set precision.fp8=false"
        )


def is_installed() -> bool:
    """Whether TransformerEngine lies on the path, hidden from this process or not."""
    return PathFinder.find_spec(_ENGINE) is not None


def _wants_engine(precision: FrozenPrecisionConfig) -> bool:
    if precision.kernels != "auto":
        return precision.kernels == _ENGINE
    return precision.dtype == "bf16" and torch.cuda.is_available() and is_installed()


def _made() -> Kernels | None:
    """The choice that megatron.core, once imported, or a hidden package is proof of."""
    if _ENGINE in sys.modules and sys.modules[_ENGINE] is None:
        return "torch"
    if "megatron.core" not in sys.modules:
        return None
    return _ENGINE if _ENGINE in sys.modules else "torch"


def _hide() -> None:
    """Lets every import of the packages fail from here on, as if they were not installed."""
    for name in (*_LOOKED_FOR, *sys.modules):
        if name.split(".")[0] in _LOOKED_FOR:
            sys.modules[name] = None  # type: ignore[assignment]  # how Python forbids an import
