"""Hugging Face folder -> Megatron checkpoint, one parameter at a time."""

import time
from pathlib import Path

from rto_megatron.convert.config_json import carry_tokenizer, write_config
from rto_megatron.convert.megatron_args import common_state
from rto_megatron.convert.options import Advance, Options, dtype_name, write_dtype
from rto_megatron.convert.report import Report, planned
from rto_megatron.storage import torch_dist_writer
from rto_megatron.storage.hf_model import HfModel
from rto_megatron.storage.megatron_folder import HF_FILES, RELEASE, TRACKER
from rto_megatron.storage.megatron_writer import MegatronWriter


def plan_import(source: Path, target: Path, options: Options) -> tuple[HfModel, Report]:
    """Opens the model and says what a conversion would do.

    Raises:
        UserError: the model is not supported, or its tensors are not those of its config.json; names all of them.
    """
    model = HfModel(source, options.has_scalar_head)
    model.require_complete()
    dtype = options.dtype or model.dtype()
    notes = []
    found = {dtype_name(stored.dtype) for stored in model.folder.tensors.values()}
    if found != {dtype_name(dtype)}:
        notes.append(f"the source has {', '.join(sorted(found))}, written as {dtype_name(dtype)}")
    if model.head_bias():
        notes.append(f"the head's bias {model.head_bias():g} is kept in `mean` of config.json")
    report = Report(
        "Hugging Face -> Megatron", str(source), str(target), model.shape, model.has_scalar_head, dtype,
        planned(model.parameters, dtype), left_aside=model.left_aside, notes=notes,
    )  # fmt: skip
    return model, report


def import_weights(model: HfModel, report: Report, folder: Path, options: Options, advance: Advance) -> None:
    """Writes Megatron-LM's tree into an empty folder, with config.json and tokenizer beside it, and fills the report.

    Raises:
        UserError: a file cannot be read.
    """
    start = time.monotonic()
    weights = folder / RELEASE
    weights.mkdir()
    with torch_dist_writer.opened(weights, options.max_file_bytes) as files:
        writer = MegatronWriter(files, model.shape)
        for parameter in model.parameters:
            dtype = write_dtype(parameter.is_float32, report.dtype)
            tensors = [
                model.read(name, size).to(dtype)
                for name, size in zip(parameter.hf, parameter.hf_shapes, strict=True)
            ]
            writer.write(parameter, tensors)
            advance(sum(tensor.nbytes for tensor in tensors))
        files.finish(common_state(model.shape, report.has_scalar_head, report.dtype))
    (folder / HF_FILES).mkdir()
    write_config(model.config.values, report, model.head_bias(), folder / HF_FILES)
    carry_tokenizer(Path(report.source), folder / HF_FILES, report)
    (folder / TRACKER).write_text(RELEASE)
    report.seconds = time.monotonic() - start
