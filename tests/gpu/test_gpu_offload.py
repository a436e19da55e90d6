"""On one GPU: what waits in host memory is not on the device, its copies are pinned, and no update changes by it."""

import pytest
import torch
from gpu.roles import HfModel, Prepared, task, trained
from stepping import take_step

from rto_megatron.data.cut import Layout
from rto_megatron.engine.megatron import Model
from rto_megatron.engine.offload import host_memory
from rto_megatron.engine.presence import ParkedError
from rto_megatron.parallel.topology import Topology

pytestmark = pytest.mark.gpu
NAMES = ("policy", "gradients", "optimizer")


def _allocated(place: Topology) -> int:
    device = place.device.torch_device
    return torch.cuda.memory_allocated(device) if place.device.is_cuda else 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_devices_memory_is_free_and_an_update_is_bit_equal(
    dtype: str,
    prepared: Prepared,
    place: Topology,
    layout: Layout,
    models: dict[str, HfModel],
    is_deterministic: None,
) -> None:
    step = task("sft", prepared, place, layout)
    here, away = (trained(place, models["policy"], dtype=dtype) for _ in range(2))
    named: dict[str, Model] = {"policy": away}
    memory = host_memory(NAMES, named, print)
    for _ in range(3):
        take_step(here, step.microbatches, step.loss, step.names, 1e-3)
        memory.enter("update")
        take_step(away, step.microbatches, step.loss, step.names, 1e-3)
        before = _allocated(place)
        memory.enter("sample")
        freed = before - _allocated(place)
        parked = sum(part.num_bytes for part in memory._parts.values())
        print(f"{dtype}: {freed} bytes of the device freed, {parked} parked")
        copies = [piece for part in memory._parts.values() for pieces in part._copies for piece in pieces]
        assert parked > 0 and copies
        assert not place.device.is_cuda or (freed >= parked and all(copy.is_pinned() for copy in copies))
        with pytest.raises(ParkedError):
            away.token_outputs([micro.batch for micro in step.microbatches])
    memory.enter("update")
    pairs = zip(here.module.parameters(), away.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
