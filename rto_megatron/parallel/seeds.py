"""Seeds: a step's random numbers depend on (seed, step) alone, so a resumed run draws what an undisturbed one would."""

import hashlib
import random

import numpy
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed


def seed_step(seed: int, step: int, tensor_rank: int) -> None:
    """Seeds the generators of Python, numpy and torch, and Megatron's tensor-parallel ones, for one step."""
    own = seed + 100_003 * step
    random.seed(own)
    numpy.random.seed(own % 2**32)
    torch.manual_seed(own)
    seed_generators(own, tensor_rank)


def seed_generators(seed: int, tensor_rank: int) -> None:
    """Seeds those generators of Megatron that differ by tensor rank; none of them draws for experts."""
    model_parallel_cuda_manual_seed(
        seed, force_reset_rng=True, tp_rank=tensor_rank, ep_rank=0, etp_rank=tensor_rank
    )


def generator_states() -> dict[str, str]:
    """Generator -> sha256 of its state on this rank: equal where the next draw is."""
    legacy = numpy.random.get_state()
    assert isinstance(legacy, tuple)
    name, keys, *rest = legacy
    states = {
        "python": repr(random.getstate()).encode(),
        "numpy": repr((name, rest)).encode() + bytes(keys.tobytes()),
        "torch": _bytes(torch.get_rng_state()),
        **{f"megatron/{key}": _bytes(state) for key, state in get_cuda_rng_tracker().get_states().items()},
    }
    if torch.cuda.is_available():
        states["cuda"] = _bytes(torch.cuda.get_rng_state())
    return {key: hashlib.sha256(state).hexdigest() for key, state in states.items()}


def _bytes(state: torch.Tensor) -> bytes:
    return bytes(state.cpu().numpy().tobytes())
