"""Seconds that a step takes, by phase, from fixed constants; and what no machine of that kind can be faster than.

Constants were fixed before anything was predicted with them; each names its source. Published steps that they are held
against, fitted ones and others, stand in tests/planning/test_step_time.py and docs/planning.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rto_megatron.models.model_flops import forward_flops, layer_weights, weights_per_token
from rto_megatron.models.parameters import num_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.colocated_memory import cache_bytes_per_token
from rto_megatron.planning.gpus import Gpu

TRAINING_FORWARDS = 3  # a forward with its backward
_RECOMPUTED = 1  # forwards more, where layers are recomputed


@dataclass(frozen=True)
class Efficiency:
    """What of a GPU's data sheet a program reaches.

    Example:
        Efficiency(decode=0.5)
    """

    # Of memory bandwidth; vLLM PRs 10984 and 11078 (0.54-0.58), TensorRT-LLM 1.0 (0.45-0.70).
    decode: float = 0.55
    # Of dense bf16 products: Megatron's model FLOPs utilisation of dense bf16 training, 38-47 %.
    products: float = 0.40
    # Times that products of layers are faster than bf16's: 2 in 8 bits, by every data sheet.
    layers: float = 1.0
    launch_s: float = 1e-3  # of a decode step beside the GPU's work; fitted on the sampling of P8
    overhead: float = 1.33  # of a whole step; NeMo-RL 0.5, GRPO of Llama-3.1-8B and of Qwen3-32B
    # Over InfiniBand, 400 Gbit/s (llm-d-rl's benchmark: 47.8); NVLink 60 (checkpoint-engine).
    push_gb_per_s: float = 45.0
    push_control_s: float = 0.5  # pause and wake servers (llm-d-rl's benchmark: 0.52-0.6)
    offload_gb_per_s: float = 25.0  # pinned, over PCIe 4 x16 (32 by its specification; PCIe 5 has twice that)


EXPECTED = Efficiency()
LIMIT = Efficiency(
    decode=1.0, products=1.0, launch_s=0.0, overhead=1.0, push_control_s=0.0, offload_gb_per_s=math.inf
)


@dataclass(frozen=True)
class PoolServers:
    """An inference pool: so many servers, each over `tensor` GPUs.

    Example:
        PoolServers(shape, gpu, num=8, tensor=1).sampling_s(1024, 512, 512, 1024, EXPECTED)
    """

    shape: ModelShape
    gpu: Gpu
    num: int
    tensor: int = 1
    weight_width: int = 2  # bytes of a weight
    cache_width: int = 2  # bytes of a number in the cache
    memory_fraction: float = 0.9  # of a GPU, for weights and cache
    most_sequences: int | None = None  # at a time, by the server's own setting

    @property
    def weight_bytes(self) -> int:
        """Of all GPUs of a server together."""
        return num_parameters(self.shape, has_scalar_head=False) * self.weight_width

    def sequences_at_a_time(self, context: float) -> float:
        """That the cache has room for."""
        room = self.memory_fraction * self.gpu.gib * 2**30 * self.tensor - self.weight_bytes
        fitting = room / (self._cache_per_token * context)
        return fitting if self.most_sequences is None else min(fitting, self.most_sequences)

    def decode_s(self, sequences: float, context: float, by: Efficiency) -> float:
        """One token of each of some sequences: weights and cache are read once, or products take longer."""
        moved = self.weight_bytes + sequences * context * self._cache_per_token
        products = 2.0 * weights_per_token(self.shape, False) * sequences
        seconds = max(
            moved / (self.tensor * self.gpu.gb_per_s * 1e9), products / (self.tensor * self._flops_per_s)
        )
        return seconds / by.decode + by.launch_s

    def prefill_s(self, num_tokens: float, by: Efficiency) -> float:
        """Prompts of so many tokens, on one server."""
        return (
            2.0
            * weights_per_token(self.shape, False)
            * num_tokens
            / (self.tensor * self._flops_per_s * by.products)
        )

    def sampling_s(
        self, responses: int, prompt: float, mean_response: float, longest_response: float, by: Efficiency
    ) -> float:
        """All responses of a step: as long as the pool's throughput takes, or as its longest response does alone."""
        context = prompt + mean_response / 2
        own = responses / self.num
        sequences = max(1.0, min(own, self.sequences_at_a_time(context)))
        throughput = own * mean_response * self.decode_s(sequences, context, by) / sequences
        tail = longest_response * self.decode_s(1, prompt + longest_response / 2, by)
        return max(throughput + self.prefill_s(own * prompt, by), tail)

    @property
    def _cache_per_token(self) -> int:
        return cache_bytes_per_token(self.shape, self.cache_width, 1)

    @property
    def _flops_per_s(self) -> float:
        # 8-bit products are twice as fast on every card of the table that has them.
        return self.gpu.tflops * 1e12 * (2 / self.weight_width)


def forward_s(
    models: Sequence[tuple[ModelShape, bool]], lengths: Sequence[int], gpu: Gpu, gpus: int, by: Efficiency
) -> float:
    """One forward of some models over sequences.

    Args:
        models: shape, and whether it has a scalar head.
        lengths: tokens of each sequence of the step.
    """
    flops, tokens = 0.0, sum(lengths)
    for shape, is_scalar in models:
        of_layers = 2.0 * layer_weights(shape) * tokens
        flops += forward_flops(shape, is_scalar, lengths) - of_layers * (1 - 1 / by.layers)
    return flops / (gpus * gpu.tflops * 1e12 * by.products)


def training_s(
    models: Sequence[tuple[ModelShape, bool]],
    lengths: Sequence[int],
    gpu: Gpu,
    gpus: int,
    by: Efficiency,
    is_recomputed: bool,
    bubble: float = 0.0,
) -> float:
    """Forward and backward of some models over sequences.

    Args:
        bubble: (stages - 1) / micro-batches of an optimizer step.
    """
    times = TRAINING_FORWARDS + (_RECOMPUTED if is_recomputed and by.products < 1 else 0)
    idle = bubble if by.products < 1 else 0.0
    return times * forward_s(models, lengths, gpu, gpus, by) * (1 + idle)


def push_s(num_bytes: float, by: Efficiency) -> float:
    """Weights to every server."""
    return by.push_control_s + num_bytes / (by.push_gb_per_s * 1e9)
