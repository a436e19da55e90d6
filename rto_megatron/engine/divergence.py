"""What TDPO reads of two models: log-probs and the KL of whole distributions, the reference's from its hidden states.

Logits of the reference are made chunk by chunk inside the policy's pass, as the policy's are, so that they never exist
as a whole; what is kept between the two passes are its final states, one vector a response token.
"""

from collections.abc import Sequence

import torch

from rto_megatron.data.cut import Layout
from rto_megatron.data.packing import pair_microbatches
from rto_megatron.engine.megatron import FrozenModel
from rto_megatron.engine.readings import Reading, read_divergences
from rto_megatron.types import DivergenceMicrobatch, PreferencePair


def divergence_microbatches(
    pairs: Sequence[PreferencePair], num_pairs: int, reference: FrozenModel, layout: Layout
) -> list[DivergenceMicrobatch]:
    """Micro-batches of a preference step that hold the reference's final states.

    Args:
        pairs: this rank's share of the global batch.
        num_pairs: pairs of the global batch, all ranks.
        layout: micro-batch size in pairs, and packing.
    """
    if not pairs:
        return []
    plain = pair_microbatches(pairs, torch.zeros(len(pairs), 2, device=layout.device), num_pairs, layout)
    states = reference.hidden_states([micro.batch for micro in plain])
    return [
        DivergenceMicrobatch(m.batch, m.mask_T, m.weight_P, m.margin_P, m.logp_ref_S, hidden_NH)
        for m, hidden_NH in zip(plain, states, strict=True)
    ]


def divergence_from(reference: FrozenModel) -> Reading[DivergenceMicrobatch]:
    """Rows: log-prob of the target, the reference's, KL(reference || policy), [3, T] in nats."""
    return Reading(3, lambda model, micro, raw: read_divergences(model, micro, raw, reference))
