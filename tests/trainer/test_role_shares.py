"""One forward that is read for two distributions says of each what a forward of its own says, on every layout."""

from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import frozen, topology
from ranks import run_ranks
from tiny_models import write_llama
from torch import Tensor

from rto_megatron.config.training import ParallelConfig
from rto_megatron.data.cut import Layout
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare
from rto_megatron.trainer.role_shares import RoleShares
from rto_megatron.types import WHOLE, Ban, Distribution

DRAWN = Distribution(0.7, Ban((2, 95), 5))
OWN_LAYOUT = ParallelConfig.model_validate(
    {"roles": {"reference": {"tensor": 2}}}
)  # the policy has two replicas


def _place(layout: str) -> Topology:
    if layout == "own":
        return Topology.init(prepare(), OWN_LAYOUT, seed=1)
    return topology(layout)


def _read(layout: str, folder: Path) -> tuple[list[list[Tensor]], list[list[Tensor]], list[float]]:
    """Log-probs of both distributions by forwards of their own and by one, and the FLOPs of each way."""
    policy = _place(layout)
    place = policy.of("reference")
    model = frozen(place, folder, False)
    own = rollouts(8)[policy.data_rank :: policy.data_size]
    cut = Layout(3, True, policy.row_multiple, torch.device("cpu"))
    found, work = [], []
    for is_one in (False, True):
        policy.work.take()
        shares = RoleShares(own, cut, [place])
        if is_one:
            shares.begin_both(model, DRAWN)
        told = [shares.begin(model, drawn) for drawn in (DRAWN, WHOLE)]
        found.append([tell() for tell in told])
        work.append(policy.work.take())
    shares.begin_both(model, WHOLE)  # no second distribution, so no second forward
    assert shares.begin(model, WHOLE) is told[1] and policy.work.take() == 0
    return found[0], found[1], work


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "own"])
def test_one_forward_is_read_for_both_distributions(layout: str, tmp_path: Path) -> None:
    write_llama(tmp_path)
    for apart, together, (of_two, of_one) in run_ranks(2, _read, layout, tmp_path):
        for want, got in zip(apart, together, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))
        drawn, whole = (torch.cat(one) for one in together)
        assert (drawn - whole).abs().max() > 0.01
        assert of_one == of_two / 2
