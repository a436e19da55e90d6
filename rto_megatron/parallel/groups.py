"""Process groups of a layout, as one collection that Megatron's parts are given.

Megatron's global `parallel_state` stays uninitialised: what is not given its groups raises there, instead of taking
those of another layout without a word.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


def make_groups(
    ranks: Sequence[int],
    tensor: int,
    pipeline: int,
    timeout: timedelta,
    expert: int = 1,
    expert_tensor: int | None = None,
    context: int = 1,
) -> ProcessGroupCollection:
    """The groups of a TP x CP x PP x DP grid; every rank of the job must call it, for all layouts in one order.

    Ranks are numbered with the tensor rank fastest, then the context rank, then the data rank, then the stage, as
    Megatron numbers them.

    Args:
        ranks: global ranks of the grid, ascending; as many as a multiple of tensor x context x pipeline.
        timeout: of a collective.
        expert, expert_tensor: parts of the experts, and ranks of one; None: `tensor`. With the defaults experts are
            replicated over data and context ranks and split over tensor ranks.

    Returns:
        The groups that this rank is in; none where it is not of the grid.
    """
    # [stage, data, context, tensor rank]
    grid = torch.tensor(list(ranks)).view(pipeline, -1, context, tensor)
    pipelines = grid.permute(1, 2, 3, 0).reshape(-1, pipeline)
    groups = ProcessGroupCollection()
    alone = _own(grid.reshape(-1, 1), timeout)
    tp, dp = _own(grid.reshape(-1, tensor), timeout), _own(_along(grid, 1), timeout)
    # A group of the same ranks is the same group: all hold as many communicators as their layout has dimensions.
    cp = alone if context == 1 else _own(_along(grid, 2), timeout)
    tp_cp = tp if context == 1 else _own(grid.reshape(-1, context * tensor), timeout)
    dp_cp = dp if context == 1 else _own(_along(grid.flatten(1, 2), 1), timeout)
    mp = _own(grid.permute(1, 2, 0, 3).reshape(-1, pipeline * tensor), timeout)
    stage, whole = _own(grid.reshape(pipeline, -1), timeout), _own(grid.reshape(1, -1), timeout)
    groups.pp = _own(pipelines, timeout)
    groups.embd = _own(pipelines[:, [0, -1]] if pipeline > 1 else pipelines, timeout)
    groups.pos_embd = _own(pipelines[:, :1], timeout)
    groups.tp = groups.expt_tp = groups.tp_ep = tp
    groups.cp, groups.tp_cp = cp, tp_cp
    groups.mp = groups.tp_ep_pp = groups.tp_ep_pp_with_egtp_remat = mp
    groups.ep = groups.gtp_remat = groups.expt_gtp_remat = alone
    groups.dp, groups.dp_cp = dp, dp_cp
    groups.intra_dp_cp = groups.dp_cp_gtp_remat = dp_cp
    groups.expt_dp = groups.intra_expt_dp = groups.expt_dp_gtp_remat = dp_cp
    groups.tp_dp_cp, groups.intra_dist_opt = stage, whole
    if (expert, expert_tensor or tensor) != (1, tensor):
        _spread_experts(groups, grid.reshape(pipeline, -1), expert, expert_tensor or tensor, timeout)
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # scratch space of sequence parallelism, of no layout
        parallel_state._set_global_memory_buffer()
    return groups


def _along(grid: Tensor, dim: int) -> Tensor:
    """The rows of a dimension."""
    return grid.movedim(dim, -1).reshape(-1, grid.shape[dim])


def _spread_experts(
    groups: ProcessGroupCollection, stages: Tensor, expert: int, expert_tensor: int, timeout: timedelta
) -> None:
    """Sets the groups of experts: the ranks of a stage [stage, rank] are numbered with the shard of an expert fastest,
    then the part of the experts, then their replica."""
    pipeline = len(stages)
    grid = stages.view(pipeline, -1, expert, expert_tensor)  # [stage, replica, part, shard]
    groups.expt_tp = _own(grid.reshape(-1, expert_tensor), timeout)
    groups.ep = _own(grid.permute(0, 1, 3, 2).reshape(-1, expert), timeout)
    groups.tp_ep = _own(grid.reshape(-1, expert * expert_tensor), timeout)
    groups.tp_ep_pp = _own(grid.permute(1, 0, 2, 3).reshape(grid.shape[1], -1), timeout)
    groups.tp_ep_pp_with_egtp_remat = groups.tp_ep_pp
    replicas = _own(grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1]), timeout)
    groups.expt_dp = groups.intra_expt_dp = groups.expt_dp_gtp_remat = replicas


def _own(rows: Tensor, timeout: timedelta) -> dist.ProcessGroup | None:
    """Makes a group of every row; returns the one with this rank."""
    own = None
    for row in rows.tolist():
        group = dist.new_group(row, timeout=timeout)
        if dist.get_rank() in row:
            own = group
    return own
