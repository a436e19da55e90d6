"""A pool on the trainer's own GPUs: what lies in a GPU's memory in each phase, and how `rto launch` starts it.

Counted is the fullest GPU: models, optimizers and activations as in plan.py; for the pool the weights of one
shard and the buffers of a push. Assumed, not measured: what a CUDA process takes for itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.config.checks import find_problems, refuse
from rto_megatron.config.plan import StagePlan, fewest_ranks, plan_stage
from rto_megatron.config.roles import roles_of
from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
from rto_megatron.errors import RecipeError
from rto_megatron.generation.vllm.client.phases import PoolPhases
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.models.parameters import num_parameters, stored_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.activation_memory import activation_bytes
from rto_megatron.planning.memory import gib, model_bytes, resident_bytes, weight_bytes
from rto_megatron.planning.placement import tensor_sizes
from rto_megatron.planning.shapes import FoundShape, find_shape

_SLEEP_TIMEOUT_S = 120.0
_PROCESS_BYTES = 1 << 30  # context, kernels and NCCL's buffers of one CUDA process
SamplingStage = ReinforcementStage | EvaluateStage


@dataclass(frozen=True)
class SharedGpu:
    """One GPU and the pool's share of it.

    Args:
        num_bytes: of the GPU.
        pool_fraction: what vLLM may take of it for weights, cache and its own activations.
        pool_tensor: tensor-parallel size of a server.

    Example:
        SharedGpu(num_bytes=80 * 2**30, pool_fraction=0.4).pool_bytes
    """

    num_bytes: int
    pool_fraction: float
    pool_tensor: int = 1

    @property
    def pool_bytes(self) -> int:
        """The pool's share."""
        return int(self.num_bytes * self.pool_fraction)


@dataclass(frozen=True)
class PhaseMemory:
    """What a GPU holds in one phase, in bytes; `parts` in the order in which they are shown.

    Example:
        PhaseMemory("sample", {"weights": 2**34, "cache": 2**33}).total
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts.values())


def phase_memory(
    plan: StagePlan, shapes: Mapping[str, FoundShape], gpu: SharedGpu
) -> tuple[PhaseMemory, ...]:
    """The three phases of a step on the fullest GPU; models of unknown shape count nothing, the policy's is needed."""
    policy, width = shapes["policy"].shape, weight_bytes(plan.config.precision)
    assert plan.facts.pool is not None
    tensor, bucket_bytes = plan.layout_of("policy").tensor, plan.facts.pool.bucket_mb << 20
    bucket = largest_bucket_bytes(policy, width, tensor, bucket_bytes)
    push, sample = resident_bytes(plan, shapes, "push"), resident_bytes(plan, shapes, "sample")
    models = "trainer's models and optimizers"
    always = {
        "staging buffer of 2 buckets": 2 * bucket,
        "2 processes (assumed)": 2 * _PROCESS_BYTES,
    }
    weights = pool_weight_bytes(policy, width, gpu.pool_tensor)
    return (
        PhaseMemory(
            "training",
            {models: model_bytes(plan, shapes), **always, "activations": activation_bytes(plan, shapes)},
        ),
        PhaseMemory(
            "weight push",
            {
                models: push,
                **always,
                "pool's 2 receive buffers": 2 * bucket,
                "pool's weights": weights,
                "largest layer, loaded anew": _largest_layer(policy) * width // gpu.pool_tensor,
            },
        ),
        PhaseMemory(
            "generation",
            {
                models: sample,
                **always,
                "pool's weights": weights,
                "pool's cache": max(0, gpu.pool_bytes - weights),
            },
        ),
    )


def memory_problems(
    config: SamplingStage, policy: ModelShape, phases: Sequence[PhaseMemory], gpu: SharedGpu
) -> list[str]:
    """Why the phases do not fit on a GPU, one sentence each."""
    problems = [
        f"rollout.colocated: {phase.name} takes {gib(phase.total)} of a GPU's {gib(gpu.num_bytes)} ("
        f"{', '.join(f'{name} {gib(size)}' for name, size in phase.parts.items())}); {_advice(phase, gpu)}"
        for phase in phases
        if phase.total > gpu.num_bytes
    ]
    weights = pool_weight_bytes(policy, weight_bytes(config.precision), gpu.pool_tensor)
    longest = config.data.max_prompt_tokens + config.sampling.max_response_tokens
    least = weights + longest * cache_bytes_per_token(policy, weight_bytes(config.precision), gpu.pool_tensor)
    if least > gpu.pool_bytes:
        problems.append(
            f"rollout.gpu_memory_fraction={gpu.pool_fraction:g} gives the pool {gib(gpu.pool_bytes)} of a GPU, and its "
            f"weights with the cache of one sequence of {longest} tokens take {gib(least)}; raise it above "
            f"{math.ceil(100 * least / gpu.num_bytes) / 100:g}, or give a server more GPUs (--pool-tensor)"
        )
    return problems


def _advice(phase: PhaseMemory, gpu: SharedGpu) -> str:
    cache = phase.parts.get("pool's cache")
    if cache is None:
        return (
            "name more of the trainer in offload, use more GPUs, parallel.distributed_optimizer=true, smaller buckets, "
            "or a pool of its own"
        )
    others = phase.total - gpu.pool_bytes
    fitting = math.floor(100 * (gpu.num_bytes - others) / gpu.num_bytes) / 100
    if fitting <= 0:
        return (
            "no rollout.gpu_memory_fraction fits: name more in offload, use more GPUs, or a pool of its own"
        )
    return f"lower rollout.gpu_memory_fraction from {gpu.pool_fraction:g} to {fitting:g} or less"


def largest_bucket_bytes(policy: ModelShape, width: int, tensor: int, bucket_bytes: int) -> int:
    """The largest bucket of a push: a piece over `bucket_bytes` travels alone; a rank's piece is its shard."""
    numbers = max(math.prod(size) for p in stored_parameters(policy, False) for size in p.hf_shapes)
    return max(bucket_bytes, -(-numbers * width // tensor))


def pool_weight_bytes(policy: ModelShape, width: int, pool_tensor: int) -> int:
    """Weights of one worker of the pool; as much again is staged in pinned host memory during a push."""
    return -(-num_parameters(policy, has_scalar_head=False) * width // pool_tensor)


def cache_bytes_per_token(policy: ModelShape, width: int, pool_tensor: int) -> int:
    """Keys and values of one token in one worker; latent attention keeps its compression, whole, in each."""
    if policy.latent is not None:
        return (policy.latent.kv_rank + policy.latent.rope_dim) * policy.num_layers * width
    heads = max(1, policy.num_kv_heads // pool_tensor)
    return 2 * policy.num_layers * heads * policy.head_dim * width


def _largest_layer(policy: ModelShape) -> int:
    sizes: dict[int | str, int] = {}
    for parameter in stored_parameters(policy, False):
        key = parameter.megatron if parameter.layer is None else parameter.layer
        sizes[key] = sizes.get(key, 0) + sum(math.prod(size) for size in parameter.hf_shapes)
    return max(sizes.values())


def shared_sizes(
    config: SamplingStage,
    gpus: int,
    ranks: int | None,
    pool_gpus: int | None,
    pool_servers: int | None,
    pool_tensor: str,
) -> list[int]:
    """Tensor-parallel size of each server of a pool on the GPUs of the ranks.

    Raises:
        RecipeError: a GPU of the pool would have no rank, or trainer and pool do not fit on a GPU together.
    """
    if not gpus:
        return tensor_sizes(pool_tensor, pool_servers, None)
    refuse(find_problems(config, ranks or gpus, {}))
    is_counted = pool_servers is not None or "," in pool_tensor
    num_ranks = ranks or gpus
    sizes = tensor_sizes(pool_tensor, pool_servers, pool_gpus or (None if is_counted else num_ranks))
    if sum(sizes) > num_ranks:
        raise RecipeError(
            f"rollout.colocated: the pool's servers take {sum(sizes)} GPUs, and {num_ranks} have a trainer rank, from "
            "which a server gets its weights; start more ranks or fewer servers"
        )
    _refuse_overfull(config, num_ranks, min(sizes))
    return sizes


def _refuse_overfull(config: SamplingStage, num_ranks: int, pool_tensor: int) -> None:
    import torch

    found = {role.name: find_shape(role.path, None, role.found_as) for role in roles_of(config)}
    shapes = {name: shape for name, shape in found.items() if shape is not None}
    assert config.rollout.gpu_memory_fraction is not None
    memory = torch.cuda.get_device_properties(0).total_memory
    gpu = SharedGpu(memory, config.rollout.gpu_memory_fraction, pool_tensor)
    plan = plan_stage(config, max(num_ranks, fewest_ranks(config.parallel)))
    phases = phase_memory(plan, shapes, gpu)
    refuse(memory_problems(config, shapes["policy"].shape, phases, gpu))


def put_to_sleep(addresses: Sequence[str], token_file: Path) -> None:
    """Makes servers that have started give their memory back, for the ranks that start next.

    Raises:
        UserError: a server did not.
    """
    phases, token = PoolPhases(), read_token(token_file)
    for address in addresses:
        with ServerClient(address, token, _SLEEP_TIMEOUT_S) as client:
            phases.make_room(client)
