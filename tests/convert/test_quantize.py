"""Quantised folders: what is quantised, how far outputs are from the original's, the command, and refusals."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from safetensors.torch import load_file
from tiny_families import write_family
from tiny_models import write_llama
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.convert import fake_quantized, quantized_folder
from rto_megatron.convert.logits_error import outputs
from rto_megatron.convert.quantize import REPORT, Choices, QuantizationReport, quantize_checkpoint
from rto_megatron.data.synthetic import write_synthetic_task
from rto_megatron.errors import ModelFolderError, RecipeError, TokenizerError
from rto_megatron.models.hf_config import read_config
from rto_megatron.storage.hf_folder import HfFolder

TOOL = Path(__file__).parents[2] / "tools" / "quantize_checkpoint.py"
RANDOM = Choices("fp8", None, num_prompts=8, max_length=32, seed=3)
# Logits of the tiny models have a standard deviation of about 0.8.
LARGEST_MEAN_ERROR = 0.2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, QuantizationReport]:
    """A source, what was made of it, and the report."""
    root = tmp_path_factory.mktemp("llama")
    write_llama(root / "source")
    report = quantize_checkpoint(root / "source", root / "target", RANDOM)
    return root / "source", root / "target", report


def test_the_error_of_the_logits_is_small_and_not_zero(
    llama: tuple[Path, Path, QuantizationReport],
) -> None:
    _, target, report = llama
    for error in (report.inputs_and_weights, report.weights_before, report.weights_after):
        assert 1e-3 < error.mean_abs < LARGEST_MEAN_ERROR
        assert error.mean_kl_nats is not None and 1e-6 < error.mean_kl_nats < 0.05
        assert error.top1_agreement is not None and error.top1_agreement > 0.7
    assert report.inputs_and_weights.mean_abs > report.weights_after.mean_abs
    assert report.before_to_after.mean_abs < 1e-5
    assert report.bytes_after < 0.5 * report.bytes_before
    assert json.loads((target / REPORT).read_text())["coverage"]["num_quantized"] == 28


@torch.no_grad()
def test_the_model_that_is_measured_caps_its_scores(tmp_path: Path) -> None:
    """torch's kernels of attention leave Gemma 2's soft cap out."""
    model, tokens = write_family(tmp_path, "gemma2"), torch.arange(40)[None]
    folder = HfFolder(tmp_path)
    weights = {name: folder.tensor(name) for name in folder.tensors}
    (found,) = outputs(fake_quantized.build(tmp_path, read_config(tmp_path), weights), [tokens])
    assert torch.allclose(found, model(tokens).logits[0].float(), atol=1e-5)


def test_every_projection_is_quantised_and_nothing_else(
    llama: tuple[Path, Path, QuantizationReport],
) -> None:
    source, target, report = llama
    original, written = load_file(source / "model.safetensors"), quantized_folder.read_tensors(target)
    quantized = {name for name, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantized == {name for name in original if "_proj" in name}
    assert report.coverage.kept == ("lm_head.weight", "model.embed_tokens.weight")
    assert all(torch.equal(written[name], original[name]) for name in original.keys() - quantized)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "FP8")
    assert "lm_head" in config["ignore"]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_are_quantised_and_routers_are_not(tmp_path: Path, name: str) -> None:
    write_family(tmp_path / "source", name)
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "target", RANDOM)
    assert report.coverage.num_quantized == 4 * (4 + 4 * 3)  # layers x (attention + experts x matrices)
    assert sum(kept.endswith("gate.weight") for kept in report.coverage.kept) == 4
    assert 1e-3 < report.weights_after.mean_abs < LARGEST_MEAN_ERROR


def test_a_reward_model_in_bf16_keeps_its_head(tmp_path: Path) -> None:
    write_family(tmp_path / "source", "qwen2", is_scalar=True).bfloat16().save_pretrained(tmp_path / "source")
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "target", RANDOM)
    assert report.coverage.kept == ("model.embed_tokens.weight", "score.weight")
    assert report.weights_after.mean_kl_nats is None
    assert 0 < report.weights_after.mean_abs < LARGEST_MEAN_ERROR


def test_the_command_calibrates_on_text_and_carries_the_tokenizer(tmp_path: Path) -> None:
    write_synthetic_task(tmp_path / "task", 5)
    source, target = tmp_path / "task" / "models" / "policy", tmp_path / "target"
    vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
    tokenizer = {file.name: file.read_bytes() for file in source.glob("tokenizer*")}
    write_llama(source, vocab_size=vocab_size)
    prompts = tmp_path / "task" / "prompts_test.jsonl"
    options = ["--prompts", str(prompts), "--num-prompts", "4", "--max-length", "32"]
    shown = CliRunner().invoke(app, ["quantize", str(source), str(target), *options], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "28 quantised" in shown.stdout and "not checked" in shown.stdout
    report = json.loads((target / REPORT).read_text())
    assert (report["prompts"], report["num_calibration"], report["num_held_out"]) == (str(prompts), 4, 8)
    assert len(report["prompts_sha256"]) == 64
    assert len(tokenizer) == 3
    assert all((target / name).read_bytes() == content for name, content in tokenizer.items())


def test_a_converted_checkpoint_is_quantised_like_its_source(
    llama: tuple[Path, Path, QuantizationReport], tmp_path: Path
) -> None:
    source, target, _ = llama
    convert("hf-to-megatron", source, tmp_path / "megatron")
    quantize_checkpoint(tmp_path / "megatron", tmp_path / "target", RANDOM)
    assert (tmp_path / "target/model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "target"}


def test_a_refusal_of_the_tool_is_one_message_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where its imports are paid already."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "absent"), str(tmp_path / "target")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code == 2
    assert "absent does not exist; run the stage that makes it first" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_refusals_say_what_to_do(llama: tuple[Path, Path, QuantizationReport], tmp_path: Path) -> None:
    source, target, _ = llama
    with pytest.raises(RecipeError, match="exists already"):
        quantize_checkpoint(source, target, RANDOM)
    with pytest.raises(ModelFolderError, match="quantised already"):
        quantize_checkpoint(target, tmp_path / "again", RANDOM)
    with pytest.raises(ModelFolderError, match="max_position_embeddings=256 is below --max-length 300"):
        quantize_checkpoint(source, tmp_path / "long", Choices("fp8", None, 4, 300, 0))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        quantize_checkpoint(source, tmp_path / "text", Choices("fp8", "prompts.jsonl", 4, 16, 0))


def test_arguments_are_refused_before_modelopt_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from rto_megatron.cli.main import app\n"
        "told = CliRunner().invoke(app, ['quantize', *sys.argv[1:]]).exception\n"
        "print(told, sorted({'torch', 'modelopt'} & set(sys.modules)))"
    )
    (tmp_path / "rows.jsonl").write_text("no JSON\n")
    for arguments, said, imported in (
        (". .", "exists already", []),
        ("none new", "does not exist", []),
        (". new --prompts none.jsonl", "data file none.jsonl does not exist", []),
        (". new --prompts rows.jsonl", "rows.jsonl:1: not valid JSON", []),
        (". new --format nvfp4", "nvfp4 needs a CUDA device", ["torch"]),
    ):
        shown = subprocess.run(
            [sys.executable, "-c", script, *arguments.split()],
            capture_output=True, text=True, check=True, cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TOOL.parents[1])},
        ).stdout  # fmt: skip
        assert said in shown and shown.endswith(f"{imported}\n"), shown
