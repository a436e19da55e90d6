"""Megatron checkpoint -> Hugging Face folder, one parameter at a time."""

import time
from pathlib import Path

from rto_megatron.convert.config_json import carry_tokenizer, write_config
from rto_megatron.convert.megatron_source import MegatronSource
from rto_megatron.convert.options import Advance, Options, write_dtype
from rto_megatron.convert.report import Report, planned
from rto_megatron.storage.hf_writer import HfWriter
from rto_megatron.storage.megatron_tensors import MegatronTensors


def plan_export(source: MegatronSource, target: Path, options: Options) -> tuple[MegatronTensors, Report]:
    """Says what a conversion would do.

    Raises:
        UserError: the checkpoint's entries are not those of the model; names all of them.
    """
    tensors = MegatronTensors(source.reader, source.shape, source.has_scalar_head)
    dtype = options.dtype or tensors.dtype()
    report = Report(
        "Megatron -> Hugging Face", str(source.folder), str(target), source.shape, source.has_scalar_head, dtype,
        planned(tensors.parameters, dtype), left_aside=tensors.left_aside(), notes=list(source.notes),
    )  # fmt: skip
    return tensors, report


def export_weights(
    source: MegatronSource,
    tensors: MegatronTensors,
    report: Report,
    folder: Path,
    options: Options,
    advance: Advance,
) -> None:
    """Writes safetensors shards, config.json and the tokenizer into an empty folder, and fills the report.

    Raises:
        UserError: a file cannot be read.
    """
    start = time.monotonic()
    specs = {
        name: (write_dtype(p.is_float32, report.dtype), size)
        for p in tensors.parameters
        for name, size in zip(p.hf, p.hf_shapes, strict=True)
    }
    writer = HfWriter(folder, specs, options.max_file_bytes)
    for parameter in tensors.parameters:
        dtype = write_dtype(parameter.is_float32, report.dtype)
        for name, tensor in zip(parameter.hf, tensors.hf(parameter), strict=True):
            written = tensor.to(dtype)
            writer.write(name, written)
            advance(written.nbytes)
    writer.finish()
    write_config(source.config, report, 0.0, folder)
    if source.hf_files is not None:
        carry_tokenizer(source.hf_files, folder, report)
    report.seconds = time.monotonic() - start
