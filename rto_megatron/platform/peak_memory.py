"""The most memory that this rank needed."""

import resource

import torch

_KIB_PER_GIB = 1024**2
_BYTES_PER_GIB = 1024**3


def reset_peak_memory() -> None:
    """Starts a new period; without a GPU there is one period, the life of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """What torch held on the GPU at most in the period; without a GPU, what the process held in host memory, GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _BYTES_PER_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB
