"""A missing, extra, truncated, transposed or swapped tensor fails and is named, and no folder appears."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from commands import convert
from convert_faults import (
    Tensors,
    edit_hf,
    edit_index,
    edit_metadata,
    flip,
    numbers_of,
    place_of,
    rewrite,
    split_hf,
)
from tiny_families import write_family
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from rto_megatron.convert.conversion import Proofs, convert_to_hf, convert_to_megatron
from rto_megatron.convert.conversion_options import Advance, Options
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.errors import ConversionError, ModelFolderError
from rto_megatron.storage.weight_files import SINGLE

Q, OUT = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
EMBEDDING = "embedding.word_embeddings.weight"
STACK = "decoder.layers."
FC1, FC2 = STACK + "mlp.linear_fc1.weight", STACK + "mlp.linear_fc2.weight"
QKV, PROJ = STACK + "self_attention.linear_qkv.weight", STACK + "self_attention.linear_proj.weight"
EXPERT_FC1 = STACK + "mlp.experts.experts.linear_fc1.weight"
EXPERT_FC2 = STACK + "mlp.experts.experts.linear_fc2.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME and NAME_megatron of llama (heads x head size = hidden size), a tied one, and one with experts."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama3_tied", "qwen3_moe"):
        write_family(folder / name, name, num_hidden_layers=2)
        convert("hf-to-megatron", folder / name, folder / f"{name}_megatron")
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of `models` to damage it."""
    return lambda name: Path(shutil.copytree(models / name, tmp_path / name))


def require_refused(command: str, source: Path, message: str) -> None:
    """The command ends with the message, and its target does not appear."""
    target = source.parent / "target"
    with pytest.raises(ModelFolderError, match=message):
        convert(command, source, target)
    assert not target.exists()


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


# --- a Megatron checkpoint: what only the numbers tell ----------------------------------------------------------------


def swap(tensor: torch.Tensor, one: slice | tuple, other: slice | tuple) -> None:
    kept = tensor[one].clone()
    tensor[one] = tensor[other]
    tensor[other] = kept


def swap_key_and_value(tensors: Tensors) -> None:
    # Two groups of [two heads of q | k | v], 16 rows each.
    for group in (0, 64):
        swap(tensors[QKV][1], slice(group + 32, group + 48), slice(group + 48, group + 64))


def transpose_square(tensors: Tensors) -> None:
    tensors[PROJ][1] = tensors[PROJ][1].T.clone()


def keep_earlier_step(tensors: Tensors) -> None:
    for key in (QKV, PROJ, FC1, FC2):
        tensors[key][1] += 1e-3


def shift_vocabulary(tensors: Tensors) -> None:
    # A row of padding where token 50 should be, and every later token one row late.
    rows = tensors[EMBEDDING]
    rows[51:97] = rows[50:96].clone()
    rows[50] = 0


OTHER_NUMBERS: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "transposed": ("llama", transpose_square, rf"1 of 21 tensors.*{OUT} is transposed"),
    "layers swapped": (
        "llama",
        lambda t: swap(t[FC2], 0, 1),
        rf"2 of 21 tensors.*{DOWN.format(0)} holds the numbers of {DOWN.format(1)}"
        rf".*{DOWN.format(1)} holds the numbers of {DOWN.format(0)}",
    ),
    "experts swapped": (
        "qwen3_moe",
        lambda t: swap(t[EXPERT_FC2], (1, 2), (1, 3)),
        r"2 of 45.*layers\.1\.mlp\.experts\.2\.down_proj\.weight holds the numbers of "
        r"model\.layers\.1\.mlp\.experts\.3\.down_proj",
    ),
    "experts of two layers swapped": (
        "qwen3_moe",
        lambda t: swap(t[EXPERT_FC1], (0, 2), (1, 2)),
        r"4 of 45.*layers\.0\.mlp\.experts\.2\.gate_proj\.weight holds the numbers of "
        r"model\.layers\.1\.mlp\.experts\.2\.gate_proj",
    ),
    "gate and up swapped": (
        "llama",
        lambda t: swap(t[FC1], (0, slice(96)), (0, slice(96, 192))),
        r"2 of 21.*layers\.0\.mlp\.gate_proj\.weight holds the numbers of model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "key and value swapped": (
        "llama",
        swap_key_and_value,
        r"2 of 21.*layers\.1\.self_attn\.k_proj\.weight holds the numbers of model\.layers\.1\.self_attn\.v_proj",
    ),
    "groups swapped": (
        "llama",
        lambda t: swap(t[QKV], (1, slice(64)), (1, slice(64, 128))),
        r"3 of 21.*layers\.1\.self_attn\.q_proj\.weight has other numbers",
    ),
    "a layer of an earlier step": (
        "llama", keep_earlier_step, r"7 of 21.*layers\.1\.self_attn\.q_proj\.weight has other numbers: sha256",
    ),
    "vocabulary shifted": ("llama", shift_vocabulary, r"1 of 21.*model\.embed_tokens\.weight has other numbers"),
    "vocabulary of a tied model shifted": (
        "llama3_tied", shift_vocabulary, r"1 of 20.*model\.embed_tokens\.weight has other numbers",
    ),
    "zero of another sign": (
        "llama",
        lambda t: t[FC2][0].zero_().neg_(),
        rf"1 of 21.*{DOWN.format(0)} has other numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", OTHER_NUMBERS)
def test_checkpoint_with_other_numbers_is_refused_by_verify(
    models: Path, copy: Callable[[str], Path], fault: str
) -> None:
    name, plant, message = OTHER_NUMBERS[fault]
    hf, megatron = models / name, copy(f"{name}_megatron")
    if fault == "zero of another sign":
        hf = copy(name)
        edit_hf(hf, lambda t: t[DOWN.format(0)].zero_())
    convert("verify", models / name, megatron)
    rewrite(megatron / "release", lambda t: None)
    convert("verify", models / name, megatron)
    rewrite(megatron / "release", plant)
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        convert("verify", hf, megatron)


@pytest.mark.parametrize("key", [EMBEDDING, FC1, FC2, "decoder.final_layernorm.weight"])
def test_one_flipped_bit_is_refused_by_verify(models: Path, copy: Callable[[str], Path], key: str) -> None:
    megatron = copy("llama_megatron")
    names = {
        EMBEDDING: "embed_tokens",
        FC1: r"gate_proj",
        FC2: "down_proj",
        "decoder.final_layernorm.weight": "norm",
    }
    path, start = numbers_of(megatron / "release", key)
    flip(path, start + 100)
    with pytest.raises(
        ConversionError, match=rf"(?s)1 of 21 tensors differ.*{names[key]}\.weight has other numbers"
    ):
        convert("verify", models / "llama", megatron)


# --- corruption between copying and proving --------------------------------------------------------------------------


def corrupting(when: str, corrupt: Callable[[], None]) -> Callable:
    """A progress bar that damages something when the bar of this title starts."""

    @contextmanager
    def bar(title: str, size: int) -> Iterator[Advance]:
        if title == when:
            corrupt()
        yield lambda nbytes: None

    return bar


def test_byte_that_turns_over_before_the_proof_stops_an_import(copy: Callable[[str], Path]) -> None:
    source = copy("llama")
    target, partial = source.parent / "target", source.parent / ".partial_target"
    bar = corrupting("verify", lambda: flip(*numbers_of(partial / "release", FC2, 1)))
    options, proofs = Options(None, 10**9, None), Proofs(digest=True, logits=None)
    with pytest.raises(
        ConversionError, match=rf"(?s)1 of 21 tensors differ.*{DOWN.format(1)} has other numbers"
    ):
        convert_to_megatron(source, target, options, proofs, bar, dry_run=False)
    assert not target.exists()
    assert partial.is_dir()


def test_byte_that_turns_over_before_the_proof_stops_an_export(copy: Callable[[str], Path]) -> None:
    source = copy("llama_megatron")
    target, partial = source.parent / "target", source.parent / ".partial_target"

    def corrupt() -> None:
        flip(partial / SINGLE, (partial / SINGLE).stat().st_size - 10)

    options, proofs = Options(None, 10**9, None), Proofs(digest=True, logits=None)
    opened = open_megatron(source, None, None)
    with pytest.raises(ConversionError, match=r"(?s)1 of 21 tensors differ.*weight has other numbers"):
        convert_to_hf(opened, target, options, proofs, corrupting("verify", corrupt), dry_run=False)
    assert not target.exists()
    assert partial.is_dir()


def test_byte_that_turned_over_since_the_conversion_stops_an_export(copy: Callable[[str], Path]) -> None:
    """Export and proof read the same damaged bytes; the report of the conversion that wrote them knows better."""
    megatron = copy("llama_megatron")
    path, start = numbers_of(megatron / "release", "decoder.final_layernorm.weight")
    flip(path, start)
    message = r"1 of 21 tensors differ.*\n  model\.norm\.weight is not what the conversion_report\.json"
    with pytest.raises(ConversionError, match=message):
        convert("megatron-to-hf", megatron, megatron.parent / "target")
    assert not (megatron.parent / "target").exists()


def test_folder_that_changed_since_it_was_exported_is_not_imported(copy: Callable[[str], Path]) -> None:
    exported = copy("llama_megatron").parent / "exported"
    convert("megatron-to-hf", exported.parent / "llama_megatron", exported)
    convert("hf-to-megatron", exported, exported.parent / "again")
    flip(exported / SINGLE, (exported / SINGLE).stat().st_size - 256)
    with pytest.raises(ConversionError, match=r"is not what the conversion_report\.json"):
        convert("hf-to-megatron", exported, exported.parent / "target")
    (exported / "conversion_report.json").unlink()
    convert("hf-to-megatron", exported, exported.parent / "target")


def test_message_lists_the_first_twenty_of_many(models: Path, copy: Callable[[str], Path]) -> None:
    megatron = copy("llama_megatron")
    rewrite(megatron / "release", lambda t: [x.add_(1) for x in t.values()])
    with pytest.raises(ConversionError) as caught:
        convert("verify", models / "llama", megatron)
    assert len(re.findall("has other numbers", str(caught.value))) == 20
    assert str(caught.value).endswith("and 1 more")
