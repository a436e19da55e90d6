"""Exported folders are what transformers loads, and Hugging Face -> Megatron -> Hugging Face changes no bit."""

import json
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import SEQUENCES, write_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_megatron.engine import export


def _export(layout: str, source: Path, folder: Path, is_scalar: bool, shard_bytes: int) -> None:
    export._SHARD_BYTES = shard_bytes
    export.export_hf(frozen(topology(layout), source, is_scalar), source, folder)


@torch.no_grad()
def _outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    outputs = []
    for ids, _ in SEQUENCES:
        logits = model(torch.tensor([ids])).logits[0]
        outputs.append(logits if logits.shape[-1] == 1 else logits.log_softmax(-1))
    return outputs


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("layout", ["tp2_pp2", "dp2"])
@pytest.mark.parametrize(("is_tied", "is_scalar"), [(False, False), (True, False), (False, True)])
def test_export_loads_in_transformers(tmp_path: Path, layout: str, is_tied: bool, is_scalar: bool) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    original = write_llama(source, vocab_size=97, is_tied=is_tied, is_scalar=is_scalar)
    config = json.loads((source / "config.json").read_text())
    if is_scalar:
        config.update(mean=-0.25, std=1.5)
    config["architectures"] = ["SomethingElse"]
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    run_ranks(LAYOUTS[layout][0], _export, layout, source, folder, is_scalar, 4 << 30)

    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    loaded, report = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.dtype == torch.float32
    worst = 0.0
    for got, want in zip(_outputs(loaded.eval()), _outputs(original), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        worst = max(worst, float((got - want).abs().max()))
    print(layout, is_tied, is_scalar, worst)

    got, want = _tensors(folder), _tensors(source)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    written = json.loads((folder / "config.json").read_text())
    kind_name = "LlamaForSequenceClassification" if is_scalar else "LlamaForCausalLM"
    assert written["architectures"] == [kind_name]
    if is_scalar:
        assert (written["mean"], written["std"]) == (-0.25, 1.5)
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_small_shards_and_a_second_export(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    write_llama(source, seed=1)
    run_ranks(2, _export, "tp2", source, folder, False, 4 << 30)
    original = write_llama(source, seed=2)
    run_ranks(2, _export, "pp2", source, folder, False, 100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name for path in folder.glob("*.safetensors")}
    assert len(files) > 4 and set(index.values()) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for got, want in zip(_outputs(loaded), _outputs(original), strict=True):
        assert torch.equal(got, want)
