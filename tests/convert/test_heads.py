"""Reward models and critics from every trainer's naming, tied and leftover tensors, FP8 blocks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from convert.convert_faults import edit_hf
from safetensors.torch import load_file, save_file
from tiny_families import write_family
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.hf_model import HfModel

type Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    write_family(root / "language", "llama")
    write_family(root / "tied", "qwen2_tied")
    write_family(root / "scalar", "llama", is_scalar=True)
    return root


def _changed(source: Path, folder: Path, change: Callable[[Tensors], None], **config: object) -> Path:
    """A copy of a model with other tensors and configuration keys."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {n: t.clone() for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def _rename(new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop("score.weight")

    return change


def _through_megatron(source: Path, *options: str) -> Path:
    megatron, back = source.with_name(source.name + "-m"), source.with_name(source.name + "-back")
    convert("hf-to-megatron", source, megatron, *options)
    convert("megatron-to-hf", megatron, back)
    return back


@torch.no_grad()
def _score(folder: Path) -> Tensor:
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("score.weight", {}),
        ("value_head.weight", {"mean": 0.5, "std": 2.0}),
        ("reward_head.weight", {"value_head_prefix": "reward_head"}),
        ("v_head.summary.weight", {}),
        ("lm_head.weight", {}),
    ],
)
def test_a_head_of_any_trainer_becomes_a_one_label_classifier_with_the_same_scores(
    models: Path, tmp_path: Path, name: str, config: dict[str, object]
) -> None:
    source = _changed(models / "scalar", tmp_path / "rm", _rename(name), **config)
    back = _through_megatron(source)
    assert torch.equal(_score(back), _score(models / "scalar"))
    exported = json.loads((back / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForSequenceClassification"] and exported["num_labels"] == 1
    assert (exported.get("mean"), exported.get("std")) == (config.get("mean"), config.get("std"))


def test_a_value_head_beside_a_language_model_is_told_apart(models: Path, tmp_path: Path) -> None:
    head = load_file(models / "scalar/model.safetensors")["score.weight"]

    def as_trl(tensors: Tensors) -> None:
        tensors["v_head.summary.weight"], tensors["v_head.summary.bias"] = head, torch.tensor([0.75])

    source = _changed(models / "language", tmp_path / "trl", as_trl)
    with pytest.raises(
        ModelFolderError, match=r"has a language head and the scalar head v_head\.summary\.weight; say"
    ):
        convert("hf-to-megatron", source, tmp_path / "m")
    back = _through_megatron(source, "--head", "scalar")
    assert torch.equal(load_file(back / "model.safetensors")["score.weight"], head)
    config = json.loads((back / "config.json").read_text())
    assert (config["mean"], config["std"]) == (-0.75, 1.0)  # (w h - mean) / std = w h + bias
    report = json.loads((tmp_path / "trl-m/conversion_report.json").read_text())
    assert report["coverage"]["left_aside"]["lm_head.weight"] == "a language head beside the scalar head"
    assert "0.75" in report["notes"][0]
    convert("hf-to-megatron", source, tmp_path / "language-m", "--head", "language")
    convert("megatron-to-hf", tmp_path / "language-m", tmp_path / "language-back")
    want, got = (
        load_file(f / "model.safetensors") for f in (models / "language", tmp_path / "language-back")
    )
    assert want.keys() == got.keys() and all(torch.equal(got[n], t) for n, t in want.items())


def test_a_language_head_is_never_taken_for_a_scalar_one(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"score\.weight \(1, 64\) is missing") as caught:
        convert("hf-to-megatron", models / "language", tmp_path / "m", "--head", "scalar")
    assert "reward model" in str(caught.value)
    convert("hf-to-megatron", models / "language", tmp_path / "m")
    with pytest.raises(
        ModelFolderError, match=r"holds a language model; --head asks for a reward model or critic"
    ):
        convert("megatron-to-hf", tmp_path / "m", tmp_path / "hf", "--head", "scalar")
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight .* is missing"):
        convert("hf-to-megatron", models / "scalar", tmp_path / "n", "--head", "language")


def _two_labels(tensors: Tensors) -> None:
    tensors["score.weight"] = tensors["score.weight"].repeat(2, 1)


def _two_heads(tensors: Tensors) -> None:
    tensors["value_head.weight"] = tensors["score.weight"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_two_labels, r"score\.weight has shape \(2, 64\).* one label"),
        (_two_heads, r"has the heads \['score"),
    ],
)
def test_heads_that_are_not_one_number_are_refused(
    models: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    source = _changed(models / "scalar", tmp_path / "rm", change)
    with pytest.raises(ModelFolderError, match=message):
        convert("hf-to-megatron", source, tmp_path / "m")


def test_a_tied_head_may_be_stored_twice_but_not_differ(models: Path, tmp_path: Path) -> None:
    def stored_twice(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def differing(tensors: Tensors) -> None:
        stored_twice(tensors)
        tensors["lm_head.weight"][3, 5] += 0.01

    back = _through_megatron(_changed(models / "tied", tmp_path / "twice", stored_twice))
    assert "lm_head.weight" not in load_file(back / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert("hf-to-megatron", _changed(models / "tied", tmp_path / "differs", differing), tmp_path / "m")


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])  # none of them knows of the buffer
def test_rotary_buffers_of_every_family_are_left_aside_by_name(tmp_path: Path, family: str) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    write_family(tmp_path / "hf", family)
    edit_hf(tmp_path / "hf", lambda tensors: tensors.update({name: torch.ones(8) for name in names}))
    model = HfModel(tmp_path / "hf", has_scalar_head=False)
    model.require_complete()
    assert model.left_aside == dict.fromkeys(names, "computed from config.json")


def _block_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 and the factor of every block of 128 x 128, block by block."""
    rows, columns = weight.shape
    quantized = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale[i, j] = block.abs().max() / 448
            quantized[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = (block / scale[i, j]).to(
                torch.float8_e4m3fn
            )
    return quantized, scale


def test_deepseeks_fp8_blocks_are_multiplied_out(tmp_path: Path) -> None:
    write_family(tmp_path / "plain", "deepseek_v3", hidden_size=160, intermediate_size=192)
    quantized = "model.layers.0.mlp.up_proj.weight"  # 192 x 160: blocks that are cut at both edges
    stored: dict[str, Tensor] = {}

    def quantize(tensors: Tensors) -> None:
        tensors.update({n: t.bfloat16() for n, t in tensors.items() if "correction_bias" not in n})
        weight, scale = _block_quantize(tensors[quantized].float())
        tensors[quantized], tensors[f"{quantized}_scale_inv"] = weight, scale
        tensors["model.layers.4.eh_proj.weight"] = torch.ones(2, 2, dtype=torch.bfloat16)
        stored.update(weight=weight, scale=scale)

    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = _changed(tmp_path / "plain", tmp_path / "fp8", quantize, quantization_config=fp8)
    back = _through_megatron(source)
    got = load_file(back / "model.safetensors")
    want = torch.empty(192, 160)
    for i in range(192):
        for j in range(160):
            want[i, j] = stored["weight"][i, j].float() * stored["scale"][i // 128, j // 128]
    assert torch.equal(got[quantized], want.bfloat16())
    assert f"{quantized}_scale_inv" not in got and "model.layers.4.eh_proj.weight" not in got
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    report = json.loads((tmp_path / "fp8-m/conversion_report.json").read_text())
    assert "multi-token prediction" in report["coverage"]["left_aside"]["model.layers.4.eh_proj.weight"]

    def without_scale(tensors: Tensors) -> None:
        del tensors[f"{quantized}_scale_inv"]

    without = _changed(source, tmp_path / "unscaled", without_scale)
    with pytest.raises(ModelFolderError, match=r"up_proj\.weight is FP8 and .*_scale_inv is missing"):
        convert("hf-to-megatron", without, tmp_path / "m")


def test_other_quantisations_are_refused(models: Path, tmp_path: Path) -> None:
    source = _changed(
        models / "language", tmp_path / "awq", lambda t: None, quantization_config={"quant_method": "awq"}
    )
    with pytest.raises(ModelFolderError, match=r"quantization_config is .*awq.*unquantised release"):
        convert("hf-to-megatron", source, tmp_path / "m")
