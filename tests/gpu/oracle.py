"""What Hugging Face says, in float32 on the CPU, one sequence at a time: the slow definition of our models."""

from collections.abc import Callable, Sequence

import torch
from gpu.roles import MEAN, STD, HfModel
from torch import Tensor

from rto_megatron.engine.megatron import Microbatch
from rto_megatron.types import LossOutput, TokenBatch


def sequence_outputs(model: HfModel, ids: Sequence[int]) -> Tensor:
    """Scaled values of every token [n], or log-probs of each next token [n - 1]."""
    tokens = torch.tensor([list(ids)])
    if model.is_scalar:
        return (model.module.score(model.module.model(tokens).last_hidden_state)[0, :, 0] - MEAN) / STD
    logprobs = model.module(tokens).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0]


def batch_outputs(model: HfModel, batch: TokenBatch) -> Tensor:
    """The same at the positions of a micro-batch [T], with gradient; zero where no token is predicted."""
    pieces = []
    for start, end, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.last_positions, strict=False):
        outputs = sequence_outputs(model, batch.tokens_T[start : last + 1].tolist())
        pieces += [outputs, outputs.new_zeros(end - start - len(outputs))]
    flat_T = torch.cat(pieces)
    return torch.cat([flat_T, flat_T.new_zeros(len(batch.tokens_T) - len(flat_T))])


def on_cpu[D](fields: D) -> D:
    """A copy of a dataclass of tensors whose tensors are on the CPU."""
    moved = {}
    for name, value in vars(fields).items():
        moved[name] = value.cpu() if isinstance(value, Tensor) else value
        if isinstance(value, TokenBatch):
            moved[name] = on_cpu(value)
    return type(fields)(**moved)


def gradients(
    model: HfModel, microbatches: Sequence[Microbatch], loss: Callable[[Tensor, Microbatch], LossOutput]
) -> dict[str, Tensor]:
    """Gradients of the summed loss by autograd, by name."""
    model.module.zero_grad()
    for microbatch in map(on_cpu, microbatches):
        loss(batch_outputs(model, microbatch.batch), microbatch).loss.backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters()}


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Name -> L2 error over the L2 norm of what is wanted."""
    assert got.keys() == want.keys()
    return {name: float((got[name].float() - want[name]).norm() / want[name].norm()) for name in want}


def total_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The error that `relative_errors` takes of each tensor, of all together."""
    assert got.keys() == want.keys()
    apart = torch.stack([(got[name].float() - want[name]).norm() for name in want]).norm()
    return float(apart / norm(want))


def norm(tensors: dict[str, Tensor]) -> float:
    """L2 norm of all tensors together."""
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())
