"""Whether this machine's CPU multiplies bf16; as a program it prints the dtype that is fast, for launchers."""

import torch


def multiplies_bf16() -> bool:
    """Whether torch has a kernel for products of bf16 on this CPU; on x86 it takes AVX-512.

    Without one torch multiplies by plain loops: 2 GFLOP/s on a core that reaches 50 in fp32.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_dtype(dtype: str, has_bf16: bool) -> str | None:
    """A warning of a `precision.dtype` in which ranks on such a CPU multiply slowly; None: they do not."""
    if dtype == "fp32" or has_bf16:
        return None
    return (
        f"precision.dtype={dtype} on a CPU without products of bf16 (on x86 they take AVX-512): torch multiplies bf16 "
        "there about 20 times slower than fp32; set precision.dtype=fp32"
    )


if __name__ == "__main__":
    print("bf16" if multiplies_bf16() else "fp32")
