"""The scalar head of critics and reward models, in the place of the vocabulary projection."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional


class ScalarHead(MegatronModule):
    """One number per token, replicated over tensor ranks. hidden [s, b, h] -> [s, b, 1].

    With sequence parallelism every tensor rank sees its own part of the tokens: the weight is tagged so that its
    gradient is summed over tensor ranks, and the gathered output's gradient is cut, not summed, because each rank
    computes the same loss.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Called by GPTModel with the signature of its output layer."""
        values = functional.linear(hidden, self.weight).float()
        if self.config.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
