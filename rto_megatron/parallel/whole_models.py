"""Ranks that were started against those that a layout takes: they hold whole models, or the run does not begin."""

from collections.abc import Sequence

from rto_megatron.config.training import GridConfig
from rto_megatron.errors import RecipeError


def require_whole_models(grid: GridConfig, ranks: Sequence[int], world: int, section: str) -> None:
    """Refuses ranks that hold no whole number of models.

    Args:
        ranks: of the layout, ascending.
        world: ranks of the job.
        section: the key of the layout.

    Raises:
        RecipeError: says how many to start.
    """
    if not ranks or len(ranks) % grid.replica_ranks:
        whose = (
            f"{world} ranks were started"
            if len(ranks) == world
            else f"{len(ranks)} of {world} ranks hold the model"
        )
        raise RecipeError(
            f"{whose}, but {grid.product(section)}; start a multiple of {grid.replica_ranks} ranks"
        )
    if ranks[-1] >= world:
        raise RecipeError(
            f"{section}.ranks names rank {ranks[-1]} of {world} ranks, 0 to {world - 1}; start more"
        )
    if len(ranks) % grid.whole_ranks:
        raise RecipeError(
            f"{len(ranks)} ranks hold the model, and with {section}.expert={grid.expert} parts of {grid.expert_cut} "
            f"ranks each its experts lie on {grid.whole_ranks}; start a multiple of {grid.whole_ranks} ranks"
        )
