"""How far the outputs of two versions of a model are apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


@dataclass(frozen=True)
class LogitsError:
    """Differences over held-out tokens; for a reward model over its values, which have no distribution.

    Attributes:
        mean_kl_nats: mean over tokens of KL(base || other).
        top1_agreement: share of tokens whose most likely successor is the same.

    Example:
        LogitsError(num_outputs=4096, mean_abs=0.01, max_abs=0.2, mean_kl_nats=1e-4, top1_agreement=0.99)
    """

    num_outputs: int
    mean_abs: float
    max_abs: float
    mean_kl_nats: float | None
    top1_agreement: float | None


@torch.no_grad()
def outputs(model: PreTrainedModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Logits [tokens, vocabulary], or a reward model's values [tokens, 1], of each sequence, in float32 on the CPU."""
    return [_outputs(model, ids.to(model.device))[0].float().cpu() for ids in sequences]


def _outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    if isinstance(model, GenericForSequenceClassification):
        # Its own forward gives the last token alone; every token's value says more about the error.
        values: Tensor = model.score(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return values
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def compare(base: Sequence[Tensor], other: Sequence[Tensor]) -> LogitsError:
    """Sums over all sequences, divided once by the number of outputs."""
    num_outputs = num_logits = num_agreeing = 0
    total = largest = kl = 0.0
    for ours, theirs in zip(base, other, strict=True):
        difference = (ours - theirs).abs()
        total += float(difference.double().sum())
        # Not max(): it would drop a NaN.
        largest = float(torch.tensor([largest, float(difference.max())]).max())
        # In float64: a small divergence is what is left of terms that cancel.
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        num_agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        num_outputs += ours.shape[0]
        num_logits += ours.numel()
    is_distribution = base[0].shape[-1] > 1
    return LogitsError(
        num_outputs,
        total / num_logits,
        largest,
        kl / num_outputs if is_distribution else None,
        num_agreeing / num_outputs if is_distribution else None,
    )
