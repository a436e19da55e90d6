"""The optimizer of a trained role: Megatron's, with our learning-rate schedule."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from torch import Tensor

from rto_megatron.config import training
from rto_megatron.models.chunks import ModelChunks
from rto_megatron.models.experts import tag_experts
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.torch_adam import prime_adam_state


def wrap_for_training(
    model: ModelChunks, parallel: training.TrainParallelConfig, topology: Topology
) -> list[DistributedDataParallel]:
    """Adds gradient buffers and the reduction over data-parallel ranks to every chunk; both are in float32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
    )
    tag_experts(model)
    wrapped = [
        # The reductions of chunks behind the first are hidden by the backwards of those before them.
        DistributedDataParallel(
            model.config, config, chunk, disable_bucketing=number > 0, pg_collection=topology.groups
        )
        for number, chunk in enumerate(model.chunks)
    ]
    if parallel.overlap_grad_reduce:
        # A bucket goes off once it holds its gradients, which are whole in the backward of the last micro-batch alone.
        model.config.no_sync_func = one_or_all([one.no_sync for one in wrapped])
    return wrapped


def one_or_all[T](of_chunks: Sequence[T]) -> T | list[T]:
    """What Megatron's schedules want of the chunks of a rank: a list where the pipeline is interleaved."""
    return of_chunks[0] if len(of_chunks) == 1 else list(of_chunks)


def build_optimizer(
    model: Sequence[DistributedDataParallel],
    config: training.OptimizerConfig,
    parallel: training.TrainParallelConfig,
    topology: Topology,
) -> MegatronOptimizer:
    """Adam or plain SGD over the wrapped model, its state allocated so that a checkpoint can be loaded.

    Norms and biases do not decay. Source: OpenRLHF 0.4.4, utils/deepspeed/deepspeed_utils.py.
    """
    dtype = model[0].config.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=config.kind,
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            sgd_momentum=0.0,
            clip_grad=config.max_grad_norm or 0.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        list(model),
        pg_collection=topology.groups,
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:  # what Megatron's scheduler of rates does, which is not used
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    if config.kind == "adam":
        prime_adam_state(optimizer)
        step_at_once(optimizer)
    else:
        _keep_no_state(optimizer)
    return optimizer


def step_at_once(optimizer: MegatronOptimizer) -> None:
    """Lets Adam step in torch's one kernel, which CPUs have as well as GPUs.

    Call it after a load too: a checkpoint may have been written on another device, or without the kernel.
    """
    for one in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        inner = one.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            group["fused"] = True
            for parameter in group["params"]:  # the kernel wants its counter beside it
                inner.state[parameter]["step"] = inner.state[parameter]["step"].to(parameter.device)


def meet_builders() -> None:
    """Takes part in what `build_optimizer` does on the ranks of a model, on all other ranks of the job.

    megatron-core 0.19.2 agrees on parameter groups among all ranks (`_get_param_groups`), for weights and for experts.
    """
    world = dist.get_world_size()
    for _ in ("weights", "experts"):
        dist.all_gather_object([None] * world, [])


def _keep_no_state(optimizer: MegatronOptimizer) -> None:
    # megatron-core 0.19.2 has no initialiser for SGD's state, of which there is none, and calls it in every load.
    for one in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        one.init_state_fn = lambda sgd, config: None


def state_tensors(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Masters, which may be the weights themselves, and moments; counters, which have no dimension, are left out."""
    found: list[Tensor] = []
    for one in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        inner = one.optimizer
        found += [parameter for group in inner.param_groups for parameter in group["params"]]
        found += [
            t for kept in inner.state.values() for t in kept.values() if isinstance(t, Tensor) and t.dim()
        ]
    return found


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
