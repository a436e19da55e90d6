"""What the tests against ModelOpt share."""

import torch
import torch.distributed as dist
from engine.layouts import LAYOUTS, topology
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from rto_megatron.parallel.topology import Topology


def global_topology(layout: str) -> Topology:
    """This rank's place in a layout that Megatron's global state knows too, where ModelOpt looks for it."""
    _, tensor, pipeline, _ = LAYOUTS[layout]
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    return topology(layout)


@torch.no_grad()
def emptied(model: GPTModel) -> GPTModel:
    """The model with NaN in every parameter, so that one that nobody fills equals nothing."""
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    return model
