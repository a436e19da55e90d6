"""What ranks that compute a model's outputs tell the others of their replica, and those that follow it."""

from collections.abc import Sequence

from torch import Tensor

from rto_megatron.parallel.dealing import at_home
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import Metrics, TokenBatch

SUMS = dict[str, tuple[float, float]]  # metrics, as ranks tell them each other


def rows_everywhere(
    outputs: list[Tensor] | None, batches: Sequence[TokenBatch], num_rows: int, topology: Topology
) -> list[Tensor]:
    """What a loss sees of each micro-batch, [T] or [num_rows, T] float32, on every rank of the replica.

    Args:
        outputs: flat, on the last stage; None elsewhere.
    """
    flat = topology.from_last_stage(outputs, [num_rows * batch.tokens_T.numel() for batch in batches])
    return [one if num_rows == 1 else one.view(num_rows, -1) for one in flat]


def add(first: Metrics, second: Metrics) -> dict[str, tuple[float, float]]:
    """Sums and counts of both, name by name."""
    total = dict(first)
    for name, (value, count) in second.items():
        old_value, old_count = total.get(name, (0.0, 0.0))
        total[name] = (old_value + value, old_count + count)
    return total


def everywhere(own: dict[str, tuple[float, float]], topology: Topology) -> Metrics:
    """What the last stage of a replica measured, on every rank as `at_home` has it; all ranks must call it."""
    return at_home(topology.last_stage_value(own, SUMS), topology)
