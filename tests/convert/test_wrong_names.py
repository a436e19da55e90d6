"""What users name in place of a model, and how other programs name its tensors: one sentence says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from convert.convert_faults import Tensors, edit_hf
from safetensors.torch import load_file, save_file
from tiny_families import write_family

from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.weight_files import SINGLE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """language, reward and what language was converted to, megatron."""
    root = tmp_path_factory.mktemp("names")
    write_family(root / "language", "llama", num_hidden_layers=1)
    write_family(root / "reward", "llama", is_scalar=True, num_hidden_layers=1)
    convert("hf-to-megatron", root / "language", root / "megatron")
    return root


def _refusal(*arguments: str | Path) -> str:
    with pytest.raises(ModelFolderError) as refused:
        convert(*arguments)
    assert "\n" not in str(refused.value), "one sentence"
    return str(refused.value)


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_name_of_the_hub_is_told_to_download_first(tmp_path: Path, command: str) -> None:
    said = _refusal(command, "Qwen/Qwen2.5-0.5B", tmp_path / "m")
    assert "hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B, and name Qwen2.5-0.5B" in said
    assert "hf download" not in _refusal(command, "runs/quickstart/sft", tmp_path / "m")
    assert "hf download" not in _refusal(command, tmp_path / "models/sft", tmp_path / "m")


def test_a_folder_of_the_cache_names_its_snapshot(models: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--Qwen--Qwen2.5-0.5B"
    for revision in ("0a", "1b"):
        shutil.copytree(models / "language", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("1b")
    for named in (repository, repository / "snapshots"):
        said = _refusal("hf-to-megatron", named, tmp_path / "m")
        assert f"name the snapshot in it, {repository}/snapshots/1b" in said
    convert("hf-to-megatron", repository / "snapshots/1b", tmp_path / "m")


def test_files_in_place_of_their_folder(models: Path, tmp_path: Path) -> None:
    said = _refusal("hf-to-megatron", models / "language" / SINGLE, tmp_path / "m")
    assert f"{SINGLE} is a file; name the folder that it lies in, {models / 'language'}" in said
    (tmp_path / "q4").mkdir()
    (tmp_path / "q4/model-q4_k_m.gguf").write_bytes(b"GGUF")
    for named in (tmp_path / "q4", tmp_path / "q4/model-q4_k_m.gguf"):
        assert "llama.cpp's format, of which rto convert gguf-to-hf makes a folder" in _refusal(
            "hf-to-megatron", named, tmp_path / "m"
        )
    (tmp_path / "q4/config.json").write_text((models / "language/config.json").read_text())
    assert "found ['model-q4_k_m.gguf'], llama.cpp's format" in _refusal(
        "hf-to-megatron", tmp_path / "q4", tmp_path / "m"
    )


def test_folders_that_are_no_models(models: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    assert "an adapter without its base model" in _refusal(
        "hf-to-megatron", tmp_path / "lora", tmp_path / "m"
    )
    (tmp_path / "original").mkdir()
    (tmp_path / "original/params.json").write_text("{}")
    assert "the maker's own format" in _refusal("hf-to-megatron", tmp_path / "original", tmp_path / "m")
    assert f"{models / 'language'}" in _refusal("hf-to-megatron", models, tmp_path / "m")


def test_a_folder_without_a_checkpoint_is_not_taken_for_a_critics(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = _refusal("megatron-to-hf", tmp_path / "empty", tmp_path / "back")
    assert "a finished checkpoint of policy_ema or policy; found []" in said
    asked = _refusal("megatron-to-hf", tmp_path / "empty", tmp_path / "back", "--head", "scalar")
    assert "a finished checkpoint of reward or critic; found []" in asked


def test_the_wrong_side_of_a_conversion_names_the_command(models: Path, tmp_path: Path) -> None:
    language, megatron = models / "language", models / "megatron"
    said = _refusal("verify", megatron, language)
    assert (
        f"{megatron} is a Megatron checkpoint" in said and f"rto convert verify HF_FOLDER {megatron}" in said
    )
    assert f"rto convert megatron-to-hf {megatron} TARGET" in _refusal(
        "hf-to-megatron", megatron, tmp_path / "m"
    )
    assert f"rto convert hf-to-megatron {language} TARGET" in _refusal(
        "megatron-to-hf", language, tmp_path / "m"
    )
    run = tmp_path / "run/checkpoints/step_000001/policy/weights"
    run.mkdir(parents=True)
    for folder in (tmp_path / "run", run.parent.parent, run.parent):
        assert f"rto convert megatron-to-hf {folder} TARGET" in _refusal(
            "hf-to-megatron", folder, tmp_path / "m"
        )


@pytest.mark.parametrize(
    ("size", "limit"), [("300KB", 300_000), ("300KiB", 307_200), ("0.3MiB", 314_573), ("0.3MB", 300_000)]
)
def test_sizes_are_written_as_for_transformers(models: Path, tmp_path: Path, size: str, limit: int) -> None:
    write_family(tmp_path / "hf", "llama")
    convert("hf-to-megatron", tmp_path / "hf", tmp_path / "m")
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "back", "--max-shard-size", size)
    sizes = [
        sum(t.nbytes for t in load_file(file).values()) for file in (tmp_path / "back").glob("*.safetensors")
    ]
    assert len(sizes) > 1 and max(sizes) <= limit


# --- names of tensors ------------------------------------------------------------------------------------------------


def _renamed(change: Callable[[str], str]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return edit


def _bare(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]
    _renamed(lambda name: name.removeprefix("model."))(tensors)


NAMES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "of the bare decoder": (_bare, r"the decoder without a head, as AutoModel saves it.*AutoModelForCausalLM"),
    "of peft": (
        _renamed(lambda n: f"base_model.model.{n}"),
        r"prefix 'base_model\.model\.model\.' instead of 'model\.'.*merge the adapter",
    ),
    "of a wrapper around a part": (
        _renamed(lambda n: n if "lm_head" in n else f"module.{n}"),
        r"prefix 'module\.model\.' instead of 'model\.'.*that part alone",
    ),
    "of another model's part": (_renamed(lambda n: f"language_model.{n}"), r"save_pretrained that part alone"),
    "of Megatron": (
        _renamed(lambda n: n.replace("model.embed_tokens", "module.embedding.word_embeddings")),
        r"Megatron's, as NeMo keeps them \(module\.embedding\.word_embeddings\.weight\)",
    ),
}  # fmt: skip
READ: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "module.": ("llama", _renamed(lambda n: f"module.{n}")),
    "_orig_mod.": ("llama", _renamed(lambda n: f"_orig_mod.{n}")),
    "module._orig_mod.": ("llama", _renamed(lambda n: f"module._orig_mod.{n}")),
    "doubled model.": ("llama", _renamed(lambda n: f"model.{n}")),
    "without model.": ("llama", _renamed(lambda n: n.removeprefix("model."))),
    "of a tied bare decoder": ("qwen2_tied", _renamed(lambda n: n.removeprefix("model."))),
}


@pytest.mark.parametrize("names", READ)
def test_a_prefix_that_all_tensors_have_is_left_out(tmp_path: Path, names: str) -> None:
    family, change = READ[names]
    write_family(tmp_path / "hf", family, num_hidden_layers=1)
    want = load_file(tmp_path / "hf" / SINGLE)
    edit_hf(tmp_path / "hf", change)
    assert "they are read as if they had that" in " ".join(
        convert("hf-to-megatron", tmp_path / "hf", tmp_path / "m").split()
    )
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "back")
    got = load_file(tmp_path / "back" / SINGLE)
    assert got.keys() == want.keys() and all(torch.equal(got[n], t) for n, t in want.items())


@pytest.mark.parametrize("names", NAMES)
def test_names_of_another_program_are_one_sentence(models: Path, tmp_path: Path, names: str) -> None:
    change, message = NAMES[names]
    folder = Path(shutil.copytree(models / "language", tmp_path / "hf"))
    edit_hf(folder, change)
    with pytest.raises(ModelFolderError, match=message) as refused:
        convert("hf-to-megatron", folder, tmp_path / "m")
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def _head(**tensors: tuple[int, ...]) -> Callable[[Tensors], None]:
    """Another head instead of `score`; dots are written as two underscores."""

    def edit(stored: Tensors) -> None:
        del stored["score.weight"]
        stored.update({name.replace("__", "."): torch.ones(shape) for name, shape in tensors.items()})

    return edit


HEADS = {
    "two layers": (
        _head(score__0__weight=(64, 64), score__0__bias=(64,), score__2__weight=(1, 64)),
        "Heads of several layers or labels have no place",
    ),
    "many labels": (_head(regression_layer__weight=(19, 64)), "the head is regression_layer.weight (19, 64)"),
    "one row": (_head(reward_out__weight=(1, 64)), 'set "value_head_prefix": "reward_out" in config.json'),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_not_known_is_named(models: Path, tmp_path: Path, head: str) -> None:
    change, message = HEADS[head]
    folder = Path(shutil.copytree(models / "reward", tmp_path / "hf"))
    edit_hf(folder, change)
    for options in ((), ("--head", "scalar")):
        said = _refusal("hf-to-megatron", folder, tmp_path / "m", *options)
        assert message in said and "missing" not in said


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("reward_out", {"value_head_prefix": "reward_out"}),  # as is said above
        ("score.0", {}),
        ("regression_head", {}),
    ],
)
def test_a_head_of_one_row_is_read(models: Path, tmp_path: Path, name: str, keys: dict[str, str]) -> None:
    folder = Path(shutil.copytree(models / "reward", tmp_path / "hf"))
    want = load_file(folder / SINGLE)["score.weight"]
    edit_hf(folder, lambda tensors: tensors.update({f"{name}.weight": tensors.pop("score.weight")}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    convert("hf-to-megatron", folder, tmp_path / "m")
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / SINGLE)["score.weight"], want)


def test_a_family_that_is_not_known_is_said_before_its_quantisation(tmp_path: Path) -> None:
    (tmp_path / "gpt-oss").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "gpt-oss" / SINGLE)
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "gpt-oss/config.json").write_text(json.dumps(config))
    said = _refusal("hf-to-megatron", tmp_path / "gpt-oss", tmp_path / "m")
    assert "model_type is 'gpt_oss'; supported are" in said and "unquantised" not in said
