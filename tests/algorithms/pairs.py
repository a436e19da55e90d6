"""The golden preference pairs as the token log-probs and the micro-batch that a pairwise loss takes."""

from dataclasses import replace

import torch
from algorithms.grids import GARBAGE, GOLDEN, grid, ragged_batch, to_positions
from torch import Tensor

from rto_megatron.types import PairMicrobatch

INPUTS = GOLDEN["pairwise_inputs"]
LENGTHS = INPUTS["chosen_len"] + INPUTS["rejected_len"]
PROMPT_LENGTH = 2


def first_positions(micro: PairMicrobatch) -> list[int]:
    """Index into T of each answer's first response token."""
    return [start + PROMPT_LENGTH - 1 for start, _ in zip(micro.batch.cu_seqlens, LENGTHS, strict=False)]


def spread(
    sums_S: Tensor, lengths: list[int], packed: bool, padding: float = GARBAGE
) -> tuple[Tensor, PairMicrobatch]:
    """Each sum spread evenly over the response tokens of its sequence, with gradient; references are 0."""
    batch = ragged_batch(tuple(PROMPT_LENGTH + length for length in lengths), packed)
    tokens_S1 = (sums_S / grid(lengths)).unsqueeze(1)
    x_T = to_positions(tokens_S1.expand(-1, max(lengths)), batch, PROMPT_LENGTH, padding)
    mask_T = to_positions(torch.ones(len(lengths), max(lengths)).double(), batch, PROMPT_LENGTH, 0.0)
    num_pairs = len(lengths) // 2
    weight_P, zeros_P = grid([1 / num_pairs] * num_pairs), grid([0.0] * num_pairs)
    return x_T.requires_grad_(), PairMicrobatch(batch, mask_T, weight_P, zeros_P, torch.zeros_like(sums_S))


def golden_pairs(packed: bool, padding: float = GARBAGE) -> tuple[Tensor, PairMicrobatch]:
    """Log-probs [T] under the policy, with gradient, and three pairs with the reference's sums."""
    logp_S = grid(INPUTS["policy_chosen_logps"] + INPUTS["policy_rejected_logps"])
    logp_T, micro = spread(logp_S, LENGTHS, packed, padding)
    logp_ref_S = grid(INPUTS["reference_chosen_logps"] + INPUTS["reference_rejected_logps"])
    return logp_T, replace(micro, logp_ref_S=logp_ref_S)
