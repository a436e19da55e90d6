"""How logits come out of the output projection, and what a family does to them: a divisor, and a soft cap by tanh."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_megatron.models.shape import ModelShape


@dataclass(frozen=True)
class LogitShaping:
    """z -> softcap x tanh(z / divisor / softcap), or z / divisor without a cap.

    Example:
        LogitShaping(softcap=30.0).shaped(logits_Cv)
    """

    divisor: float = 1.0
    softcap: float | None = None
    is_fp32: bool = False  # the product is not rounded to the dtype of its factors

    @classmethod
    def of(cls, shape: ModelShape, is_fp32: bool = False) -> "LogitShaping":
        """That of a family's language models."""
        return cls(shape.logit_divisor, shape.logit_softcap, is_fp32)

    def logits(self, states_Ch: Tensor, weight_vh: Tensor) -> Tensor:
        """The model's logits [C, v] in float32, in memory of their own.

        Rounded to the model's dtype on the way, as a plain product is, unless they are to be float32.
        """
        if not self.is_fp32 or states_Ch.dtype == torch.float32:
            return self.shaped((states_Ch @ weight_vh.t()).float())
        if states_Ch.is_cuda:  # whose kernels add up in float32 and can leave it so
            return self.shaped(torch.mm(states_Ch, weight_vh.t(), out_dtype=torch.float32))
        return self.shaped(states_Ch.float() @ weight_vh.float().t())

    def shaped(self, logits_Cv: Tensor) -> Tensor:
        """In place: float32 logits of the projection -> those of the model."""
        if self.divisor != 1:
            logits_Cv.div_(self.divisor)
        if self.softcap is not None:
            logits_Cv.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_Cv

    def slope(self, shaped_Cv: Tensor) -> Tensor | None:
        """Of the cap at the logits that it gave: 1 - (z / softcap)^2, in memory of its own; None without a cap."""
        if self.softcap is None:
            return None
        return (shaped_Cv / self.softcap).square_().neg_().add_(1)

    def through(self, grad_Cv: Tensor, slope_Cv: Tensor | None) -> Tensor:
        """In place: the gradient of shaped logits -> that of the projection's."""
        if slope_Cv is not None:
            grad_Cv.mul_(slope_Cv)
        return grad_Cv if self.divisor == 1 else grad_Cv.div_(self.divisor)


UNSHAPED = LogitShaping()
