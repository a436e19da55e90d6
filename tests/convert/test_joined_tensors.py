"""Experts of a layer in one tensor, q, k and v in one, gate and up in one: read as the tensors that they consist of."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from convert.convert_faults import Tensors, edit_hf
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_families import write_family

from rto_megatron.convert.logits import prove_logits
from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.weight_files import SINGLE


def _join(parts: tuple[str, ...], joined: str) -> Callable[[Tensors], None]:
    """Puts tensors whose names differ in one word below each other."""

    def edit(tensors: Tensors) -> None:
        for first in [name for name in tensors if re.search(rf"\b{parts[0]}_proj\.", name)]:
            names = [first.replace(f"{parts[0]}_proj", f"{part}_proj") for part in parts]
            tensors[first.replace(f"{parts[0]}_proj", joined)] = torch.cat([tensors.pop(n) for n in names])

    return edit


def _dense(tensors: Tensors) -> None:
    _join(("q", "k", "v"), "qkv_proj")(tensors)
    _join(("gate", "up"), "gate_up_proj")(tensors)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe_mixed", "qwen2_moe", "qwen2"])
def test_joined_tensors_are_read_as_their_parts(tmp_path: Path, family: str) -> None:
    source, megatron, back = tmp_path / "hf", tmp_path / "m", tmp_path / "back"
    model = write_family(source, family)
    want = load_file(source / SINGLE)
    model.save_pretrained(source, save_original_format=False)  # type: ignore[operator]  # of transformers
    if family == "qwen2":
        edit_hf(source, _dense)
    joined = load_file(source / SINGLE)
    assert len(joined) < len(want)
    shown = convert("hf-to-megatron", source, megatron)
    assert f"{len(want)}, every one mapped" in shown
    convert("megatron-to-hf", megatron, back)
    got = load_file(back / SINGLE)
    assert got.keys() == want.keys() and all(torch.equal(got[n], t) for n, t in want.items())
    if family == "qwen2":  # transformers does not take this one apart
        proof = prove_logits(
            source, megatron, False, 1, 1, lambda n, arguments: run_ranks(n, convert, *arguments[1:])
        )
        assert max(proof.max_difference.values()) < 1e-4


def test_a_joined_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write_family(tmp_path, "mixtral").save_pretrained(tmp_path, save_original_format=False)  # type: ignore[operator]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    edit_hf(tmp_path, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2).contiguous()}))
    with pytest.raises(
        ModelFolderError, match=rf"{name} has shape \(4, 64, 192\), config.json says \(4, 192, 64\)"
    ):
        convert("hf-to-megatron", tmp_path, tmp_path / "m")
