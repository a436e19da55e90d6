"""Pushes models of several families into vLLM's own classes, as one worker in this process, and prints what came of it.

    loaded_families.py FOLDER VARIANT...

A program, as vLLM must not be imported into the process of other tests. The last line is JSON: variant -> what
`test_family_pushes.py` reads. The oracle is vLLM's own load of the pushed weights from their file.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from ranks import free_port
from safetensors.torch import load_file
from tiny_families import write_family
from torch import Tensor, nn
from trainer_ranks import whole_piece
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import ModelRegistry

from rto_megatron.generation.vllm.worker.plugin import InitInfo, RtoWeightTransferEngine
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.parameters import stored_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.weight_sync.manifest import DTYPES, Manifest, PieceSpec
from rto_megatron.weight_sync.sender import Sender
from rto_megatron.weight_sync.transport import LOOPBACK, Communicator, Rendezvous, listen

CPU = torch.device("cpu")
WIDTHS = ("input_size_per_partition", "input_size", "embedding_dim")
HEADS: dict[str, object] = {"head_dim": 32}  # a size that vLLM's attention has on a CPU
CHANGES: dict[str, dict[str, object]] = {
    # Sizes that vLLM packs for a CPU, and the choice of experts that it would not take for granted.
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    }
}


def configuration(folder: Path, dtype: str) -> VllmConfig:
    for name in json.loads((folder / "config.json").read_text())["architectures"]:
        # A class that vLLM is given is not looked at first in a process of its own, which takes 10 s to start.
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=64
    )
    return arguments.create_engine_config()


def load(config: VllmConfig) -> nn.Module:
    destroy_model_parallel()  # models with experts have one group more
    with set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)
        return get_model(vllm_config=config)


def pieces(weights: dict[str, Tensor], shape: ModelShape) -> Iterator[tuple[PieceSpec, Tensor]]:
    """What each of four tensor ranks holds, which are more than the key-value heads of most variants."""
    for parameter in stored_parameters(shape, False):
        dim, num_ranks = parameter.layout.dim or 0, 1 if parameter.layout.dim is None else 4
        for rank in range(num_ranks):
            for run in parameter.runs(rank, num_ranks):
                whole = whole_piece(parameter.hf[run.tensor], weights[parameter.hf[run.tensor]])
                spec = replace(whole, dim=dim, start=run.start, length=run.length)
                if run.length:
                    yield spec, weights[spec.name].narrow(dim, run.start, run.length)


def push(weights: dict[str, Tensor], shape: ModelShape, model: nn.Module, config: VllmConfig) -> None:
    """One sender, which sends the pieces of all ranks, and one worker."""
    specs, numbers = zip(*pieces(weights, shape), strict=True)
    assert {spec.name for spec in specs} == weights.keys()
    manifest = Manifest(16 << 10, specs)
    listener = listen(LOOPBACK)
    meeting = Rendezvous(LOOPBACK, listener.getsockname()[1], 1, 2, "families", 60, "cpu")

    def send() -> None:
        communicator = Communicator(meeting, 0, CPU, listener)
        communicator.join()
        sender = Sender(manifest, communicator)
        sender.send(1, ((spec.name, piece) for spec, piece in zip(specs, numbers, strict=True)))
        sender.confirm()

    with ThreadPoolExecutor(1) as threads, set_current_vllm_config(config):
        sent = threads.submit(send)
        engine = RtoWeightTransferEngine(None, config, CPU, model)
        engine.init_transfer_engine(
            InitInfo(rendezvous=meeting.to_json(), first_rank=1, manifest=manifest.to_json())
        )
        engine.start_weight_update()
        engine.update_weights({"version": 1})
        engine.finish_weight_update()
        sent.result()
        engine.shutdown()


def numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a model computes with: its parameters, and what packed ones give for an input."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            yield name, parameter.detach()
    for name, module in model.named_modules():
        attributes = vars(module)
        if "cpu_linear" in attributes and module.cpu_linear is not nn.functional.linear:
            width = next(attributes[size] for size in WIDTHS if size in attributes)
            inputs = torch.randn(3, width, generator=generator).to(dtype_of(model))
            yield f"{name} applied", module.cpu_linear(inputs, module.weight, None)


def dtype_of(model: nn.Module) -> torch.dtype:
    return model.get_parameter("model.norm.weight").dtype


def differing(ours: nn.Module, theirs: nn.Module) -> list[str]:
    pairs = zip(numbers(ours), numbers(theirs), strict=True)
    return [name for (name, one), (_, other) in pairs if not torch.equal(one, other)]


def outcome(folder: Path, variant: str) -> dict[str, object]:
    for seed in (5, 6):
        write_family(folder / variant / str(seed), variant, seed=seed, **CHANGES.get(variant, HEADS))
    # vLLM packs the experts of this family in bf16 only; what corrects their scores stays in fp32.
    dtype = "bfloat16" if variant == "deepseek_v3" else "float32"
    config = configuration(folder / variant / "5", dtype)
    model, oracle = load(config), load(configuration(folder / variant / "6", dtype))
    before = differing(model, oracle)
    weights = load_file(folder / variant / "6" / "model.safetensors")
    of_dtype = {
        name: value if name.endswith("e_score_correction_bias") else value.to(DTYPES[dtype])
        for name, value in weights.items()
    }
    push(of_dtype, read_shape(folder / variant / "6"), model, config)
    return {
        "compared": sum(1 for _ in numbers(oracle)),
        "differed": len(before),
        "differ": differing(model, oracle),
    }


def main(folder: Path, variants: list[str]) -> None:
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
    outcomes: dict[str, object] = {}
    for variant in variants:
        try:
            outcomes[variant] = outcome(folder, variant)
        except (RuntimeError, ValueError, LookupError, AssertionError, NotImplementedError) as error:
            outcomes[variant] = f"{type(error).__name__}: {error}"
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
