"""How a mixture's router does in training: who gets the tokens, how sure it is, how far from balance."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from rto_megatron.models.chunks import ModelChunks
from rto_megatron.models.experts import routers
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology


@contextmanager
def watched_routers(module: ModelChunks, num_microbatches: int, num_passes: int) -> Iterator[None]:
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


def own_report(module: ModelChunks, shape: ModelShape, num_microbatches: int) -> Tensor:
    """What `watched_routers` counted on this rank, with the load-balancing loss of its micro-batches before its weight.

    Returns:
        float64 [layers, E + 3]: `WatchedRouter.tally`, then the loss, summed over the ranks of a replica; on the host.
    """
    report = no_report(shape)
    if shape.experts is None:
        return report
    for router in routers(module):
        report[router.layer_number - 1, :-1] = router.tally.cpu()
    recorded = get_moe_metrics_tracker().metrics.get("load_balancing_loss")
    if recorded is not None and num_microbatches:
        # Each rank holds its layers' and, under sequence parallelism, its tokens' part, and as Megatron's schedule does
        # each replica takes the mean of its own micro-batches, of which others may have more or fewer.
        report[:, -1] = recorded.values.cpu().double() / num_microbatches
    return report


def no_report(shape: ModelShape) -> Tensor:
    """That of a rank which holds nothing of the model; empty for a dense one."""
    width = 0 if shape.experts is None else shape.experts.num + 3
    return torch.zeros(shape.num_layers, width, dtype=torch.float64)


def router_metrics(
    name: str, shape: ModelShape, own: Tensor, is_balanced: bool, topology: Topology
) -> dict[str, tuple[float, float]]:
    """How the routers of a model did on all replicas; nothing of a dense one. All ranks must call it.

    Args:
        own: what `own_report` gave on this rank.
        is_balanced: whether it is trained with a load-balancing loss.
    """
    if shape.experts is None:
        return {}
    report = topology.all_sum(own.to(topology.device.torch_device)).cpu()
    health = health_of(report[list(shape.experts.layers), :-1], shape.experts.per_token)
    metrics = {f"router/{name}_{key}": (value, 1.0) for key, value in health.items()}
    if is_balanced:
        balance = float(report[:, -1].sum()) / (shape.num_layers * topology.data_size)
        metrics[f"loss/{name}_moe_aux"] = (balance, 1.0)
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
