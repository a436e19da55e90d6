"""Moves weights between Hugging Face tensors and this rank's part of a Megatron model, through the family's map."""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rto_megatron.errors import UserError
from rto_megatron.models.parameters import parameter_map, stage_of
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import TensorReader
from rto_megatron.parallel.topology import Topology

_HEAD = "score.weight"


def local_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by the name they have in the whole model (layers numbered from the first stage)."""
    first_layer = model.decoder.layers[0].layer_number - 1
    named = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first_layer)
        named[".".join(parts)] = parameter
    return named


@torch.no_grad()
def load_hf_tensors(
    model: GPTModel, shape: ModelShape, has_scalar_head: bool, topology: Topology, read: TensorReader
) -> None:
    """Fills every parameter of this rank from Hugging Face tensors; asserts that none is left out."""
    local = local_parameters(model)
    for mapped in parameter_map(shape, has_scalar_head):
        parameter = local.pop(mapped.megatron, None)
        if parameter is None:
            continue  # another stage's, or an output projection that is tied to the embedding of this rank
        tensors = [read(name, size) for name, size in zip(mapped.hf, mapped.hf_shapes, strict=True)]
        parameter.copy_(mapped.layout.shard(tensors, topology.tensor_rank, topology.tensor_size))
    assert not local, f"parameters that the weight map does not know: {sorted(local)}"


@torch.no_grad()
def stage_hf_tensors(
    model: GPTModel, shape: ModelShape, has_scalar_head: bool, topology: Topology
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that this pipeline stage owns, whole, in map order; all tensor ranks must iterate."""
    local = local_parameters(model)
    for mapped in parameter_map(shape, has_scalar_head):
        if mapped.is_copy or stage_of(mapped, shape, topology.pipeline_size) != topology.pipeline_rank:
            continue
        shards = topology.gather_tensor_shards(local[mapped.megatron].detach())
        yield from zip(mapped.hf, mapped.layout.merge(shards), strict=True)


def safetensors_reader(folder: Path, scalar_head_seed: int | None = None) -> TensorReader:
    """Reads single tensors of a Hugging Face folder; the scalar head may have the name that OpenRLHF gives it.

    Args:
        folder: holds model.safetensors or model.safetensors.index.json.
        scalar_head_seed: draw a fresh scalar head where the folder has none; null: a missing head is an error.

    Raises:
        UserError: no safetensors, a damaged or missing file, a missing tensor or a wrong shape.
    """
    files = _tensor_files(folder)
    stored_name = {} if _HEAD in files else _head_alias(folder, files)
    draw = None if scalar_head_seed is None else random_reader(scalar_head_seed, init_std=0.0)

    def read(name: str, size: tuple[int, ...]) -> Tensor:
        stored = stored_name.get(name, name)
        if stored not in files:
            if name == _HEAD and draw is not None:
                return draw(name, size)
            raise UserError(
                f"{folder} has no tensor {name}; found {len(files)} tensors, e.g. {sorted(files)[:3]}"
            )
        try:
            with safe_open(folder / files[stored], "pt") as opened:
                tensor = opened.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise _unreadable(folder / files[stored], error) from error
        if tuple(tensor.shape) != size:
            raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, config.json says {size}")
        return tensor

    return read


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> name of its file in `folder`."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            files = json.loads(index.read_text())["weight_map"]
            names = {str(tensor): str(file) for tensor, file in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(index, error) from error
        outside = sorted({file for file in names.values() if Path(file).name != file})
        if outside:
            raise UserError(
                f"{index} names files outside its folder: {outside[:3]}; expected plain file names"
            )
        return names
    if not single.is_file():
        raise UserError(
            f"{folder} has neither {single.name} nor {index.name}; expected a Hugging Face folder with safetensors"
        )
    try:
        with safe_open(single, "pt") as opened:
            return dict.fromkeys(opened.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(single, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is missing or damaged ({type(error).__name__}: {error}); fetch or export the model again"
    )


def _head_alias(folder: Path, files: Collection[str]) -> dict[str, str]:
    """OpenRLHF keeps the prefix of its reward models' head in config.json; released ones have `value_head`."""
    prefix = json.loads((folder / "config.json").read_text()).get("value_head_prefix", "value_head")
    alias = f"{prefix}.weight"
    return {_HEAD: alias} if alias in files else {}


def random_reader(seed: int, init_std: float) -> TensorReader:
    """Draws each tensor from a generator of its own, so that the draw does not depend on the parallel layout.

    Norm weights are 1; a scalar head has standard deviation 1 / (hidden size + 1), as OpenRLHF's reward models start.
    """

    def read(name: str, size: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(size)
        std = 1.0 / (size[-1] + 1) if name == _HEAD else init_std
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(size, generator=generator) * std

    return read
