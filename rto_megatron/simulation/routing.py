"""A mixture's tokens shared out evenly: which expert a token gets is a number, and a simulated router has none."""

import torch
from torch import Tensor

from rto_megatron.models.experts import WatchedRouter


def share_out_evenly(router: WatchedRouter) -> None:
    """Lets a router choose experts in turn: every expert gets as many tokens as another, up to one."""
    router.register_forward_hook(_in_turn)


def _in_turn(
    router: torch.nn.Module, inputs: tuple[object, ...], chosen: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The router's probabilities, and whole flags [T, E] in the place of its choice."""
    assert isinstance(router, WatchedRouter)
    probs, is_chosen = chosen
    num_tokens, num_experts = is_chosen.shape
    places = torch.arange(num_tokens * router.topk) % num_experts
    is_in_turn = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    is_in_turn[torch.arange(num_tokens).repeat_interleave(router.topk), places] = True
    return probs, is_in_turn
