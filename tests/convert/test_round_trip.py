"""Hugging Face -> Megatron -> Hugging Face for every family: bits, outputs, files, reports, and memory."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import VARIANTS, write_family
from torch import Tensor
from transformers import AutoModelForCausalLM

from rto_megatron.convert.conversion import Proofs, convert_to_megatron, silent
from rto_megatron.convert.conversion_options import Options
from rto_megatron.convert.logits import prove_logits
from rto_megatron.engine.source import find_source
from rto_megatron.engine.weights import megatron_reader
from rto_megatron.errors import ConversionError, MachineError, ModelFolderError, RecipeError
from rto_megatron.models.families import FAMILIES
from rto_megatron.platform.fresh_folder import require_space

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
RUNS = [name for name in VARIANTS if FAMILIES[str(VARIANTS[name]["model_type"])].not_run is None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<variant> and <variant>_scalar of every family, and what they were converted to."""
    root = tmp_path_factory.mktemp("families")
    for name in VARIANTS:
        for is_scalar in (False, True):
            folder = root / (f"{name}_scalar" if is_scalar else name)
            write_family(folder, name, is_scalar=is_scalar)
            convert("hf-to-megatron", folder, _megatron(folder))
    return root


def _megatron(folder: Path) -> Path:
    return folder.with_name(folder.name + "-megatron")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("suffix", ["", "_scalar"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_comes_back_bit_equal(models: Path, tmp_path: Path, name: str, suffix: str) -> None:
    source = models / (name + suffix)
    convert("megatron-to-hf", _megatron(source), tmp_path / "back", "--max-shard-size", "0.1MB")
    want, got = _tensors(source), _tensors(tmp_path / "back")
    assert want.keys() == got.keys()
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in want.items())
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
    assert {k: v for k, v in before.items() if k != "torch_dtype"}.items() <= after.items()
    report = json.loads((tmp_path / "back/conversion_report.json").read_text())
    assert report["tensors"].keys() == want.keys()
    assert "bit-equal" in report["proved"][0]


@pytest.mark.parametrize("suffix", ["", "_scalar"])
@pytest.mark.parametrize("name", RUNS)
def test_outputs_equal_transformers_at_tp2_pp2(models: Path, name: str, suffix: str) -> None:
    source = models / (name + suffix)
    proof = prove_logits(source, _megatron(source), bool(suffix), 2, 2, _forked)
    print(name + suffix, proof.max_difference)
    assert max(proof.max_difference.values()) < 1e-4


def _forked(count: int, arguments: Sequence[str]) -> None:
    run_ranks(count, convert, *arguments[1:])


def test_outputs_of_another_model_are_refused(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "llama/model.safetensors")
    first, last = (f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 3))
    tensors[first], tensors[last] = tensors[last], tensors[first]
    (tmp_path / "config.json").write_text((models / "llama/config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"differ from transformers' .* expected less than"):
        prove_logits(tmp_path, models / "llama-megatron", False, 1, 1, _forked)


def test_what_cannot_be_built_is_told_to_be_proved_by_digest(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"(?s)--verify digest is:.*multi-head latent attention"):
        convert("hf-to-megatron", models / "deepseek_v3", tmp_path / "m", "--verify", "logits", "--dry-run")


def test_what_would_fail_at_the_end_is_refused_at_the_beginning(models: Path, tmp_path: Path) -> None:
    logits = ("--verify", "logits", "--dry-run")
    with pytest.raises(ConversionError, match=r"--dtype rounds float32 to bfloat16"):
        convert("hf-to-megatron", models / "qwen2", tmp_path / "m", "--dtype", "bf16", *logits)
    with pytest.raises(ConversionError, match=r"parallel\.tensor=3 does not divide"):
        convert("hf-to-megatron", models / "qwen2", tmp_path / "m", "--tensor", "3", *logits)
    with pytest.raises(RecipeError, match=r"--tensor 2 --pipeline 1 are of --verify logits alone"):
        convert("hf-to-megatron", models / "qwen2", tmp_path / "m", "--tensor", "2")
    with pytest.raises(MachineError, match=r"GB free, and the weights take"):
        require_space(tmp_path / "not" / "yet", 1 << 60)


def test_a_number_that_does_not_fit_is_named(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.mkdir()
    (source / "config.json").write_text((models / "qwen2/config.json").read_text())
    tensors = load_file(models / "qwen2/model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = 70000.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"layers\.1\.mlp\.down_proj\.weight holds 70000, which float16 cannot"
    ):
        convert("hf-to-megatron", source, tmp_path / "m", "--dtype", "fp16")


def _with_a_nan(count: int, arguments: Sequence[str]) -> None:
    """The ranks, whose last output is no number."""
    _forked(count, arguments)
    outputs = Path(arguments[5])
    found = load_file(outputs)
    found[str(len(found) - 1)][-1, -1] = float("nan")
    save_file(found, outputs)


def test_a_nan_is_no_proof(models: Path) -> None:
    with pytest.raises(ConversionError, match=r"differ from transformers' .*nan"):
        prove_logits(models / "llama", models / "llama-megatron", False, 1, 1, _with_a_nan)


def test_files_are_compared_in_the_narrower_dtype(models: Path, tmp_path: Path) -> None:
    convert("hf-to-megatron", models / "qwen2", tmp_path / "m", "--dtype", "bf16")
    assert "bit-equal as bfloat16" in convert("verify", models / "qwen2", tmp_path / "m")
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "hf")
    assert "bit-equal as bfloat16" in convert("verify", tmp_path / "hf", models / "qwen2-megatron")


def test_files_of_a_megatron_checkpoint_have_the_size_that_was_asked_for(
    models: Path, tmp_path: Path
) -> None:
    convert("hf-to-megatron", models / "mixtral", tmp_path / "m", "--max-shard-size", "0.2MB")
    sizes = [file.stat().st_size for file in (tmp_path / "m/release").glob("*.distcp")]
    assert len(sizes) > 3 and max(sizes) < 250_000  # small objects come after the last tensor that fits
    convert("verify", models / "mixtral", tmp_path / "m")


def test_dtype_is_torchs_cast_and_a_bias_of_experts_stays_float32(models: Path, tmp_path: Path) -> None:
    for name in ("qwen3_moe", "deepseek_v3"):
        megatron, back = tmp_path / f"{name}-m", tmp_path / f"{name}-hf"
        convert("hf-to-megatron", models / name, megatron, "--dtype", "bf16")
        convert("megatron-to-hf", megatron, back)
        got = _tensors(back)
        for tensor, want in _tensors(models / name).items():
            kind = torch.float32 if tensor.endswith("e_score_correction_bias") else torch.bfloat16
            assert torch.equal(got[tensor], want.to(kind)) and got[tensor].dtype == kind, tensor
        assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
        note = json.loads((megatron / "conversion_report.json").read_text())["notes"][0]
        assert note == "the source has float32, written as bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3_moe-hf")
    assert loaded.dtype == torch.bfloat16


def test_a_mixed_source_loses_nothing(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "qwen2/model.safetensors")
    halved = {n: t.bfloat16() if "norm" not in n else t for n, t in tensors.items()}
    source = tmp_path / "mixed"
    source.mkdir()
    (source / "config.json").write_text((models / "qwen2/config.json").read_text())
    save_file(halved, source / "model.safetensors", {"format": "pt"})
    convert("hf-to-megatron", source, tmp_path / "m")
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "back")
    got = _tensors(tmp_path / "back")
    assert all(torch.equal(got[n], t.float()) for n, t in halved.items())


def test_shards_have_the_size_that_was_asked_for(models: Path, tmp_path: Path) -> None:
    convert("megatron-to-hf", models / "mixtral-megatron", tmp_path / "hf", "--max-shard-size", "0.2MB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file in files:
        with safe_open(file, "pt") as opened:
            sizes = [opened.get_tensor(n).nbytes for n in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 200_000 or len(sizes) == 1
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(tmp_path / "hf").values())
    want = AutoModelForCausalLM.from_pretrained(models / "mixtral").eval()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(got(ids).logits, want(ids).logits)


def test_a_dry_run_checks_and_writes_nothing(models: Path, tmp_path: Path) -> None:
    shown = convert("hf-to-megatron", models / "qwen2", tmp_path / "m", "--dry-run")
    assert "51, every one mapped" in shown and "nothing was written" in shown
    convert("megatron-to-hf", models / "qwen2-megatron", tmp_path / "hf", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text((models / "qwen2/config.json").read_text())
    tensors = load_file(models / "qwen2/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"model\.norm\.weight \(64,\) is missing"):
        convert("hf-to-megatron", tmp_path, tmp_path / "m", "--dry-run")


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "5TB"])
def test_a_size_that_is_none_is_refused(models: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(RecipeError, match=rf"--max-shard-size {size}: expected a size such as 5GB"):
        convert("hf-to-megatron", models / "qwen2", tmp_path / "m", "--max-shard-size", size)


def test_the_report_names_every_tensor_and_version(models: Path) -> None:
    report = json.loads((models / "qwen3_moe-megatron/conversion_report.json").read_text())
    stored = _tensors(models / "qwen3_moe")
    assert {n: (tuple(r["shape"]), r["dtype"]) for n, r in report["tensors"].items()} == {
        n: (tuple(t.shape), "float32") for n, t in stored.items()
    }
    assert all(re.fullmatch(r"[0-9a-f]{64}", r["sha256"]) for r in report["tensors"].values())
    assert len({r["sha256"] for r in report["tensors"].values()}) == len(stored)
    assert report["architecture"] == "Qwen3MoeForCausalLM"
    assert report["versions"].keys() >= {"megatron-core", "torch", "transformers"}
    assert report["coverage"] == {"stored": len(stored), "written": len(stored), "left_aside": {}}


def test_what_megatron_lm_has_no_argument_for_is_kept_named_and_compared(
    models: Path, tmp_path: Path
) -> None:
    report = json.loads((models / "granite-megatron/conversion_report.json").read_text())
    parts = "embedding_scale, logit_divisor, residual_scale, score_scale of granite"
    assert [note for note in report["notes"] if f"Megatron-LM has no arguments for {parts}" in note]
    assert not json.loads((models / "smollm3-megatron/conversion_report.json").read_text())["notes"]
    shutil.copytree(models / "granite-megatron", tmp_path / "granite")
    config = tmp_path / "granite/hf/config.json"
    config.write_text(config.read_text().replace('"residual_multiplier": 0.4', '"residual_multiplier": 0.5'))
    source = find_source(tmp_path / "granite", False, is_random=False, key="test")
    with pytest.raises(ModelFolderError, match=r"residual_scale=0\.5, trained with 0\.4"):
        megatron_reader(source, False, None)


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _growth(source: Path, target: Path, direction: str) -> int:
    """Anonymous memory at its highest while converting, beyond that before the first tensor."""
    seen: list[int] = []

    def watched(title: str, size: int):
        class Bar:
            def __enter__(self):
                return lambda nbytes: seen.append(_anonymous())

            def __exit__(self, *error: object) -> None:
                return None

        return Bar()

    if direction == "import":
        convert_to_megatron(source, target, Options(None, 10**9, None), Proofs(True, None), watched, False)
    else:
        from rto_megatron.convert.conversion import convert_to_hf
        from rto_megatron.convert.megatron_source import open_megatron

        opened = open_megatron(source, None, None)
        convert_to_hf(opened, target, Options(None, 10**9, None), Proofs(True, None), watched, False)
    return max(seen) - seen[0]


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    growth, size = {}, {}
    for layers in (4, 32):
        source, megatron = tmp_path / f"hf{layers}", tmp_path / f"m{layers}"
        write_family(source, "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=layers)
        convert_to_megatron(source, megatron, Options(None, 10**9, None), Proofs(False, None), silent, False)
        size[layers] = os.stat(source / "model.safetensors").st_size
        for direction, folder in (("import", source), ("export", megatron)):
            (bytes_,) = run_ranks(1, _growth, folder, tmp_path / f"{direction}{layers}", direction)
            growth[direction, layers] = bytes_
            print(direction, layers, f"{bytes_ / 1e6:.1f} MB of a model of {size[layers] / 1e6:.0f} MB")
    # The allocator moves by some MB; a conversion that kept its tensors would grow by all that the model grew.
    allowed = (size[32] - size[4]) / 3
    assert all(growth[direction, 32] < growth[direction, 4] + allowed for direction in ("import", "export"))


@pytest.mark.slow
def test_the_tool_proves_outputs_with_real_ranks_and_says_so(models: Path, tmp_path: Path) -> None:
    """tools/convert_checkpoint.py as a user starts it: torchrun, two tensor ranks, transformers beside them."""
    command = [sys.executable, str(TOOL), "hf-to-megatron", str(models / "qwen3"), str(tmp_path / "m")]
    shown = subprocess.run(
        [*command, "--verify", "logits", "--tensor", "2"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "Traceback" not in shown.stderr
    report = json.loads((tmp_path / "m/conversion_report.json").read_text())
    assert (report["logits"]["tensor_parallel"], report["logits"]["pipeline_parallel"]) == (2, 1)
    assert max(report["logits"]["max_difference"].values()) < 1e-4
    assert "at TP2 x PP1, float32" in shown.stdout
