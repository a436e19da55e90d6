"""Moves weights between Hugging Face tensors and this rank's part of a Megatron model, through the family's map."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.engine.holders import gathered, holders, place_of, run_of, shard_of
from rto_megatron.engine.source import WeightSource
from rto_megatron.errors import ModelFolderError
from rto_megatron.models.chunks import ModelChunks
from rto_megatron.models.families.blocks import LM_HEAD, SCALAR_HEAD
from rto_megatron.models.fused_layers import plain_name
from rto_megatron.models.hf_config import read_config
from rto_megatron.models.parameters import parameter_map, stored_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import TensorReader, merge
from rto_megatron.parallel.topology import Topology
from rto_megatron.storage.hf_model import HfModel
from rto_megatron.storage.megatron_args import require_agreement
from rto_megatron.storage.megatron_tensors import MegatronTensors
from rto_megatron.storage.not_finite import num_not_finite
from rto_megatron.storage.torch_dist_reader import TorchDistReader


def local_parameters(model: ModelChunks) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by the name they have in the whole model.

    Layers are numbered from the first stage, experts from the first part; names are those of torch's layers.
    """
    first_expert, num_experts = 0, model.config.num_moe_experts
    if num_experts is not None:
        parts_of_experts = model.last.pg_collection.ep
        first_expert = parts_of_experts.rank() * (num_experts // parts_of_experts.size())
    named = {}
    for chunk in model.chunks:
        first_layer = chunk.decoder.layers[0].layer_number - 1
        for name, parameter in chunk.named_parameters():
            parts = plain_name(name).split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first_layer)
            if "local_experts" in parts:
                number = parts.index("local_experts") + 1
                parts[number] = str(int(parts[number]) + first_expert)
            named[".".join(parts)] = parameter
    return named


@torch.no_grad()
def load_hf_tensors(
    model: ModelChunks, shape: ModelShape, has_scalar_head: bool, topology: Topology, read: TensorReader
) -> dict[str, int]:
    """Fills every parameter of this rank from Hugging Face tensors.

    Returns:
        Name of a tensor of which this rank holds NaN or infinite numbers -> how many it has.

    Raises:
        RuntimeError: the family's map leaves a parameter out.
    """
    local = local_parameters(model)
    not_finite: dict[str, int] = {}
    for mapped in parameter_map(shape, has_scalar_head):
        parameter = local.pop(mapped.megatron, None)
        if parameter is None:
            continue  # of other ranks, or an output projection that is tied to the embedding of this one
        tensors = [read(name, size) for name, size in mapped.sizes()]
        parameter.copy_(mapped.layout.shard(tensors, *shard_of(mapped, topology)))
        if num_not_finite(parameter):
            counts = {
                name: num_not_finite(t.to(parameter.dtype))
                for name, t in zip(mapped.hf, tensors, strict=True)
            }
            not_finite |= {name: count for name, count in counts.items() if count}
    if local:
        raise RuntimeError(
            f"the weight map of {shape.family} does not know the parameters {sorted(local)}; every one needs its names "
            "in models/families"
        )
    return not_finite


@torch.no_grad()
def stage_hf_tensors(
    model: ModelChunks, shape: ModelShape, has_scalar_head: bool, topology: Topology
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that this rank answers for, whole, in map order; all ranks of the job must iterate.

    Every tensor is one rank's: of the first replica, or of the first that holds the expert, tensor rank 0.
    """
    local, place = local_parameters(model), place_of(topology)
    for mapped in stored_parameters(shape, has_scalar_head):
        if run_of(topology) or place not in holders(mapped, shape, has_scalar_head, topology):
            continue
        shards = gathered(mapped, local[mapped.megatron].detach(), topology)
        if shard_of(mapped, topology)[0] == 0:
            yield from zip(mapped.hf, merge(mapped.layout, shards), strict=True)


@torch.no_grad()
def stage_pieces(
    model: ModelChunks, shape: ModelShape, has_scalar_head: bool, topology: Topology
) -> Iterator[tuple[str, Tensor]]:
    """The runs of Hugging Face tensors that a rank in this one's place answers for, in map order; no collective.

    Whole tensors that every tensor rank holds are tensor rank 0's; see `weight_map.ShardLayout.pieces`.
    """
    local, place = local_parameters(model), place_of(topology)
    for mapped in stored_parameters(shape, has_scalar_head):
        if place not in holders(mapped, shape, has_scalar_head, topology):
            continue
        shard = shard_of(mapped, topology)
        pieces = mapped.layout.pieces(local[mapped.megatron].detach(), *shard)
        runs = zip(mapped.runs(*shard), pieces, strict=True)
        yield from ((mapped.hf[run.tensor], piece) for run, piece in runs if run.length)


def hf_reader(folder: Path, has_scalar_head: bool, fresh_head_seed: int | None = None) -> TensorReader:
    """Reads single tensors of a Hugging Face folder, whatever its scalar head is called.

    Args:
        fresh_head_seed: the folder is a language model; draw the scalar head from this seed.

    Raises:
        ModelFolderError: as `HfModel`, or its tensors are not those of config.json; names all of them.
    """
    is_scalar = has_scalar_head and fresh_head_seed is None
    model = HfModel(folder, is_scalar)
    if not is_scalar:
        model.require_language()
    model.require_complete(unread=None if fresh_head_seed is None else LM_HEAD)
    if model.head_bias():
        raise ModelFolderError(
            f"{folder}: the scalar head has a bias; convert the model (rto convert hf-to-megatron), which keeps it in "
            "the mean of the scores"
        )
    return model.read if fresh_head_seed is None else with_fresh_head(model.read, fresh_head_seed)


def megatron_reader(source: WeightSource, has_scalar_head: bool, fresh_head_seed: int | None) -> TensorReader:
    """Reads single tensors of a checkpoint in Megatron-LM's format, written at any layout; see `hf_reader`.

    Raises:
        UserError: also where config.json is not that of the model which Megatron-LM trained.
    """
    is_scalar, shape = has_scalar_head and fresh_head_seed is None, source.shape()
    tensors = MegatronTensors(TorchDistReader(source.path), shape, is_scalar)
    require_agreement(read_config(source.hf_folder), shape, is_scalar, source.path)
    return tensors.read if fresh_head_seed is None else with_fresh_head(tensors.read, fresh_head_seed)


def with_fresh_head(read: TensorReader, seed: int) -> TensorReader:
    """`read` for all tensors but the scalar head, which is drawn."""
    draw = random_reader(seed, init_std=0.0)
    return lambda name, size: draw(name, size) if name == SCALAR_HEAD else read(name, size)


def random_reader(seed: int, init_std: float, norm: float = 1.0) -> TensorReader:
    """Draws each tensor from a generator of its own, so that the draw does not depend on the parallel layout.

    Args:
        norm: the weights of norms.

    A scalar head has standard deviation 1 / (hidden size + 1), as OpenRLHF's reward models start.
    """

    def read(name: str, size: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.full(size, norm)
        std = 1.0 / (size[-1] + 1) if name == SCALAR_HEAD else init_std
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(size, generator=generator) * std

    return read
