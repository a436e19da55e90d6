"""A missing, extra, truncated or misplaced tensor fails and is named, and no folder appears."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import convert
from convert_faults import (
    Tensors,
    edit_hf,
    edit_index,
    edit_metadata,
    place_of,
    require_refused,
    rewrite,
    split_hf,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.weight_files import SINGLE

Q, OUT = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"


# --- a Hugging Face source -------------------------------------------------------------------------------------------


def cut_rows(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q][:-1]


def transpose_rectangle(tensors: Tensors) -> None:
    tensors[DOWN.format(1)] = tensors[DOWN.format(1)].T


SOURCE_FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(Q), rf"{Q} \(64, 64\) is missing"),
    "extra": (
        lambda t: t.update({"model.layers.2.x": torch.ones(3)}),
        r"model\.layers\.2\.x \(3,\) is left over",
    ),
    "cut by rows": (cut_rows, rf"{Q} has shape \(63, 64\), config.json says \(64, 64\)"),
    "transposed": (transpose_rectangle, rf"{DOWN.format(1)} has shape \(96, 64\), config.json says \(64, 96\)"),
    "integer": (lambda t: t.update({Q: t[Q].to(torch.int64)}), f"{Q} is I64; expected one of F32"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_fault_in_the_source_is_named(copy: Callable[[str], Path], fault: str) -> None:
    source = copy("llama")
    plant, message = SOURCE_FAULTS[fault]
    edit_hf(source, plant)
    require_refused("hf-to-megatron", source, message)


def test_all_faults_of_a_source_are_named_at_once(copy: Callable[[str], Path]) -> None:
    source = copy("llama")
    edit_hf(source, cut_rows)
    edit_hf(source, transpose_rectangle)
    require_refused("hf-to-megatron", source, rf"(?s){Q} has shape.*{DOWN.format(1)} has shape")


@pytest.mark.parametrize("num_bytes", [1, 40_000])
def test_shortened_source_names_the_tensors_that_are_cut(copy: Callable[[str], Path], num_bytes: int) -> None:
    source = copy("llama")
    os.truncate(source / SINGLE, (source / SINGLE).stat().st_size - num_bytes)
    # transformers and safetensors sort by name within a dtype: the last norm is at the end.
    require_refused("hf-to-megatron", source, rf"{SINGLE} is missing or damaged.*loses .*model\.norm\.weight")


def test_file_that_lacks_an_indexed_tensor_is_named(copy: Callable[[str], Path]) -> None:
    source = copy("llama")
    split_hf(source, Q)
    edit_index(source, Q, "a.safetensors")
    edit_index(source, OUT, "b.safetensors")
    require_refused(
        "hf-to-megatron", source, rf"index.json says that {Q} is in a.safetensors, which does not hold"
    )


def test_missing_file_of_an_index_is_named_with_its_tensors(copy: Callable[[str], Path]) -> None:
    source = copy("llama")
    split_hf(source, Q)
    (source / "b.safetensors").unlink()
    require_refused("hf-to-megatron", source, rf"b\.safetensors is missing.*loses {Q};")


def test_tensor_that_the_index_does_not_list_is_named(copy: Callable[[str], Path]) -> None:
    source = copy("llama")
    split_hf(source, Q)
    edit_index(source, OUT, None)
    require_refused("hf-to-megatron", source, rf"a.safetensors holds {OUT}, which .*index.json does not list")


def test_tensor_that_only_the_index_lists_is_named(copy: Callable[[str], Path]) -> None:
    source = copy("llama")
    split_hf(source, Q)
    edit_index(source, "model.layers.0.ghost", "a.safetensors")
    require_refused(
        "hf-to-megatron", source, r"model\.layers\.0\.ghost is in a.safetensors, which does not hold"
    )


def test_tied_model_with_another_head_is_refused_and_with_a_copy_converted(
    copy: Callable[[str], Path],
) -> None:
    source = copy("llama3_tied")
    edit_hf(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert("hf-to-megatron", source, source.parent / "fine")
    edit_hf(source, lambda t: t["lm_head.weight"][3, 3].add_(1))
    require_refused("hf-to-megatron", source, r"lm_head\.weight.*differs from model\.embed_tokens\.weight")


# --- a Megatron checkpoint: what reading it must find ----------------------------------------------------------------


def drop_chunk(key: str) -> Callable[[Path], None]:
    """A hole: the entry is there, one of its chunks is not."""

    def change(metadata: Metadata) -> None:
        chunk = metadata.state_dict_metadata[key].chunks.pop()
        del metadata.storage_data[MetadataIndex(key, chunk.offsets)]

    return lambda weights: edit_metadata(weights, change)


def drop_place(weights: Path) -> None:
    """The chunk is announced and stored nowhere."""

    def change(metadata: Metadata) -> None:
        chunk = metadata.state_dict_metadata[FC2].chunks[-1]
        del metadata.storage_data[MetadataIndex(FC2, chunk.offsets)]

    edit_metadata(weights, change)


def repeat_chunk(weights: Path) -> None:
    """The numbers are as many as they should be: one layer is recorded twice, the other is missing."""

    def change(metadata: Metadata) -> None:
        chunks = metadata.state_dict_metadata[FC2].chunks
        chunks[1] = chunks[0]

    edit_metadata(weights, change)


def shift_chunk(weights: Path) -> None:
    """The second half of fc1 (up) lies over one row of the first: a hole of one row at the end."""

    def change(metadata: Metadata) -> None:
        chunks = metadata.state_dict_metadata[FC1].chunks
        old = MetadataIndex(FC1, chunks[1].offsets)
        chunks[1].offsets = torch.Size([0, 95, 0])
        metadata.storage_data[MetadataIndex(FC1, chunks[1].offsets)] = metadata.storage_data.pop(old)

    edit_metadata(weights, change)


def announce(key: str, dtype: torch.dtype | None = None, size: tuple[int, ...] | None = None) -> Callable:
    """Another dtype or shape of an entry in `.metadata`."""

    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[key]
        entry.properties.dtype = dtype or entry.properties.dtype
        entry.size = entry.size if size is None else torch.Size(size)

    return lambda weights: edit_metadata(weights, change)


def turn_chunk(weights: Path) -> None:
    """`.metadata` has fc2's first chunk and its entry the other way round, consistently."""

    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[FC2]
        entry.size = torch.Size([2, 96, 64])
        for chunk in entry.chunks:
            chunk.sizes = torch.Size([1, 96, 64])

    edit_metadata(weights, change)


def half_length(weights: Path) -> None:
    path, start, length = place_of(weights, FC2)
    os.truncate(path, start + length // 2)


def without_file(weights: Path) -> None:
    place_of(weights, FC2)[0].unlink()


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda w: rewrite(w, lambda t: t.pop(FC2)), rf"{FC2} is missing"),
    "extra": (lambda w: rewrite(w, lambda t: t.update({"decoder.x": torch.ones(3)})), r"decoder\.x \(3,\) is left"),
    "file cut": (half_length, r"__0_0\.distcp has \d+ bytes, and decoder\.\S+ should end at byte"),
    "file missing": (without_file, r"__0_0\.distcp is missing, it holds \S+weight"),
    "hole": (drop_chunk(FC2), rf"{FC2} has shape \(2, 64, 96\), 12288 numbers, and 6144 are stored"),
    "not stored": (drop_place, rf"the chunk of {FC2} at \(1, 0, 0\) is not stored whole"),
    "recorded twice": (repeat_chunk, rf"the part \(1, 64, 96\) of {FC2} at \(0, 0, 0\) is recorded twice"),
    "overlap": (shift_chunk, rf"the part \(1, 96, 64\) of {FC1} at \(0, 0, 0\) is recorded twice or has holes"),
    "dtype": (announce(FC2, dtype=torch.int32), rf"the chunk of {FC2} at \S+ 0, 0\) is torch.float32"),
    "narrow dtype": (announce(FC2, dtype=torch.bfloat16), rf"the chunk of {FC2} at \S+ 0, 0\) is torch.float32"),
    "wide dtype": (announce(FC2, dtype=torch.float64), rf"the chunk of {FC2} at \(0, 0, 0\) is not stored whole"),
    "smaller shape": (announce(FC2, size=(2, 64, 95)), rf"the chunk of {FC2} at \(0, 0, 0\)"),
    "larger shape": (announce(FC2, size=(3, 64, 96)), rf"{FC2} has shape \(3, 64, 96\)"),
    "fewer dimensions": (announce(FC2, size=(128, 96)), rf"{FC2} at \(0, 0, 0\)"),
    "turned": (turn_chunk, rf"{FC2} has shape \(2, 96, 64\), config.json says \(2, 64, 96\)"),
    "one layer less": (lambda w: rewrite(w, lambda t: t.update({FC2: t[FC2][:1]})), rf"{FC2} has shape \(1, 64, 96\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNREADABLE)
def test_damaged_checkpoint_is_refused_and_the_entry_named(
    models: Path, copy: Callable[[str], Path], fault: str
) -> None:
    megatron = copy("llama_megatron")
    plant, message = UNREADABLE[fault]
    plant(megatron / "release")
    require_refused("megatron-to-hf", megatron, message)
    with pytest.raises(ModelFolderError, match=message):
        convert("verify", models / "llama", megatron)
