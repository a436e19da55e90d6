"""A rank that holds no shard of a layout follows one of its replicas, and knows what that replica knows."""

from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks

from rto_megatron.config.training import ParallelConfig, RoleGridConfig
from rto_megatron.errors import RecipeError
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare


@dataclass(frozen=True)
class Known:
    """What one rank gets of a layout."""

    holds_shard: bool
    is_lead: bool
    world_size: int
    data_rank: int
    gathered: list[str]
    of_lead: str
    of_last_stage: str
    total: float
    outputs: list[float]
    rows: list[list[float]]


def _known(place: Topology) -> Known:
    own, number = f"rank {place.rank}", torch.tensor([float(place.rank)])
    given = [number] if place.holds_shard and place.is_last_stage else None
    (outputs,) = place.from_last_stage(given, [1])
    return Known(
        place.holds_shard,
        place.is_replica_lead,
        place.world_size,
        place.data_rank,
        place.gather(own, str),
        place.replica_value(own, str),
        place.last_stage_value(own, str),
        float(place.dp_sum(torch.tensor(10.0 * place.data_rank + 1))),
        outputs.tolist(),
        [row.tolist() for row in place.gather_tensors(torch.tensor([float(place.data_rank)]))],
    )


def _of_both(critic: RoleGridConfig, world_tensor: int) -> tuple[Known, Known]:
    policy = Topology.init(prepare(), ParallelConfig(tensor=world_tensor, roles={"critic": critic}), seed=1)
    return _known(policy), _known(policy.of("critic"))


def test_followers_know_what_their_replica_knows() -> None:
    found = run_ranks(4, _of_both, RoleGridConfig(pipeline=2, ranks="2-3"), 1)
    for rank, (policy, critic) in enumerate(found):
        replica = rank % 2  # of the policy, on ranks 0 and 1
        assert policy == Known(
            rank < 2, rank < 2, 4, replica, ["rank 0", "rank 1"], f"rank {replica}", f"rank {replica}",
            12.0, [float(replica)], [[0.0], [1.0]],
        )  # fmt: skip
        # The stages of a replica know different texts only here; outside the last one's is heard.
        gathered = ["rank 2"] if rank == 2 else ["rank 3"]
        assert critic == Known(rank > 1, rank == 2, 4, 0, gathered, "rank 2", "rank 3", 1.0, [3.0], [[0.0]])


def test_replicas_may_have_followers_or_none() -> None:
    found = run_ranks(3, _of_both, RoleGridConfig(ranks="2"), 1)
    assert [policy.of_lead for policy, _ in found] == ["rank 0", "rank 1", "rank 0"]
    assert [policy.gathered for policy, _ in found] == [["rank 0", "rank 1"]] * 3
    assert [critic.of_lead for _, critic in found] == ["rank 2"] * 3
    assert [critic.outputs for _, critic in found] == [[2.0]] * 3


def _refused() -> str:
    with pytest.raises(RecipeError) as raised:
        _of_both(RoleGridConfig(ranks="2"), 3)
    return str(raised.value)


def test_a_policy_that_its_ranks_do_not_hold_is_refused() -> None:
    for told in run_ranks(3, _refused):
        assert told.startswith(
            "2 of 3 ranks hold the model, but parallel.tensor x parallel.pipeline = 3 x 1 = 3;"
        )
