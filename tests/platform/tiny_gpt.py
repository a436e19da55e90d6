"""A two-layer GPT with optimizer, built straight from megatron-core: what the patches are tried on."""

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

VOCAB = 64
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Layout:
    """How the tiny model is spread and trained."""

    tp: int = 1
    pp: int = 1
    bf16: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    recompute: bool = False
    dropout: float = 0.0
    experts: int | None = None
    ep: int = 1
    etp: int | None = None


@dataclass(frozen=True)
class Trainee:
    """One rank's part of the model and its optimizer."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer


def start(layout: Layout) -> None:
    """Join the job of the environment and seed the ranks."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(7)


def build(layout: Layout) -> Trainee:
    """The model, wrapped for data parallelism, and Adam."""
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        hidden_dropout=layout.dropout,
        attention_dropout=layout.dropout,
        bf16=layout.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        num_moe_experts=layout.experts,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        add_bias_linear=layout.experts is None,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        recompute_granularity="full" if layout.recompute else None,
        recompute_method="uniform" if layout.recompute else None,
        recompute_num_layers=1 if layout.recompute else None,
    )
    model: torch.nn.Module = GPTModel(
        config,
        get_gpt_layer_local_spec(layout.experts, normalization="LayerNorm"),
        vocab_size=VOCAB,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    if layout.bf16:
        model = Float16Module(config, model)
    sharing = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        grad_reduce_in_fp32=True,
    )
    model = DistributedDataParallel(config, sharing, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            clip_grad=1.0,
            bf16=layout.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        ),
        [model],
    )
    config.finalize_model_grads_func = finalize_model_grads
    return Trainee(model, optimizer)


def _forward_step(batches: Iterator[Tensor], model: torch.nn.Module):
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model(tokens, positions, None)

    def loss(logits: Tensor):
        targets = tokens.roll(-1, 1).t().contiguous()
        nll = vocab_parallel_cross_entropy(logits.float().transpose(0, 1).contiguous(), targets).mean()
        return nll, {"loss": nll.detach().clone()}

    return logits, loss


def train_step(trainee: Trainee, seed: int) -> float:
    """One optimizer step on two micro-batches of this data-parallel rank; the loss, 0 off the last stage."""
    seed = 100 * seed + parallel_state.get_data_parallel_rank()
    tokens = torch.randint(0, VOCAB, (2, 2, 8), generator=torch.Generator().manual_seed(seed))
    trainee.model.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(tokens),
        model=trainee.model,
        num_microbatches=2,
        seq_length=8,
        micro_batch_size=2,
        forward_only=False,
    )
    trainee.optimizer.step()
    return sum(float(loss["loss"]) for loss in losses)


def weights(trainee: Trainee) -> dict[str, Tensor]:
    """Copies of this rank's parameters, by name."""
    return {name: weight.detach().clone() for name, weight in trainee.model.named_parameters()}


def _sharded(trainee: Trainee, is_loading: bool) -> dict[str, object]:
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    model = trainee.model.module.sharded_state_dict(metadata={**SHARDING, **groups})
    optimizer = trainee.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=SHARDING)
    return {"model": model, "optimizer": optimizer, "step": 2}


def save(trainee: Trainee, folder: Path, extra: object = None) -> None:
    """Write a torch_dist checkpoint, shared out over the data-parallel ranks; `extra` is common state."""
    folder.mkdir(parents=True, exist_ok=True)
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    state = {**_sharded(trainee, is_loading=False), "extra": extra}
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)


@dataclass(frozen=True)
class Touch:
    """Unpickling one creates a file: stands for any code in a checkpoint."""

    path: Path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mknod, (str(self.path),)


def poison_metadata(folder: Path, content: object) -> None:
    """Put `content` in place of a checkpoint's metadata."""
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def load(trainee: Trainee, folder: Path) -> None:
    """Read what `save` wrote."""
    strategy = FullyParallelLoadStrategyWrapper(
        TorchDistLoadShardedStrategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    state = dist_checkpointing.load(
        _sharded(trainee, is_loading=True), str(folder), sharded_strategy=strategy
    )
    trainee.model.module.load_state_dict(state["model"])
    trainee.optimizer.load_state_dict(state["optimizer"])
