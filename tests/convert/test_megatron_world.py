"""Checkpoints between this program and Megatron-LM's own code, whose models must then compute the same.

Megatron-LM parses the command lines, builds the models, loads what was converted for it and saves what is converted
back; transformers computes the logits to compare with.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from convert.converted_outputs import (
    OPTIONS,
    TOKENS_BS,
    VOCAB_SIZE,
    converted_distance,
    distance,
    require_near,
)
from convert.stock_megatron import (
    FLAGS,
    LAYOUTS,
    build,
    checkpointing,
    fill_with_nan,
    gpt_config_from_args,
    load_pretrained,
    make_scalar,
    name_as_transformer_engine,
    outputs,
    parsed,
    randomise,
    start,
    train_and_save,
    validated,
)
from megatron.core import dist_checkpointing
from ranks import run_ranks
from tiny_families import write_family
from torch import Tensor

from rto_megatron.convert.conversion import Proofs, convert_to_megatron, silent
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.megatron_tensors import MegatronTensors

SCALAR = "llama scalar"
SPARSE = tuple(name for name, flags in FLAGS.items() if "--num-experts" in flags)


@dataclass(frozen=True)
class Converted:
    """A tiny Hugging Face model, the Megatron tree made of it, and its logits or values [B, S, ...]."""

    hf: Path
    megatron: Path
    vocab_size: int
    expected: Tensor


def _flags_of(name: str) -> str:
    return FLAGS[name.split(maxsplit=1)[0]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """Every family, and a reward model."""
    root = tmp_path_factory.mktemp("converted")
    models = {}
    for name in (*FLAGS, SCALAR):
        hf, megatron = root / name / "hf", root / name / "megatron"
        model = write_family(hf, name.split()[0], is_scalar=name == SCALAR)
        with torch.no_grad():
            hidden = model.model(TOKENS_BS).last_hidden_state
            expected = (model.score if name == SCALAR else model.lm_head)(hidden)
        convert_to_megatron(hf, megatron, OPTIONS, Proofs(digest=False, logits=None), silent, dry_run=False)
        models[name] = Converted(hf, megatron, model.config.vocab_size, expected)
    return models


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.slow), "tp2_pp2", "ep2"])
def test_what_we_write_loads_in_megatron(layout: str, converted: dict[str, Converted]) -> None:
    """With Megatron's default strictness, which refuses a missing parameter or extra state."""
    place = LAYOUTS[layout]

    def load_all() -> dict[str, float]:
        start(place)
        differences = {}
        for name, model in converted.items():
            if place.expert > 1 and name not in SPARSE:
                continue
            args = validated(parsed(f"{_flags_of(name)} --vocab-size {model.vocab_size}", place))
            assert args.padded_vocab_size == 128 * place.tensor
            stock = build(args)
            if name == SCALAR:
                make_scalar(stock)
            name_as_transformer_engine(stock)
            fill_with_nan(stock)
            wanted = {"model": stock.sharded_state_dict()}
            stock.load_state_dict(dist_checkpointing.load(wanted, str(model.megatron / "release"))["model"])
            found = outputs(stock, TOKENS_BS)
            differences[name] = distance(found, model.expected)
            if found is not None and name != SCALAR:
                assert not found[..., model.vocab_size :].any(), "padding rows are zero"
        return differences

    require_near(run_ranks(place.num_ranks, load_all))


# What load_args_from_checkpoint of 0.19.2 leaves to the command line.
NOT_TAKEN = ("--qk-layernorm", "--moe-shared-expert-gate", "--use-rope-scaling", "--rope-scaling-factor 32")
# Older versions' names of arguments, and the state of a run.
NOT_OF_THIS_VERSION = {"norm_epsilon", "apply_layernorm_1p", "iteration"}
# No property of a model; position_embedding_type decides about positions.
OF_A_RUN = {"tokenizer_type", "use_rotary_position_embeddings"}


@pytest.mark.parametrize(
    ("layout", "flags"),
    [pytest.param("one", "", marks=pytest.mark.slow), ("tp2", "--finetune --no-load-optim --no-load-rng")],
)
def test_megatron_lm_loads_what_we_write_with_the_arguments_in_it(
    layout: str, flags: str, converted: dict[str, Converted]
) -> None:
    """`--use-checkpoint-args` and load_checkpoint, as a release and as a model to fine-tune."""
    place = LAYOUTS[layout]

    def load_all() -> dict[str, float]:
        start(place)
        differences = {}
        for name in FLAGS:
            model = converted[name]
            kept = " ".join(flag for flag in NOT_TAKEN if flag in FLAGS[name])
            seq_length = json.loads((model.hf / "config.json").read_text())["max_position_embeddings"]
            args = parsed(
                f"{flags} {kept} --norm-epsilon 1e-6 --load {model.megatron} --vocab-size {model.vocab_size} "
                f"--max-position-embeddings {seq_length} --no-use-tokenizer-model-from-checkpoint-args",
                place,
            )
            args, saved = checkpointing.load_args_from_checkpoint(args)
            stock = build(validated(args))
            name_as_transformer_engine(stock)
            fill_with_nan(stock)
            assert load_pretrained(stock, model.megatron) == 0
            differences[name] = distance(outputs(stock, TOKENS_BS), model.expected)
            typed = f"{FLAGS[name]} --vocab-size {model.vocab_size} --max-position-embeddings {seq_length}"
            _require_same_arguments(
                saved, validated(parsed(f"{typed} --seq-length {seq_length}", LAYOUTS["one"]))
            )
        return differences

    require_near(run_ranks(place.num_ranks, load_all))


def _require_same_arguments(saved: argparse.Namespace, typed: argparse.Namespace) -> None:
    theirs = vars(typed)
    assert vars(saved).keys() - theirs.keys() == NOT_OF_THIS_VERSION
    differing = {
        name: (value, theirs[name])
        for name, value in vars(saved).items()
        if name in theirs.keys() - OF_A_RUN and value != theirs[name]
    }
    assert differing == {}


# layout -> (models, flags, whether keys are those of TransformerEngine or of Megatron's local layers)
TRAINED: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "tp2": (tuple(FLAGS), "--use-distributed-optimizer", False),
    "pp2": (tuple(FLAGS), "", True),
    "tp2_pp2": (("llama3_tied", "qwen2_moe", "qwen3_moe_mixed"), "", False),
    "ep2": (SPARSE, "", True),
}


@pytest.mark.parametrize(
    "layout", ["tp2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("pp2", "tp2_pp2")), "ep2"]
)
def test_what_megatron_lm_trained_reads_back(layout: str, tmp_path: Path) -> None:
    """Weights, Adam's state, 800 arguments with enums among them, and random states, by save_checkpoint."""
    names, flags, is_named_as_te = TRAINED[layout]
    place = LAYOUTS[layout]

    def train_all() -> dict[str, Tensor | None]:
        start(place)
        found = {}
        for name in names:
            args = validated(parsed(f"{FLAGS[name]} --vocab-size {VOCAB_SIZE} {flags}", place))
            stock = build(args)
            randomise(stock)
            if is_named_as_te:
                name_as_transformer_engine(stock)
            train_and_save(stock, tmp_path / name, 7)
            found[name] = outputs(stock, TOKENS_BS)
        return found

    found = run_ranks(place.num_ranks, train_all)[-1]
    differences = {}
    for name in names:
        assert (tmp_path / name / "iter_0000007").is_dir()
        assert found[name][..., VOCAB_SIZE:].any(), "padding rows are not zero"
        differences[f"{name} by its arguments"] = converted_distance(
            tmp_path / name, None, found, name, tmp_path / f"{name}_args"
        )
        if layout == "tp2_pp2":
            described = tmp_path / f"{name}_described"
            write_family(described, name, vocab_size=VOCAB_SIZE)
            differences[f"{name} by config.json"] = converted_distance(
                tmp_path / name / "iter_0000007", described, found, name, tmp_path / f"{name}_config"
            )
    require_near([differences])


def test_language_model_never_becomes_a_reward_model(converted: dict[str, Converted]) -> None:
    tree = converted["llama"].megatron
    with pytest.raises(
        ModelFolderError, match="holds a language model; --head asks for a reward model or critic"
    ):
        open_megatron(tree, None, True)
    source = open_megatron(tree, None, None)
    with pytest.raises(
        ModelFolderError, match=r"output_layer.weight .* head of a language model.* never takes a row"
    ):
        MegatronTensors(source.reader, source.shape, has_scalar_head=True)


def test_rope_base_that_is_no_whole_number_survives(tmp_path: Path) -> None:
    write_family(tmp_path / "hf", "mistral")
    convert_to_megatron(tmp_path / "hf", tmp_path / "m", OPTIONS, Proofs(False, None), silent, dry_run=False)
    shutil.rmtree(tmp_path / "m" / "hf")
    assert open_megatron(tmp_path / "m", None, None).shape.rope_theta == 50.5


def _as_legacy(tree: Path) -> None:
    folder = tree / "release" / "mp_rank_00"
    shutil.rmtree(tree / "release")
    folder.mkdir(parents=True)
    torch.save({"model": {}}, folder / "model_optim_rng.pt")


def _unfinished(tree: Path) -> None:
    (tree / "release" / "metadata.json").unlink()


def _names_a_missing_iteration(tree: Path) -> None:
    (tree / "latest_checkpointed_iteration.txt").write_text("12")


def _of_another_format(tree: Path) -> None:
    (tree / "release" / "metadata.json").write_text(
        '{"sharded_backend": "zarr", "sharded_backend_version": 1}'
    )


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_as_legacy, "legacy format.*--ckpt-format torch_dist"),
        (_unfinished, "no metadata.json.*save did not end"),
        (_names_a_missing_iteration, "iter_0000012, which is not there"),
        (_of_another_format, "'zarr'; expected torch_dist"),
    ],
)
def test_tree_that_cannot_be_read_says_why(
    break_it: Callable[[Path], None], reason: str, converted: dict[str, Converted], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(converted["qwen2"].megatron, tree)
    break_it(tree)
    with pytest.raises(ModelFolderError, match=reason):
        open_megatron(tree, None, None)


def test_stock_megatron_parses_the_rope_factor_and_drops_it() -> None:
    """docs/checkpoints.md names the line to add; once this fails, it and the line in `stock_megatron.build` can go."""

    def factors() -> tuple[float, float]:
        start(LAYOUTS["one"])
        args = validated(parsed(f"{FLAGS['llama3_tied']} --vocab-size {VOCAB_SIZE}", LAYOUTS["one"]))
        return args.rope_scaling_factor, gpt_config_from_args(args).rope_scaling_factor

    assert run_ranks(1, factors) == [(32.0, 8.0)]
