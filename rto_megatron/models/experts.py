"""A mixture of experts: all experts of a rank in two grouped products, and a router that is watched.

T  tokens that a rank routes | E  experts of a layer | N  tokens that a rank's experts get, by expert
"""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional


class GroupedExperts(SequentialMLP):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's experts, one parameter for each matrix of each, multiplied by torch's grouped product.

    The weights of a rank's experts are put side by side in every pass, which moves them once; the products themselves
    take what the loop over experts takes, in two calls instead of two for each expert.

    Example:
        output = experts.forward(tokens, tokens_per_expert, probs)[0]
    """

    def forward(
        self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [N, hidden size] in the order of their experts -> the same, each times its probability.

        Args:
            tokens_per_expert: int64 [experts of this rank], whose sum is N.
            probs: float32 [N].
        """
        if not hidden.shape[0]:  # no kernel takes an empty product, and gradients are wanted all the same
            none: tuple[Tensor, Tensor | None] = super().forward(hidden, tokens_per_expert, probs)
            return none
        ends = tokens_per_expert.cumsum(0).to(hidden.device, torch.int32)
        gate, up = self._product(hidden, "linear_fc1", ends).chunk(2, -1)
        inner = self.config.activation_func(gate) * up * probs.unsqueeze(-1)
        return self._product(inner.to(hidden.dtype), "linear_fc2", ends), None

    def _product(self, rows: Tensor, name: str, ends: Tensor) -> Tensor:
        weights = torch.stack([expert.get_submodule(name).weight for expert in self.local_experts])
        product: Tensor = functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
        return product


class WatchedRouter(TopKRouter):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's router, which counts in training what it does, and leaves padding out of the load-balancing loss.

    Example:
        router.reset()
        loads_E = router.tally[:-2]
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer)
        self.reset()

    def reset(self) -> None:
        """Starts counting anew."""
        # Of every expert the tokens that it got; nats of entropy over all tokens; tokens.
        self.tally = torch.zeros(self.num_experts + 2, dtype=torch.float64, device=self.weight.device)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [.., E] -> probabilities and choice, [T, E] each; see Megatron's router."""
        probs, is_chosen = super().routing(logits, padding_mask=padding_mask)
        # Once for a micro-batch, where layers are recomputed too.
        if self.training and torch.is_grad_enabled():
            self._watch(logits.detach().view(-1, self.num_experts), is_chosen, padding_mask)
        return probs, is_chosen

    def _watch(self, logits: Tensor, is_chosen: Tensor, padding_mask: Tensor | None) -> None:
        entropy_T = torch.distributions.Categorical(logits=logits.float()).entropy()
        is_real_T = torch.ones_like(entropy_T) if padding_mask is None else ~padding_mask.reshape(-1)
        weights_T = is_real_T.double()
        self.tally += torch.cat(
            [weights_T @ is_chosen.double(), (weights_T @ entropy_T.double())[None], weights_T.sum()[None]]
        )

    def _apply_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Megatron's, which divides by the tokens; a micro-batch that only fills up a count has none."""
        coeff = self.get_aux_loss_coeff("aux_loss")
        if coeff == 0:
            return probs
        group = self.tp_cp_group
        counts_E, own, total = get_tokens_per_expert_and_token_count(
            routing_map, group, self.topk, with_padding_mask
        )
        balance = switch_load_balancing_loss_func(
            scores_for_aux_loss,
            counts_E,
            total.clamp(min=1) if isinstance(total, Tensor) else total,
            self.topk,
            self.num_experts,
            coeff,
        )
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            probs, coeff, balance, "load_balancing_loss", group, valid_token_count=own
        )
        return attached


def with_grouped_experts(layer: ModuleSpec) -> ModuleSpec:
    """The layer with this package's experts and router, where it has Megatron's sequential ones; changed in place."""
    made = layer.submodules.mlp
    parts: MoESubmodules = made.keywords["submodules"]
    experts = partial(GroupedExperts, **parts.experts.keywords)
    own = MoESubmodules(experts=experts, shared_experts=parts.shared_experts, router=WatchedRouter)
    layer.submodules.mlp = partial(MoELayer, submodules=own)
    return layer


def routers(model: torch.nn.Module) -> Iterator[WatchedRouter]:
    """Those of this rank's layers; none of a dense model."""
    return (module for module in model.modules() if isinstance(module, WatchedRouter))


def forget_probabilities(model: torch.nn.Module) -> None:
    """Lets the layers of a mixture forget the probabilities of a micro-batch when they have computed it.

    megatron-core 0.19.2 keeps them in the dispatcher (token_dispatcher.py, `self.probs`), and with them their graph:
    where layers are recomputed the input of each and its gradient, until the layer is asked again.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_hook(_forget)


def _forget(layer: MoELayer, inputs: object, outputs: object) -> None:
    layer.token_dispatcher.probs = None


def tag_experts(model: torch.nn.Module) -> None:
    """Marks the experts' weights as Megatron does where they are spread over ranks, which gives them an optimizer of
    their own: checkpoints hold one structure then, however experts lie."""
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]  # megatron reads it there
