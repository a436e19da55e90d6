"""Ranks of a parallel layout for tests: each forked rank builds its topology and models here."""

from pathlib import Path

from rto_megatron.config.training import OptimizerConfig, PrecisionConfig, TrainParallelConfig
from rto_megatron.engine.build_roles import build_frozen, build_trained
from rto_megatron.engine.megatron import FrozenModel, TrainedModel
from rto_megatron.engine.source import find_source
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare

# name -> (ranks, tensor, pipeline, sequence parallel)
LAYOUTS = {
    "one": (1, 1, 1, False),
    "tp2": (2, 2, 1, False),
    "pp2": (2, 1, 2, False),
    "dp2": (2, 1, 1, False),
    "tp2_sp": (2, 2, 1, True),
    "tp2_pp2": (4, 2, 2, False),
    "tp2_pp2_sp": (4, 2, 2, True),
    # The policy has the ranks that no role has for itself.
    "tp2_of_4": (4, 2, 1, False),
    "pp2_of_3": (3, 1, 2, False),
    "dp2_of_3": (3, 1, 1, False),
}


def topology(layout: str) -> Topology:
    """This rank's place in a layout."""
    _, tensor, pipeline, sequence = LAYOUTS[layout]
    return Topology.init(prepare(), tensor, pipeline, sequence, seed=1)


def frozen(place: Topology, folder: Path, is_scalar: bool, dtype: str = "fp32") -> FrozenModel:
    """A frozen model from a folder."""
    source = find_source(folder, is_scalar, is_random=False, key="test")
    return build_frozen(
        "reward" if is_scalar else "reference", source, is_scalar, PrecisionConfig(dtype=dtype), place
    )


def trained(
    place: Topology,
    folder: Path,
    is_scalar: bool,
    optimizer: OptimizerConfig,
    dtype: str = "fp32",
    is_distributed_optimizer: bool = False,
    is_overlapped: bool = False,
) -> TrainedModel:
    """A trained model from a folder."""
    source = find_source(folder, is_scalar, is_random=False, key="test")
    name = "critic" if is_scalar else "policy"
    precision = PrecisionConfig(dtype=dtype)
    parallel = TrainParallelConfig(
        distributed_optimizer=is_distributed_optimizer, overlap_grad_reduce=is_overlapped
    )
    return build_trained(name, source, is_scalar, precision, optimizer, place, 1, parallel)
