"""Hugging Face folder -> Megatron checkpoint, one parameter at a time."""

import time
from pathlib import Path

from rto_megatron.convert.config_json import tokenizer_notes, vocabulary_notes, write_config
from rto_megatron.convert.conversion_options import Advance, Options, cast
from rto_megatron.convert.conversion_report import ConversionPlan, WrittenFolder
from rto_megatron.data.tokenizer_files import carry
from rto_megatron.models.weight_map import dtype_name
from rto_megatron.storage import torch_dist_writer
from rto_megatron.storage.hf_model import HfModel
from rto_megatron.storage.megatron_args import beyond_megatron_lm, common_state
from rto_megatron.storage.megatron_folder import HF_FILES, RELEASE, TRACKER
from rto_megatron.storage.megatron_writer import MegatronWriter
from rto_megatron.storage.not_finite import num_not_finite


def plan_import(model: HfModel, source: Path, target: Path, options: Options) -> ConversionPlan:
    """Says what a conversion would do.

    Raises:
        UserError: the model's tensors are not those of its config.json; names all of them.
    """
    model.require_complete()
    dtype, notes = options.dtype or model.dtype(), []
    if (unread := model.folder.weights.note()) is not None:
        notes.append(unread)
    if model.folder.renamed is not None:
        notes.append(model.folder.renamed)
    found = {dtype_name(stored.dtype) for stored in model.folder.tensors.values()}
    if found != {dtype_name(dtype)}:
        notes.append(f"the source has {', '.join(sorted(found))}, written as {dtype_name(dtype)}")
    if model.head_bias():
        notes.append(f"the head's bias {model.head_bias():g} is kept in `mean` of config.json")
    if (parts := beyond_megatron_lm(model.shape)) is not None:
        notes.append(parts)
    notes += vocabulary_notes(source, model.shape.vocab_size, model.has_scalar_head)
    return ConversionPlan(
        "Hugging Face -> Megatron", source, target, model.shape, model.has_scalar_head, model.dtype(), dtype,
        len(model.folder.tensors), model.left_aside, tuple(notes),
    )  # fmt: skip


def import_weights(
    model: HfModel, plan: ConversionPlan, folder: Path, options: Options, advance: Advance
) -> WrittenFolder:
    """Writes Megatron-LM's tree into an empty folder, with config.json and tokenizer beside it.

    Raises:
        UserError: a file cannot be read, or a number does not fit the dtype.
    """
    start = time.monotonic()
    weights, files = folder / RELEASE, folder / HF_FILES
    not_finite: dict[str, int] = {}
    weights.mkdir()
    files.mkdir()
    with torch_dist_writer.opened(weights, options.max_file_bytes) as entries:
        writer = MegatronWriter(entries, model.shape)
        for parameter in model.parameters:
            dtype = parameter.dtype(plan.dtype)
            tensors = [cast(name, model.read(name, size), dtype) for name, size in parameter.sizes()]
            counts = {name: num_not_finite(t) for name, t in zip(parameter.hf, tensors, strict=True)}
            not_finite |= {name: count for name, count in counts.items() if count}
            writer.write(parameter, tensors)
            advance(sum(tensor.nbytes for tensor in tensors))
        entries.finish(common_state(model.shape, plan.has_scalar_head, plan.dtype))
    write_config(model.config.values, plan, model.head_bias(), files)
    carried = carry(plan.source, files)
    (folder / TRACKER).write_text(RELEASE)
    return WrittenFolder(carried, tokenizer_notes(files), not_finite, time.monotonic() - start)
