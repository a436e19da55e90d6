"""GPUs that plans know, and how others are described."""

from dataclasses import dataclass

from rto_megatron.config.training import FrozenPrecisionConfig
from rto_megatron.errors import RecipeError

_GIB = 1024**3
PROCESS_BYTES = 1 << 30  # assumed: context, kernels and NCCL's buffers of one CUDA process


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its data sheet.

    Example:
        Gpu("h100", gib=79.6, tflops=989, gb_per_s=3350).usable_bytes
    """

    name: str
    gib: float  # memory that the driver shows
    tflops: float  # dense bf16 products
    gb_per_s: float  # to and from its memory
    # Products in 8 bits, twice as fast; of a GPU that is described it is taken for granted.
    has_fp8: bool = True

    @property
    def usable_bytes(self) -> int:
        """Memory less what a process takes for itself."""
        return int(self.gib * _GIB) - PROCESS_BYTES


# Memory: nvidia-smi's total. Products and bandwidth: NVIDIA's data sheets of the SXM cards (A100 80 GB, H100, H200,
# B200), for the H20 verl's table of peaks and NVIDIA's data sheet.
KNOWN_GPUS = {
    one.name: one
    for one in (
        Gpu("a100", 80.0, 312, 2039, has_fp8=False),
        Gpu("a800", 80.0, 312, 2039, has_fp8=False),
        Gpu("h100", 79.6, 989, 3350),
        Gpu("h800", 79.6, 989, 3350),
        Gpu("h20", 95.6, 148, 4000),
        Gpu("h200", 140.4, 989, 4800),
        Gpu("b200", 179.1, 2250, 8000),
    )
}


def find_gpu(text: str) -> Gpu:
    """A GPU by its name, or by its numbers: GiB, TFLOP/s and GB/s with colons between.

    Raises:
        RecipeError: neither; says how to describe one.
    """
    if text.lower() in KNOWN_GPUS:
        return KNOWN_GPUS[text.lower()]
    numbers = _numbers(text)
    if len(numbers) != 3 or min(numbers) <= 0:
        raise RecipeError(
            f"--gpu {text}: no GPU that is known here, which are {', '.join(KNOWN_GPUS)}; describe it by memory in "
            "GiB, dense bf16 TFLOP/s and memory bandwidth in GB/s, as in --gpu 96:148:4000"
        )
    gib, tflops, gb_per_s = numbers
    return Gpu(text, gib, tflops, gb_per_s)


def gpu_for(text: str, precision: FrozenPrecisionConfig) -> Gpu:
    """The GPU that is meant (`find_gpu`), which has what a recipe computes in.

    Raises:
        RecipeError: no such GPU, or the recipe multiplies in 8 bits and the GPU does not.
    """
    gpu = find_gpu(text)
    if precision.fp8 and not gpu.has_fp8:
        others = ", ".join(one.name for one in KNOWN_GPUS.values() if one.has_fp8)
        raise RecipeError(
            f"precision.fp8=true: a {gpu.name} has no products in 8 bits; set precision.fp8=false, or take {others}"
        )
    return gpu


def _numbers(text: str) -> list[float]:
    parts = text.split(":")
    if not all(part.replace(".", "", 1).isdigit() for part in parts):
        return []
    return [float(part) for part in parts]
