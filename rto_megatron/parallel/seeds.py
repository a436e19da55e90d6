"""Seeds: a step's random numbers depend on (seed, step) alone, so a resumed run draws what an undisturbed one would."""

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def seed_step(seed: int, step: int) -> None:
    """Seeds torch and Megatron's tensor-parallel generators for one step."""
    torch.manual_seed(seed + 100_003 * step)
    model_parallel_cuda_manual_seed(seed + 100_003 * step, force_reset_rng=True)
