"""TransformerEngine on a machine without a GPU: its Python part, with stand-ins for its binary and for its kernels.

Its modules build their real parameters, checkpoint entries and exchanges over ranks; what they compute is computed by
torch, by the definition. Needs the packages of requirements/transformer-engine-tests.txt, and no compiler.
"""

import enum
import functools
import sys
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CALLS: list[str] = []  # of kernels, in order, with what they were told of the sequences


class _Anything(type):
    """A class that has every attribute, each such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Anything(name, (_Base,), {})
        setattr(cls, name, value)
        return value

    def __int__(cls) -> int:
        return 0

    def __or__(cls, other: object) -> type:
        return object

    def __ror__(cls, other: object) -> type:
        return object


class _Base(metaclass=_Anything):
    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError(
            f"transformer_engine_torch.{type(self).__name__} was called: there is no binary here"
        )


class _Binary(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Anything(name, (_Base,), {})
        setattr(self, name, value)
        return value


def install() -> None:
    """Call it before megatron.core is imported, which this does: it finds TransformerEngine from then on."""
    from rto_megatron.platform import cpu

    _import_without_binary()
    cpu.install()
    _build_without_a_gpu()
    _compute_with_torch()


def _import_without_binary() -> None:
    binary = _Binary("transformer_engine_torch")
    names = (
        "kByte",
        "kInt32",
        "kFloat32",
        "kFloat16",
        "kBFloat16",
        "kFloat8E4M3",
        "kFloat8E5M2",
        "kFloat4E2M1",
    )
    backends = ("NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend")
    binary.DType = enum.IntEnum("DType", names, start=0)
    binary.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends, start=0)
    # Its first import wants the part for torch, which wants the binary.
    sys.modules["transformer_engine.pytorch"] = types.ModuleType("transformer_engine.pytorch")
    import transformer_engine
    from transformer_engine import common

    del sys.modules["transformer_engine.pytorch"], transformer_engine.pytorch
    sys.modules["transformer_engine_torch"] = binary
    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch


def _build_without_a_gpu() -> None:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    build = TransformerEngineBaseModule.__init__

    @functools.wraps(build)
    def build_here(self: object, *args: object, **kwargs: object) -> None:
        is_available = torch.cuda.is_available
        torch.cuda.is_available = lambda: True
        try:
            build(self, *args, **kwargs)
        finally:
            torch.cuda.is_available = is_available

    TransformerEngineBaseModule.__init__ = build_here


def _compute_with_torch() -> None:
    import transformer_engine.pytorch as te
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.transformer.moe import moe_utils

    te.Linear.forward, te.LayerNormLinear.forward = _linear, _layer_norm_linear
    te.GroupedLinear.forward, te.RMSNorm.forward = _grouped_linear, _rms_norm
    te.DotProductAttention.forward = _attention
    moe_utils.te_general_gemm = None
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_float = x.float()
    return weight * (x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _product(module: Any, x: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
    from megatron.core.tensor_parallel import mappings

    bias = module.bias if module.use_bias and module.bias.numel() else None
    is_cut, group = module.tp_size > 1, module.tp_group
    if is_cut and module.parallel_mode == "column":
        if module.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, group=group)
        else:
            x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
    y = functional.linear(x, weight, None if module.return_bias else bias)
    if is_cut and module.parallel_mode == "row":
        if module.sequence_parallel:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
        else:
            y = mappings.reduce_from_tensor_model_parallel_region(y, group=group)
    return (y, bias) if module.return_bias else y


def _linear(self: Any, inp: Tensor, is_first_microbatch: bool | None = None) -> object:
    CALLS.append("Linear")
    return _product(self, inp, self.weight)


def _layer_norm_linear(self: Any, inp: Tensor, is_first_microbatch: bool | None = None) -> object:
    CALLS.append("LayerNormLinear")
    assert not self.zero_centered_gamma
    return _product(self, _normed(inp, self.layer_norm_weight, self.eps), self.weight)


def _grouped_linear(self: Any, inp: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Tensor:
    CALLS.append("GroupedLinear")
    splits = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
    rows = inp.split(splits)
    return torch.cat([functional.linear(x, getattr(self, f"weight{i}")) for i, x in enumerate(rows)])


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    CALLS.append("RMSNorm")
    return _normed(x, self.weight, self.eps)


def _attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    qkv_format: str | None = None,
    attn_mask_type: str = "",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    **rest: object,
) -> Tensor:
    CALLS.append(f"DotProductAttention {qkv_format} {attn_mask_type}")
    assert attention_mask is None and all(found is None for found in rest.values()), rest
    if qkv_format != "thd":
        out = _attend(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)), attn_mask_type, self.softmax_scale
        ).permute(2, 0, 1, 3)
        return out.reshape(*out.shape[:2], -1)
    # As TransformerEngine asserts.
    assert "padding" in attn_mask_type and query.dim() == 3
    assert cu_seqlens_q is not None and cu_seqlens_kv is not None and cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_kv) and int(cu_seqlens_q[-1]) == len(query)
    lengths = cu_seqlens_q.diff().tolist()
    assert isinstance(max_seqlen_q, int) and max(lengths) <= max_seqlen_q == max_seqlen_kv
    pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    outs = [
        _attend(*(x.transpose(0, 1)[None] for x in piece), attn_mask_type, self.softmax_scale)[0].transpose(
            0, 1
        )
        for piece in pieces
    ]
    return torch.cat(outs).flatten(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal="causal" in mask, scale=scale, enable_gqa=is_grouped
    )
