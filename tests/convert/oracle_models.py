"""What the tests against ModelOpt share."""

import torch
from megatron.core.models.gpt import GPTModel


@torch.no_grad()
def emptied(model: GPTModel) -> GPTModel:
    """The model with NaN in every parameter, so that one that nobody fills equals nothing."""
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    return model
