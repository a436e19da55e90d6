"""Megatron checkpoint -> Hugging Face folder, one parameter at a time."""

import time
from pathlib import Path

from rto_megatron.convert.config_json import tokenizer_notes, vocabulary_notes, write_config
from rto_megatron.convert.conversion_options import Advance, Options, cast
from rto_megatron.convert.conversion_report import ConversionPlan, WrittenFolder
from rto_megatron.convert.megatron_source import MegatronSource
from rto_megatron.data.tokenizer_files import carry
from rto_megatron.storage.hf_writer import HfWriter
from rto_megatron.storage.megatron_tensors import MegatronTensors
from rto_megatron.storage.not_finite import num_not_finite


def plan_export(
    source: MegatronSource, tensors: MegatronTensors, target: Path, options: Options
) -> ConversionPlan:
    """Says what a conversion would do."""
    notes = vocabulary_notes(source.hf_files, source.shape.vocab_size, source.has_scalar_head)
    return ConversionPlan(
        "Megatron -> Hugging Face", source.reader.folder, target, source.shape, source.has_scalar_head,
        tensors.dtype(), options.dtype or tensors.dtype(), len(source.reader.entries), tensors.left_aside(),
        (*source.notes, *notes),
    )  # fmt: skip


def export_weights(
    source: MegatronSource,
    tensors: MegatronTensors,
    plan: ConversionPlan,
    folder: Path,
    options: Options,
    advance: Advance,
) -> WrittenFolder:
    """Writes safetensors shards, config.json and the tokenizer into an empty folder.

    Raises:
        UserError: a file cannot be read, or a number does not fit the dtype.
    """
    start = time.monotonic()
    dtypes = plan.dtypes()
    specs = {name: (dtypes[name], shape) for name, shape in plan.shapes().items()}
    writer = HfWriter(folder, specs, options.max_file_bytes)
    not_finite: dict[str, int] = {}
    for parameter in tensors.parameters:
        for name, tensor in zip(parameter.hf, tensors.hf(parameter), strict=True):
            written = cast(name, tensor, dtypes[name])
            writer.write(name, written)
            if (count := num_not_finite(written)) > 0:
                not_finite[name] = count
            advance(written.nbytes)
    writer.finish()
    write_config(source.config, plan, 0.0, folder)
    carried = {} if source.hf_files is None else carry(source.hf_files, folder)
    return WrittenFolder(carried, tokenizer_notes(folder), not_finite, time.monotonic() - start)
