"""Megatron-LM's own world for tests: its command line, its model builder, its checkpoint code, and none of ours.

Everything here runs in the ranks of `run_ranks`. Importing megatron.training takes 12 s, most of it for packages that
it imports in turn.
"""

import argparse
import contextlib
import io
import logging
import sys
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import initialize_rerun_state_machine
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    model_parallel_cuda_manual_seed,
)
from megatron.training import arguments, checkpointing, global_vars
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor, distributed, nn

_DECODER = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 256 --max-position-embeddings 256 --swiglu --normalization RMSNorm "
    "--norm-epsilon 1e-6 --position-embedding-type rope --no-position-embedding --rotary-base 5000 "
    "--disable-bias-linear"
)
_UNTIED = f"{_DECODER} --untie-embeddings-and-output-weights"
_EXPERTS = "--num-experts 4 --moe-router-topk 2"
_QWEN2_MOE = (
    f"{_UNTIED} --add-qkv-bias {_EXPERTS} --moe-ffn-hidden-size 48 "
    "--moe-shared-expert-intermediate-size 80 --moe-shared-expert-gate"
)
_QWEN3 = f"{_UNTIED} --qk-layernorm --kv-channels 32"

# The variants of tiny_families as a user of Megatron-LM would type them.
FLAGS = {
    "llama": _UNTIED,
    "llama3_tied": f"{_DECODER} --use-rope-scaling --rope-scaling-factor 32",
    "qwen2": f"{_UNTIED} --add-qkv-bias",
    "qwen2_tied": f"{_DECODER} --add-qkv-bias",
    "qwen3": _QWEN3,
    "mixtral": f"{_UNTIED} --kv-channels 32 {_EXPERTS}",
    "qwen2_moe": f"{_QWEN2_MOE} --moe-router-pre-softmax",
    "qwen2_moe_normalized": _QWEN2_MOE,
    "qwen3_moe": f"{_QWEN3} {_EXPERTS} --moe-ffn-hidden-size 48",
    "qwen3_moe_mixed": f"{_QWEN3} {_EXPERTS} --moe-ffn-hidden-size 48 --moe-router-pre-softmax "
    "--moe-layer-freq [0,1,0,1]",
}
# Nothing of the model: a machine without CUDA, and numbers that the parser insists on.
_RUN = (
    "--transformer-impl local --use-cpu-initialization --no-persist-layer-norm --no-masked-softmax-fusion "
    "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1 --micro-batch-size 1 --lr 1e-3 --train-iters 10 "
    "--tokenizer-type NullTokenizer"
)


@dataclass(frozen=True)
class Layout:
    """Sizes of Megatron's parallel groups, on as few ranks as can hold them."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.expert

    @property
    def flags(self) -> str:
        return (
            f"--tensor-model-parallel-size {self.tensor} --pipeline-model-parallel-size {self.pipeline} "
            f"--expert-model-parallel-size {self.expert}"
        )


LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "tp2_pp2": Layout(tensor=2, pipeline=2),
    "ep2": Layout(expert=2),
}


def start(layout: Layout) -> None:
    """Joins this rank to the job that the environment describes."""
    logging.disable(logging.WARNING)  # Megatron lists every parameter
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, expert_model_parallel_size=layout.expert
    )
    model_parallel_cuda_manual_seed(7)
    initialize_rerun_state_machine()


def parsed(flags: str, layout: Layout) -> argparse.Namespace:
    """The arguments that pretrain_gpt.py would read from a command line."""
    sys.argv = ["pretrain_gpt.py", *f"{_RUN} {layout.flags} {flags}".split()]
    return arguments.parse_args()


def validated(args: argparse.Namespace) -> argparse.Namespace:
    """Completes arguments as Megatron-LM does, and makes them those of this process."""
    arguments.get_device_arch_version = lambda: 10  # it would ask a GPU
    with contextlib.redirect_stdout(io.StringIO()):
        arguments.validate_args(args, {})
        global_vars.unset_global_variables()
        global_vars.set_global_variables(args)
    return args


def build(args: argparse.Namespace) -> GPTModel:
    """This rank's part of the model that pretrain_gpt.py would train."""
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor  # 0.19.2 parses the flag and drops it
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return model.to(args.params_dtype)


class _TeNorm(nn.RMSNorm):
    """TransformerEngine's norm as checkpoints see it."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


def name_as_transformer_engine(model: GPTModel) -> None:
    """Gives a local model the checkpoint entries of TransformerEngine's layers, which most of Megatron-LM's users run.

    Norms that TransformerEngine does not fuse into a linear layer have an extra state. The norm in front of experts is
    one of them, which the local layers of 0.19.2 name as if it were fused.
    """
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.submodules_config.sharded_state_dict_keys_map = {
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
            }
            layer.pre_mlp_layernorm.__class__ = _TeNorm
        for name, norm in layer.self_attention.named_children():
            if name.endswith("layernorm"):
                norm.__class__ = _TeNorm
    if model.post_process:
        model.decoder.final_layernorm.__class__ = _TeNorm


class OneRow(nn.Linear):
    """The head that critics and reward models on Megatron have: one number a token, the same on all tensor ranks."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor, weight: object = None, runtime_gather_output: object = None):
        return super().forward(hidden), None


def make_scalar(model: GPTModel) -> None:
    """Replaces the head on the last stage."""
    if model.post_process:
        model.output_layer = OneRow(model.config.hidden_size)


def randomise(model: nn.Module) -> None:
    """Norms that are not 1, biases that are not 0, and the same numbers on ranks that hold the same parameter."""
    tensor_rank, expert_rank = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_expert = "local_experts" in name
            is_sharded = getattr(parameter, "tensor_model_parallel", False) or is_expert
            place = (tensor_rank if is_sharded else 0, expert_rank if is_expert else 0)
            seed = zlib.crc32(f"{name} {place}".encode())
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif not is_sharded:
                parameter.copy_(0.1 * noise)


def fill_with_nan(model: nn.Module) -> None:
    """So that a parameter that nobody loads is seen."""
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))


@torch.no_grad()
def outputs(model: GPTModel, tokens_BS: Tensor) -> Tensor | None:
    """Logits [B, S, padded vocabulary] or values [B, S, 1] on the ranks of the last stage; None on others."""
    model.eval()
    hidden_size = model.config.hidden_size
    if not model.pre_process:
        hidden = torch.empty(tokens_BS.shape[1], tokens_BS.shape[0], hidden_size)
        distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    out = model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)
    if not model.post_process:
        distributed.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return out if out.shape[-1] == 1 else gather_from_tensor_model_parallel_region(out)


def load_pretrained(model: GPTModel, folder: Path) -> int:
    """Megatron-LM's own loading of `args.load`; returns the iteration at which training would begin."""
    args = global_vars.get_args()
    args.load = str(folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        iteration, _ = checkpointing.load_checkpoint([model], None, None)
    # What does not fit is printed and left out.
    assert "load_return" not in said.getvalue(), said.getvalue()
    return int(iteration)


def train_and_save(model: GPTModel, folder: Path, iteration: int) -> None:
    """One step of Adam on random gradients, and Megatron-LM's own checkpoint of everything."""
    args = global_vars.get_args()
    args.save = str(folder)
    is_sharded = args.use_distributed_optimizer
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=is_sharded), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=0.0, bf16=args.bf16, params_dtype=args.params_dtype,
            use_distributed_optimizer=is_sharded,
        ),
        [wrapped],
    )  # fmt: skip
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=10, lr_decay_style="linear",
        start_wd=0.0, end_wd=0.0, wd_incr_steps=0, wd_incr_style="constant",
    )  # fmt: skip
    wrapped.zero_grad_buffer()
    for parameter in model.parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer.step()
    with contextlib.redirect_stdout(io.StringIO()):
        checkpointing.save_checkpoint(iteration, [wrapped], optimizer, scheduler, 0)


def save_with_own_keys(model: GPTModel, args: argparse.Namespace, folder: Path) -> None:
    """A checkpoint in which every layer and every expert has entries of its own, as jobs that log them ask for."""
    folder.mkdir(parents=True)
    state = model.sharded_state_dict(metadata={"singleton_local_shards": True})
    common = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    dist_checkpointing.save({"model": state, **common}, str(folder), TorchDistSaveShardedStrategy())
