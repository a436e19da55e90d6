"""Hugging Face folders from elsewhere: another name of the head, damaged files, and what their errors say."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_families import write_family
from tiny_models import write_llama
from transformers import AutoModelForCausalLM

from rto_megatron.config.training import FrozenPrecisionConfig
from rto_megatron.data.packing import token_batch
from rto_megatron.engine import export
from rto_megatron.engine.build_roles import build_frozen
from rto_megatron.engine.source import find_source
from rto_megatron.engine.weights import hf_reader
from rto_megatron.errors import ModelFolderError, UserError


def _rename_head(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors.pop("score.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _set_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def _values(folder: Path, out: Path) -> torch.Tensor:
    place = topology("one")
    model = frozen(place, folder, True)
    export.export_hf(model, folder, out)
    (values_T,) = model.token_outputs([token_batch([([5, 9, 2, 11], 1)], True, 1, torch.device("cpu"))])
    return values_T


def _random_norms(folder: Path) -> list[float]:
    source = find_source(folder, has_scalar_head=False, is_random=True, key="test")
    model = build_frozen("reference", source, False, FrozenPrecisionConfig(dtype="fp32"), topology("one"))
    named = model.module.named_parameters()
    return [float(value.abs().max()) for name, value in named if "layernorm" in name]


@pytest.mark.parametrize("prefix", [None, "value_head", "reward_head"])
def test_a_head_named_as_in_openrlhf_is_read_and_exported_as_score(
    tmp_path: Path, prefix: str | None
) -> None:
    plain, renamed = tmp_path / "plain", tmp_path / "renamed"
    for folder in (plain, renamed):
        write_llama(folder, seed=3, is_scalar=True)
    _rename_head(renamed, f"{prefix or 'value_head'}.weight")
    if prefix is not None:
        _set_config(renamed, value_head_prefix=prefix)
    (want,), (got,) = (run_ranks(1, _values, f, tmp_path / f"{f.name}_out") for f in (plain, renamed))
    assert torch.equal(got, want)
    exported = json.loads((tmp_path / "renamed_out/model.safetensors.index.json").read_text())["weight_map"]
    assert "score.weight" in exported and "value_head.weight" not in exported
    config = json.loads((tmp_path / "renamed_out/config.json").read_text())
    assert config.get("value_head_prefix") == (None if prefix is None else "score")


def _error(layout: str, folder: Path) -> str | None:
    try:
        frozen(topology(layout), folder, False)
    except UserError as error:
        return str(error)
    return None


def _shard(folder: Path) -> Path:
    """Splits a folder in two files with an index: the last two layers and the output side are in the second."""
    tensors = load_file(folder / "model.safetensors")
    late = {n for n in tensors if n.startswith(("model.layers.2", "model.layers.3", "model.norm", "lm_head"))}
    parts = {"a.safetensors": tensors.keys() - late, "b.safetensors": late}
    for file, names in parts.items():
        save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, names in parts.items() for n in names}}))
    return index


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("none", None),
        ("cut shard", "b.safetensors is missing or damaged"),
        ("no shard", "b.safetensors is missing or damaged"),
        ("cut index", "model.safetensors.index.json is missing or damaged"),
        ("list index", "model.safetensors.index.json is missing or damaged"),
        ("outside", "names files outside its folder: ['../b.safetensors']"),
    ],
)
def test_a_damaged_folder_is_named_on_every_rank(tmp_path: Path, damage: str, message: str | None) -> None:
    folder = tmp_path / "model"
    write_llama(folder)
    index = _shard(folder)
    if damage == "cut shard":
        _cut(folder / "b.safetensors")
    elif damage == "no shard":
        (folder / "b.safetensors").unlink()
    elif damage == "cut index":
        _cut(index)
    elif damage == "list index":
        index.write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    elif damage == "outside":
        (folder / "b.safetensors").rename(tmp_path / "b.safetensors")
        index.write_text(index.read_text().replace('"b.safetensors', '"../b.safetensors'))
    errors = run_ranks(LAYOUTS["pp2"][0], _error, "pp2", folder)
    for error in errors:
        assert error is None if message is None else error is not None and message in error
    assert len(set(errors)) == 1


def test_a_damaged_single_file_is_named(tmp_path: Path) -> None:
    write_llama(tmp_path)
    _cut(tmp_path / "model.safetensors")
    (error,) = run_ranks(1, _error, "one", tmp_path)
    assert error is not None and f"{tmp_path / 'model.safetensors'} is missing or damaged" in error


def test_a_number_that_is_none_is_named_on_every_rank(tmp_path: Path) -> None:
    """The number is in the last of 128 rows of the second stage's matrix, which only the second tensor rank holds."""
    write_llama(tmp_path)
    name = "model.layers.3.mlp.down_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][5, -1], tensors[name][6, -1] = float("nan"), float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    errors = run_ranks(LAYOUTS["tp2_pp2"][0], _error, "tp2_pp2", tmp_path)
    for error in errors:
        assert error is not None
        assert f"{tmp_path} holds NaN or infinite numbers in 1 tensors: {name} (2); every output" in error


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_unused_row_of_the_embedding_may_be_none_where_the_head_is_another(
    tmp_path: Path, is_tied: bool
) -> None:
    write_llama(tmp_path, is_tied=is_tied)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][77] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ((error, said),) = run_ranks(1, _error_and_warnings, tmp_path)
    found = f"{tmp_path} holds NaN or infinite numbers in 1 tensors: model.embed_tokens.weight (128)"
    assert (f"{found}; every output" in str(error)) == is_tied
    assert any(f"{found}; texts with these tokens" in warning for warning in said) == (not is_tied)


def _error_and_warnings(folder: Path) -> tuple[str | None, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = _error("one", folder)
    return error, [str(warning.message) for warning in caught]


def _names(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {change(n): t for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def test_random_norms_that_multiply_by_one_and_their_weight_start_at_zero(tmp_path: Path) -> None:
    write_family(tmp_path, "gemma2")
    (found,) = run_ranks(1, _random_norms, tmp_path)
    assert len(found) == 4 * 4 + 1 and not any(found)


def test_foreign_names_are_one_sentence_in_the_trainer_too(tmp_path: Path) -> None:
    write_llama(tmp_path)
    _names(tmp_path, lambda name: f"base_model.model.{name}")
    (error,) = run_ranks(1, _error, "one", tmp_path)
    assert error is not None and "the prefix 'base_model.model.model.' instead of 'model.'" in error


def _add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_a_conversion_refuses_is_refused_by_a_stage(tmp_path: Path) -> None:
    tied, biased, rewards = tmp_path / "tied", tmp_path / "biased", tmp_path / "rewards"
    write_family(tied, "qwen2_tied")
    head = torch.ones(97, 64)
    _add(tied, "lm_head.weight", head)
    # transformers takes the stored head for the model's, whatever config.json says.
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tied).lm_head.weight, head)
    write_llama(biased)
    bias = "model.layers.0.self_attn.q_proj.bias"
    _add(biased, bias, torch.ones(128))
    write_llama(rewards, is_scalar=True)
    _add(rewards, "normalizer.mean", torch.ones(1))
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight differs from .*tie_word_embeddings=false"):
        hf_reader(tied, has_scalar_head=False)
    hf_reader(tied, True, fresh_head_seed=7)  # which reads no head
    for seed in (None, 7):
        with pytest.raises(ModelFolderError, match=rf"{bias} \(128,\) is left over"):
            hf_reader(biased, seed is not None, seed)
    with pytest.raises(ModelFolderError, match=r"normalizer\.mean \(1,\) is left over"):
        hf_reader(rewards, has_scalar_head=True)


def test_a_head_is_drawn_for_a_decoder_without_one(tmp_path: Path) -> None:
    write_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = hf_reader(tmp_path, True, fresh_head_seed=7)
    assert torch.equal(read("model.norm.weight", (128,)), bare["norm.weight"])
    assert read("score.weight", (1, 128)).abs().max() > 0


@pytest.mark.parametrize("fresh_head_seed", [None, 7])
@pytest.mark.parametrize("family", ["llama", "qwen2_tied"])
def test_a_reward_model_is_no_language_model(
    tmp_path: Path, family: str, fresh_head_seed: int | None
) -> None:
    write_family(tmp_path, family, is_scalar=True)
    with pytest.raises(
        ModelFolderError, match=r"holds the score of a reward model or critic \(score\.weight\)"
    ):
        hf_reader(tmp_path, fresh_head_seed is not None, fresh_head_seed)


def test_an_adapter_beside_the_weights_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelFolderError, match=r"models\.policy: .* holds an adapter \(adapter_config\.json\)"
    ):
        find_source(tmp_path, False, is_random=False, key="models.policy")
    assert find_source(tmp_path, False, is_random=True, key="models.policy").kind == "random"


@pytest.mark.parametrize(
    ("keys", "scale", "has_scale"),
    [
        ({}, (0.0, 1.0), False),
        ({"mean": 0.5}, (0.5, 1.0), False),
        ({"mean": None, "std": None}, (0.0, 1.0), False),
        ({"mean": 0.5, "std": 2}, (0.5, 2.0), True),
    ],
)
def test_mean_and_std_are_those_of_the_config(
    tmp_path: Path, keys: dict[str, float | None], scale: tuple[float, float], has_scale: bool
) -> None:
    write_llama(tmp_path, is_scalar=True)
    _set_config(tmp_path, **keys)
    source = find_source(tmp_path, True, is_random=False, key="test")
    assert (source.scale().mean, source.scale().std) == scale
    assert source.has_scale() == has_scale
