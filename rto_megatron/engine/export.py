"""Writes a model as a Hugging Face folder that transformers and vLLM load."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rto_megatron.engine.absent import AbsentModel, RoleModel
from rto_megatron.engine.holders import place_of
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.models.config_files import as_exported
from rto_megatron.models.weight_map import dtype_name

_SHARD_BYTES = 4 << 30


def export_hf(model: RoleModel, hf_files: Path, folder: Path) -> None:
    """Streams every tensor once, each rank that answers for some into files of its own; all ranks must call it.

    Args:
        hf_files: holds config.json and the tokenizer of the model.
        folder: is made; an earlier export at the same place is replaced once the new one is complete.
    """
    topology = model.topology
    partial = folder.with_name(f".partial_{folder.name}")
    if topology.is_lead:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(hf_files, partial, ignore=shutil.ignore_patterns("*.safetensors*"))
    topology.barrier()
    written: dict[str, str] = {}
    if not isinstance(model, AbsentModel):
        tensors = stage_hf_tensors(model.module, model.shape, model.has_scalar_head, topology)
        for number, group in enumerate(_groups(tensors)):
            file = f"model-{place_of(topology):03d}-{number:05d}.safetensors"
            save_file(group, partial / file, metadata={"format": "pt"})
            written.update(dict.fromkeys(group, file))
    all_written = topology.gather_all(written, dict[str, str])
    if topology.is_lead:
        weight_map = {name: file for part in all_written for name, file in part.items()}
        index = {"metadata": {}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        _write_config(partial / "config.json", model)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    topology.barrier()


def _groups(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > _SHARD_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor.cpu().contiguous().clone()
        size += tensor.nbytes
    if group:
        yield group


def _write_config(path: Path, model: RoleModel) -> None:
    config = as_exported(
        json.loads(path.read_text()), model.shape.family, model.has_scalar_head, dtype_name(model.dtype)
    )
    path.write_text(json.dumps(config, indent=2))
