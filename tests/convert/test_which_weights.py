"""Several sets of weights in a folder, adapters, numbers that are none, FP8 blocks: what transformers would load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from convert.convert_faults import Tensors, edit_hf, split_hf
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_families import write_family
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_megatron.convert.logits import prove_logits
from rto_megatron.data.tokenizer import train_tokenizer
from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.weight_files import INDEX, SINGLE

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("which") / "llama"
    write_family(folder, "llama", num_hidden_layers=1)
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "llama"))


def _other_norm(tensors: Tensors) -> None:
    tensors[NORM] += 1.0


def _sharded_beside(folder: Path) -> None:
    """The index and its files with another norm, and the single file as it was."""
    single = (folder / SINGLE).read_bytes()
    edit_hf(folder, _other_norm)
    split_hf(folder, NORM)
    (folder / SINGLE).write_bytes(single)


def _bin_beside(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    _other_norm(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def _named_beside(folder: Path) -> None:
    """config.json asks for the file with the other norm."""
    tensors = load_file(folder / SINGLE)
    _other_norm(tensors)
    save_file(tensors, folder / "other.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))


SETS: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "single and sharded": (_sharded_beside, SINGLE, ("a.safetensors", "b.safetensors", INDEX)),
    "safetensors and bin": (_bin_beside, SINGLE, ("pytorch_model.bin",)),
    "named in config.json": (_named_beside, "other.safetensors", (SINGLE,)),
}


@pytest.mark.parametrize("sets", SETS)
def test_of_two_sets_transformers_choice_is_converted_and_said(
    folder: Path, tmp_path: Path, sets: str
) -> None:
    write, read, unread = SETS[sets]
    write(folder)
    want = AutoModelForCausalLM.from_pretrained(folder).state_dict()[NORM]
    said = " ".join(convert("hf-to-megatron", folder, tmp_path / "m").split())
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / SINGLE)[NORM], want)
    note = json.loads((tmp_path / "m/conversion_report.json").read_text())["notes"][0]
    assert note == (
        f"weights are read from {read}, which transformers takes; not read are {', '.join(unread)} beside it"
    )
    assert f"weights are read from {read}" in said
    # The written weights have their own names.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()[NORM]
    assert torch.equal(again, want)


def test_a_file_that_config_json_names_must_lie_in_the_folder(folder: Path, tmp_path: Path) -> None:
    _named_beside(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("../other.safetensors", "other.bin", 3):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(
            ModelFolderError, match=r"transformers_weights is .*; expected a safetensors file"
        ):
            convert("hf-to-megatron", folder, tmp_path / "m")


def test_states_of_trainers_are_no_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(b"x")
    convert("hf-to-megatron", folder, tmp_path / "m")
    assert json.loads((tmp_path / "m/conversion_report.json").read_text())["notes"] == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(ModelFolderError, match=rf"holds an adapter \({name}\).*merge_and_unload"):
        convert("hf-to-megatron", folder, tmp_path / "m")


def test_further_chat_templates_come_along_and_work(tmp_path: Path) -> None:
    """They lie as transformers saves them: the default beside the tokenizer, the others in a folder."""
    source = tmp_path / "model"
    write_family(source, "llama", num_hidden_layers=1)
    train_tokenizer(["some text to make a vocabulary of"] * 5, source, vocab_size=300, byte_fallback=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "tools: {{ messages }}"}
    tokenizer.save_pretrained(source)
    convert("hf-to-megatron", source, tmp_path / "m")
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == tokenizer.chat_template
    recorded = json.loads((tmp_path / "back/conversion_report.json").read_text())["tokenizer_files"]
    assert "additional_chat_templates/tool_use.jinja" in recorded


# --- numbers that are none -------------------------------------------------------------------------------------------


def _damage(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4:6] = float("nan")
    tensors["model.layers.0.self_attn.k_proj.weight"][1, 2] = -float("inf")
    tensors[NORM][0] = float("inf")


NOT_FINITE = {
    "model.layers.0.self_attn.k_proj.weight": 1,
    "model.layers.0.mlp.up_proj.weight": 2,
    NORM: 1,
}


@pytest.mark.parametrize("dtype", ["auto", "fp16"])
def test_numbers_that_are_none_are_counted_and_said_in_both_directions(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    edit_hf(folder, _damage)
    m, back = tmp_path / "m", tmp_path / "back"
    for said, report in (
        (convert("hf-to-megatron", folder, m, "--dtype", dtype), m / "conversion_report.json"),
        (convert("megatron-to-hf", m, back), back / "conversion_report.json"),
    ):
        assert json.loads(report.read_text())["not_finite"] == NOT_FINITE
        words = " ".join(said.replace("│", " ").split())
        assert "NaN or infinite numbers in 3 tensors: model.layers.0.self_attn.k_proj.weight (1)" in words


def test_numbers_that_are_all_finite_are_not_spoken_of(folder: Path, tmp_path: Path) -> None:
    # Their sum is beyond float32.
    edit_hf(folder, lambda tensors: tensors[NORM].fill_(3e38))
    assert "NaN" not in convert("hf-to-megatron", folder, tmp_path / "m")
    assert json.loads((tmp_path / "m/conversion_report.json").read_text())["not_finite"] == {}


# --- FP8 -------------------------------------------------------------------------------------------------------------


def _in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 and the one factor of a matrix that is no larger than a block."""
    assert max(weight.shape) <= 128
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)


def test_outputs_of_an_fp8_source_are_compared_with_those_of_its_rounded_numbers(
    folder: Path, tmp_path: Path
) -> None:
    def quantize(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = _in_blocks(tensors[name])

    edit_hf(folder, quantize)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    convert("hf-to-megatron", folder, tmp_path / "m")
    proof = prove_logits(
        folder,
        tmp_path / "m",
        False,
        1,
        1,
        lambda count, arguments: run_ranks(count, convert, *arguments[1:]),
    )
    assert max(proof.max_difference.values()) < 1e-4
    # Not of the numbers before rounding, nor of none at all.
    assert proof.largest_output > 0.1
