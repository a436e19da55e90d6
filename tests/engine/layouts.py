"""Ranks of a parallel layout for tests: each forked rank builds its topology and models here."""

from pathlib import Path

from rto_megatron.config.training import (
    ContextScheme,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    StageLayers,
    TrainParallelConfig,
)
from rto_megatron.engine.build_roles import build_frozen, build_trained
from rto_megatron.engine.megatron import FrozenModel, TrainedModel
from rto_megatron.engine.source import find_source
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare

# name -> (ranks, tensor, pipeline, sequence parallel)
LAYOUTS = {
    "one": (1, 1, 1, False),
    "tp2": (2, 2, 1, False),
    "tp4": (4, 4, 1, False),
    "pp2": (2, 1, 2, False),
    "dp2": (2, 1, 1, False),
    "tp2_sp": (2, 2, 1, True),
    "tp2_pp2": (4, 2, 2, False),
    "tp2_pp2_sp": (4, 2, 2, True),
    "cp2": (2, 1, 1, False),
    "cp2_gather": (2, 1, 1, False),
    "tp2_cp2_sp": (4, 2, 1, True),
    "tp2_cp2_gather_sp": (4, 2, 1, True),
    "cp2_pp2": (4, 1, 2, False),
    "cp2_dp2": (4, 1, 1, False),
    "cp4": (4, 1, 1, False),
    "cp4_gather": (4, 1, 1, False),
    "ep2": (2, 1, 1, False),
    "ep2_dp4": (4, 1, 1, False),
    "ep2_pp2": (4, 1, 2, False),
    "ep2_tp2": (2, 2, 1, True),
    "ep4_tp2": (4, 2, 1, True),
    "ep2_tp2_etp2": (4, 2, 1, True),
    "cp2_ep2": (2, 1, 1, False),
    "cp2_ep4": (4, 1, 1, False),
    "cp2_ep2_pp2": (4, 1, 2, False),
    "tp2_cp2_ep2_sp": (4, 2, 1, True),
    "tp2_cp2_ep4_sp": (4, 2, 1, True),
    "pp2_v2": (2, 1, 2, False),
    "tp2_pp2_v2_sp": (4, 2, 2, True),
    "cp2_pp2_v2": (4, 1, 2, False),
    "pp2_v2_dp2": (4, 1, 2, False),
    "ep2_pp2_v2": (4, 1, 2, False),
    "pp2_uneven": (2, 1, 2, False),
    "pp3_uneven": (3, 1, 3, False),
    # The policy has the ranks that no role has for itself.
    "tp2_of_4": (4, 2, 1, False),
    "pp2_of_3": (3, 1, 2, False),
    "dp2_of_3": (3, 1, 1, False),
    "ep2_of_3": (3, 1, 1, False),
}
# name -> (context ranks, scheme), of layouts that cut rows
CONTEXT: dict[str, tuple[int, ContextScheme]] = {
    "cp2": (2, "ulysses"),
    "cp2_gather": (2, "gather"),
    "tp2_cp2_sp": (2, "ulysses"),
    "tp2_cp2_gather_sp": (2, "gather"),
    "cp2_pp2": (2, "ulysses"),
    "cp2_dp2": (2, "ulysses"),
    "cp4": (4, "ulysses"),
    "cp4_gather": (4, "gather"),
    "cp2_ep2": (2, "ulysses"),
    "cp2_ep4": (2, "ulysses"),
    "cp2_ep2_pp2": (2, "gather"),
    "tp2_cp2_ep2_sp": (2, "ulysses"),
    "tp2_cp2_ep4_sp": (2, "ulysses"),
    "cp2_pp2_v2": (2, "ulysses"),
}
# Of those whose experts lie on different ranks: (parts of the experts, ranks of one)
EXPERTS = {
    "ep2": (2, 1),
    "ep2_dp4": (2, 1),
    "ep2_pp2": (2, None),
    "ep2_tp2": (2, 1),
    "ep4_tp2": (4, 1),
    "ep2_tp2_etp2": (2, 2),
    "cp2_ep2": (2, 1),
    "cp2_ep4": (4, 1),
    "cp2_ep2_pp2": (2, None),
    "tp2_cp2_ep2_sp": (2, 1),
    "tp2_cp2_ep4_sp": (4, 1),
    "ep2_pp2_v2": (2, None),
    "ep2_of_3": (2, 1),
}
# name -> (chunks of each stage, layers of the stages), of layouts whose stages are interleaved or uneven
CHUNKS: dict[str, tuple[int, StageLayers]] = {
    "pp2_v2": (2, None),
    "tp2_pp2_v2_sp": (2, None),
    "cp2_pp2_v2": (2, None),
    "pp2_v2_dp2": (2, None),
    "ep2_pp2_v2": (2, None),
    "pp2_uneven": (1, (3, 1)),
    "pp3_uneven": (1, "auto"),
}


def topology(layout: str) -> Topology:
    """This rank's place in a layout."""
    _, tensor, pipeline, sequence = LAYOUTS[layout]
    context, scheme = CONTEXT.get(layout, (1, "ulysses"))
    expert, expert_tensor = EXPERTS.get(layout, (1, None))
    virtual, stages = CHUNKS.get(layout, (1, None))
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        sequence=sequence,
        expert=expert,
        expert_tensor=expert_tensor,
        context=context,
        context_scheme=scheme,
        virtual=virtual,
        stages=stages,
    )
    return Topology.init(prepare(), parallel, seed=1)


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
    recompute: bool = False,
) -> TrainedModel:
    """A trained model from a folder."""
    source = find_source(folder, is_scalar, is_random=False, key="test")
    name = "critic" if is_scalar else "policy"
    precision = PrecisionConfig(dtype=dtype, recompute=recompute)
    parallel = TrainParallelConfig(
        distributed_optimizer=is_distributed_optimizer, overlap_grad_reduce=is_overlapped
    )
    return build_trained(name, source, is_scalar, precision, optimizer, place, 1, parallel)
