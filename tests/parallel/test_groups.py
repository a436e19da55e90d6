"""The groups of a layout are those that Megatron would make, without its global state."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from ranks import run_ranks

from rto_megatron.config.training import ParallelConfig
from rto_megatron.parallel.groups import make_groups
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare

# On eight ranks: tensor, pipeline, of experts the parts and the ranks of one, context.
LAYOUTS = [
    *(
        (tensor, pipeline, 1, None, 1)
        for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (8, 1))
    ),
    *(
        (1, 1, 2, None, 1),
        (1, 1, 8, None, 1),
        (2, 1, 2, 1, 1),
        (2, 2, 4, 1, 1),
        (2, 1, 2, 2, 1),
        (4, 1, 2, 1, 1),
    ),
    *((2, 2, 1, 1, 1), (1, 1, 1, None, 2), (2, 1, 1, None, 2), (2, 2, 1, None, 2), (1, 2, 1, None, 4)),
    (2, 1, 4, 1, 2),
]
Ranks = dict[str, list[int] | None]


def _ranks(groups: ProcessGroupCollection) -> Ranks:
    return {
        name: None if group is None else dist.get_process_group_ranks(group)
        for name, group in vars(groups).items()
        if not isinstance(group, list)
    }


def _both() -> list[tuple[Ranks, Ranks]]:
    """Ours and Megatron's of every layout; ours first, so that they cannot lean on the global state."""
    dist.init_process_group("gloo")
    limit = timedelta(minutes=1)
    own = [
        _ranks(make_groups(range(8), tensor, pipeline, limit, *experts))
        for tensor, pipeline, *experts in LAYOUTS
    ]
    parallel_state._GLOBAL_MEMORY_BUFFER = None
    found = []
    for layout, ours in zip(LAYOUTS, own, strict=True):
        tensor, pipeline, expert, expert_tensor, context = layout
        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )
        found.append((ours, _ranks(ProcessGroupCollection.use_mpu_process_groups())))
        parallel_state.destroy_model_parallel()
    return found


def test_groups_have_the_ranks_that_megatron_gives_them() -> None:
    for of_rank in run_ranks(8, _both):
        for layout, (ours, theirs) in zip(LAYOUTS, of_rank, strict=True):
            assert len(ours) > 20
            assert {name: theirs[name] for name in ours} == ours, layout


def _forgotten() -> str:
    Topology.init(prepare(), ParallelConfig(tensor=2), seed=1)
    assert not parallel_state.model_parallel_is_initialized()
    with pytest.raises(AssertionError) as raised:
        vocab_parallel_cross_entropy(torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64))
    return str(raised.value)


def test_a_group_that_was_forgotten_raises() -> None:
    for told in run_ranks(2, _forgotten):
        assert "not initialized" in told
