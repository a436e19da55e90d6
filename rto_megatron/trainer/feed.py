"""How prepared data become batches and go on after a resume: what is left out or not proved is said once."""

from collections.abc import Callable

from rto_megatron.data.batches import Batches, BatchesState
from rto_megatron.data.load_report import Loaded
from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.progress import say
from rto_megatron.types import Example


def feed[T: Example](
    loaded: Loaded[T],
    global_batch: int,
    seed: int,
    topology: Topology,
    cost: Callable[[T], float] | None = None,
) -> Batches[T]:
    """This replica's share of every global batch; says what no pass gets to.

    Args:
        cost: of an item, by which replicas share; None: as many items each.

    Raises:
        DataError: fewer items than one global batch, or the ranks do not divide it.
    """
    rank, size = topology.data_rank, topology.data_size
    batches = Batches(loaded.items, global_batch, seed, rank, size, cost, loaded.portions)
    if batches.num_left_over:
        say(
            f"{loaded.report.source}: {batches.num_left_over} of {batches.items_per_pass} stand behind the last full "
            f"batch of {global_batch} and are left out of a pass; the next pass shuffles, and leaves out others",
            topology.is_lead,
        )
    return batches


def go_on[T: Example](batches: Batches[T], state: BatchesState, key: str, topology: Topology) -> None:
    """Continues behind the samples that a checkpoint counts.

    Args:
        state: what `Batches.state` gave.
        key: of the data in the configuration.

    Raises:
        DataError: these are not the data of the checkpoint.
    """
    try:
        warning = batches.restore(state)
    except UserError as error:
        raise error.about(key) from error
    if warning is not None:
        say(f"warning: {key}: {warning}", topology.is_lead)
