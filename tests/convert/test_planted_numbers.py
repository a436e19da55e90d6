"""Numbers that are not those of the source are told by their digests, and no folder appears."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from commands import convert
from convert_faults import Tensors, edit_hf, flip, numbers_of, rewrite

from rto_megatron.convert.conversion import Proofs, convert_to_hf, convert_to_megatron
from rto_megatron.convert.conversion_options import Advance, Options
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.errors import ConversionError
from rto_megatron.storage.weight_files import SINGLE

OUT = "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
EMBEDDING = "embedding.word_embeddings.weight"
STACK = "decoder.layers."
FC1, FC2 = STACK + "mlp.linear_fc1.weight", STACK + "mlp.linear_fc2.weight"
QKV, PROJ = STACK + "self_attention.linear_qkv.weight", STACK + "self_attention.linear_proj.weight"
EXPERT_FC1 = STACK + "mlp.experts.experts.linear_fc1.weight"
EXPERT_FC2 = STACK + "mlp.experts.experts.linear_fc2.weight"


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
