"""A worker whose layers add to a float32 residual: named on vLLM's command line in the place of the plain extension.

vLLM's layers hand the residual from norm to norm, and a norm adds to it what came out of attention or network. In the
place of vLLM's norm one of this module is made, through the registry that vLLM has for it, which keeps the sum as it
is: the residual is float32, what goes into matrix products has the model's dtype as before. Families whose layers in
vLLM add to the residual themselves, or have a norm of their own, keep the model's dtype.
"""

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.layernorm import RMSNorm

from rto_megatron.generation.vllm.worker.plugin import RtoWorkerExtension


@CustomOp.register_oot(name="RMSNorm")
class Fp32ResidualNorm(RMSNorm):
    """Adds in float32 and hands the sum on so; the normed sum is rounded once, to the dtype of the weight.

    Example:
        normed, residual = Fp32ResidualNorm(64, eps=1e-5)(hidden, residual)
    """

    def forward_native(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:  # of any shape [..., hidden size]
        """What the next matrix product reads, and, where there was a residual, the one behind this addition."""
        if residual is None:
            plain = super().forward_native(x)
            assert isinstance(plain, Tensor)
            return plain.to(self.weight.dtype)
        total = residual.float() + x.float()
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (normed * self.weight.float()).to(self.weight.dtype), total

    def forward_cuda(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The same; vLLM compiles it into the kernels around it."""
        return self.forward_native(x, residual)


class Fp32ResidualExtension(RtoWorkerExtension):
    """The extension of a server with `precision.fp32_parts: [residual]`; to import it registers the norm.

    Example:
        ["--worker-extension-cls", f"{Fp32ResidualExtension.__module__}.Fp32ResidualExtension"]
    """
