"""What a family does to logits behind the output projection: a divisor, and a soft cap by tanh."""

from dataclasses import dataclass

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

    @classmethod
    def of(cls, shape: ModelShape) -> "LogitShaping":
        """That of a family's language models."""
        return cls(shape.logit_divisor, shape.logit_softcap)

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
