"""How a mixture's router does in training: who gets the tokens, how sure it is, how far from balance."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from rto_megatron.models.experts import routers, tallies
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import Metrics


@contextmanager
def watched_routers(module: GPTModel, num_microbatches: int, num_passes: int) -> Iterator[None]:
    """Counts anew what routers do in a model's passes; the load-balancing loss is a mean over the micro-batches alone.

    Args:
        num_passes: the micro-batches, and those of padding that fill up their number.
    """
    get_moe_metrics_tracker().clear()  # one for all models of the process
    for router in routers(module):
        router.reset()
    config, weight = module.config, module.config.moe_aux_loss_coeff
    # The schedule divides by the number of passes.
    config.moe_aux_loss_coeff = weight * num_passes / max(num_microbatches, 1)
    try:
        yield
    finally:
        config.moe_aux_loss_coeff = weight


def router_metrics(
    module: GPTModel, name: str, shape: ModelShape, topology: Topology, num_microbatches: int
) -> Metrics:
    """What `watched_routers` counted, over all replicas; nothing of a dense model. All ranks must call it.

    Args:
        num_microbatches: of this replica.
    """
    if shape.experts is None:
        return {}
    counts = topology.all_sum(tallies(module, shape.num_layers, topology.device.torch_device))
    health = health_of(counts[list(shape.experts.layers)], shape.experts.per_token)
    metrics = {f"router/{name}_{key}": (value, 1.0) for key, value in health.items()}
    if module.config.moe_aux_loss_coeff:
        metrics[f"loss/{name}_moe_aux"] = (_balance(num_microbatches, shape, topology), 1.0)
    return metrics


def health_of(counts: Tensor, per_token: int) -> dict[str, float]:
    """Of counts of all tokens, float64 [L, E + 2] for the L layers with experts, see `WatchedRouter.tally`.

    Args:
        per_token: experts of a token.

    Returns:
        load/NUMBER: what an expert gets, over what it would get if all got as much, mean over layers; load_max and
        load_min: of the busiest and of the idlest expert of a layer, mean over layers; load_entropy: of the loads of
        a layer over that of equal ones, 1 at balance, 0 where one gets all; entropy: of a token's distribution over
        experts, nats, mean over tokens and layers; idle_fraction: experts without a token.
    """
    loads, nats, tokens = counts[:, :-2], counts[:, -2], counts[:, -1].clamp(min=1)
    shares = loads / (tokens * per_token)[:, None]
    relative = shares * loads.shape[1]
    evenness = torch.special.entr(shares).sum(1) / torch.tensor(float(loads.shape[1])).log()
    return {
        **{f"load/{number:03d}": float(one) for number, one in enumerate(relative.mean(0))},
        "load_max": float(relative.max(1).values.mean()),
        "load_min": float(relative.min(1).values.mean()),
        "load_entropy": float(evenness.mean()),
        "idle_fraction": float((loads == 0).double().mean()),
        "entropy": float((nats / tokens).mean()),
    }


def _balance(num_microbatches: int, shape: ModelShape, topology: Topology) -> float:
    """The load-balancing loss before its weight, mean over layers and micro-batches."""
    # Each rank holds its layers' and, under sequence parallelism, its tokens' part, and as Megatron's schedule does
    # each replica takes the mean of its own micro-batches, of which others may have more or fewer.
    recorded = get_moe_metrics_tracker().metrics.get("load_balancing_loss")
    own = torch.zeros((), device=topology.device.torch_device)  # of a stage whose layers are dense
    if recorded is not None and num_microbatches:
        own = recorded.values.sum() / num_microbatches
    return float(topology.all_sum(own)) / (shape.num_layers * topology.data_size)
