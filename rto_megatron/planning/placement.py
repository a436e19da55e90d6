"""Gives each server of a pool its GPUs and the length of its sequences."""

import os
from collections.abc import Sequence
from itertools import accumulate

from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
from rto_megatron.errors import RecipeError


def max_model_len(config: ReinforcementStage | EvaluateStage) -> int:
    """Tokens of prompt and response that a stage's servers must take."""
    return max(64, config.data.max_prompt_tokens + config.sampling.max_response_tokens)


def tensor_sizes(given: str, num_servers: int | None, num_gpus: int | None) -> list[int]:
    """Tensor-parallel size of each server.

    Args:
        given: one number for all servers, or one for each, as in "2" or "1,2".
        num_servers: None: as many as `given` lists, or as `num_gpus` hold.
        num_gpus: for the whole pool; None: as many as the servers take.

    Raises:
        RecipeError: no numbers, or they contradict the counts.
    """
    parts = given.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"tensor-parallel sizes {given!r}: expected numbers from 1 on, as in 2 or 1,2")
    sizes = [int(part) for part in parts]
    if len(sizes) == 1:
        sizes *= num_servers or max(1, (num_gpus or sizes[0]) // sizes[0])
    if num_servers is not None and len(sizes) != num_servers:
        raise RecipeError(
            f"{num_servers} servers have {len(sizes)} tensor-parallel sizes, {given}; name one each"
        )
    if num_gpus is not None and sum(sizes) > num_gpus:
        raise RecipeError(
            f"{len(sizes)} servers with tensor-parallel sizes {','.join(map(str, sizes))} need {sum(sizes)} GPUs, and "
            f"the pool has {num_gpus}; start fewer or smaller servers"
        )
    return sizes


def place(sizes: Sequence[int], devices: Sequence[int]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server, consecutive devices in order; None where there are no GPUs.

    Args:
        sizes: GPUs per server.
        devices: the pool's, as numbers among those that this process sees.
    """
    if not devices:
        return [None] * len(sizes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    ends = accumulate(sizes)
    groups = [devices[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [",".join(names[one] if names else str(one) for one in group) for group in groups]
