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
    save_with_own_keys,
    start,
    train_and_save,
    validated,
)
from megatron.core import dist_checkpointing
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_families import write_family
from torch import Tensor
from transformers import AutoModelForCausalLM

from rto_megatron.convert.conversion import Proofs, convert_to_hf, convert_to_megatron, silent
from rto_megatron.convert.conversion_options import Options
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.megatron_tensors import MegatronTensors

TOKENS_BS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = Options(None, 20_000, None)
TOLERANCE = 1e-4
SCALAR = "llama scalar"
SPARSE = tuple(name for name, flags in FLAGS.items() if "--num-experts" in flags)
VOCAB_SIZE = 97


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


def _distance(found: Tensor | None, expected: Tensor) -> float:
    """Largest difference over the real vocabulary; 0 on ranks that hold no output. NaN anywhere is infinitely far."""
    if found is None:
        return 0.0
    difference = (found.float()[..., : expected.shape[-1]] - expected).abs().max()
    return float(difference.nan_to_num(float("inf"))) + (
        0.0 if bool(found.isfinite().all()) else float("inf")
    )


def _require_near(differences: list[dict[str, float]]) -> None:
    worst = {name: max(of_rank[name] for of_rank in differences) for name in differences[0]}
    print({name: f"{difference:.1e}" for name, difference in worst.items()})
    assert worst
    assert {name: d for name, d in worst.items() if not d < TOLERANCE} == {}


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
            differences[name] = _distance(found, model.expected)
            if found is not None and name != SCALAR:
                assert not found[..., model.vocab_size :].any(), "padding rows are zero"
        return differences

    _require_near(run_ranks(place.num_ranks, load_all))


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
            differences[name] = _distance(outputs(stock, TOKENS_BS), model.expected)
            typed = f"{FLAGS[name]} --vocab-size {model.vocab_size} --max-position-embeddings {seq_length}"
            _require_same_arguments(
                saved, validated(parsed(f"{typed} --seq-length {seq_length}", LAYOUTS["one"]))
            )
        return differences

    _require_near(run_ranks(place.num_ranks, load_all))


def _require_same_arguments(saved: argparse.Namespace, typed: argparse.Namespace) -> None:
    theirs = vars(typed)
    assert vars(saved).keys() - theirs.keys() == NOT_OF_THIS_VERSION
    differing = {
        name: (value, theirs[name])
        for name, value in vars(saved).items()
        if name in theirs.keys() - OF_A_RUN and value != theirs[name]
    }
    assert differing == {}


def _check_conversion(
    tree: Path, hf_files: Path | None, expected: dict[str, Tensor], name: str, target: Path
) -> float:
    source = open_megatron(tree, hf_files, None)
    convert_to_hf(source, target, OPTIONS, Proofs(digest=True, logits=None), silent, dry_run=False)
    model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager", dtype=torch.float32)
    assert model.config.vocab_size == VOCAB_SIZE
    with torch.no_grad():
        return _distance(expected[name], model(TOKENS_BS).logits)


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
        differences[f"{name} by its arguments"] = _check_conversion(
            tmp_path / name, None, found, name, tmp_path / f"{name}_args"
        )
        if layout == "tp2_pp2":
            described = tmp_path / f"{name}_described"
            write_family(described, name, vocab_size=VOCAB_SIZE)
            differences[f"{name} by config.json"] = _check_conversion(
                tmp_path / name / "iter_0000007", described, found, name, tmp_path / f"{name}_config"
            )
    _require_near([differences])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Checkpoints of one rank: unusual keys, bfloat16, a reward model, and models without a family."""
    root = tmp_path_factory.mktemp("odd")
    gpt2 = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256"
    sigmoid = f"{FLAGS['qwen3_moe']} --moe-router-score-function sigmoid --moe-router-topk-scaling-factor 2.5"

    def save_all() -> dict[str, Tensor | None]:
        start(LAYOUTS["one"])
        found = {}
        for name, flags in {
            "halves": FLAGS["qwen2_moe"],
            "every second layer": f"{FLAGS['qwen3_moe']} --moe-layer-freq 2",
            "bf16": f"{FLAGS['llama']} --bf16",
            "scalar": FLAGS["llama"],
            "gpt2": gpt2,
            "sigmoid": sigmoid,
        }.items():
            args = validated(parsed(f"{flags} --vocab-size {VOCAB_SIZE}", LAYOUTS["one"]))
            stock = build(args)
            if name == "scalar":
                make_scalar(stock)
            randomise(stock)
            if name == "halves":
                save_with_own_keys(stock, args, root / name)
            else:
                train_and_save(stock, root / name, 7)
            found[name] = outputs(stock.float(), TOKENS_BS)
        return found

    return root, run_ranks(1, save_all)[0]


def test_experts_in_every_second_layer_read_back(odd: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    root, found = odd
    name = "every second layer"
    assert open_megatron(root / name, None, None).shape.experts.layers == (0, 2)
    _require_near([{name: _check_conversion(root / name, None, found, name, tmp_path / "hf")}])


def test_gate_and_up_in_entries_of_their_own_are_refused_by_name(
    odd: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """What metadata={"singleton_local_shards": True} makes, which no option of Megatron-LM 0.19.2 asks for."""
    source = open_megatron(odd[0] / "halves", None, None)
    with pytest.raises(ModelFolderError, match=r"experts\.linear_fc1\.weight is missing"):
        convert_to_hf(source, tmp_path / "hf", OPTIONS, Proofs(False, None), silent, dry_run=False)


def test_bfloat16_weights_stay_as_they_are(odd: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    root, found = odd
    _require_near([{"bf16": _check_conversion(root / "bf16", None, found, "bf16", tmp_path / "hf")}])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_reward_model_of_megatron_has_its_head_as_score(
    odd: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, found = odd
    source = open_megatron(root / "scalar", None, None)
    assert source.has_scalar_head
    convert_to_hf(source, tmp_path / "hf", Options(None, 10**9, None), Proofs(True, None), silent, False)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 64)
    assert "lm_head.weight" not in tensors
    assert open_megatron(root / "scalar", None, True).has_scalar_head
    with pytest.raises(
        ModelFolderError, match="holds a reward model or critic; --head asks for a language model"
    ):
        open_megatron(root / "scalar", None, False)
    # Back into Megatron's world: the values of every token.
    again = tmp_path / "again"
    convert_to_megatron(tmp_path / "hf", again, OPTIONS, Proofs(True, None), silent, False)

    def load() -> dict[str, float]:
        start(LAYOUTS["one"])
        stock = build(validated(parsed(f"{FLAGS['llama']} --vocab-size {VOCAB_SIZE}", LAYOUTS["one"])))
        make_scalar(stock)
        name_as_transformer_engine(stock)
        fill_with_nan(stock)
        load_pretrained(stock, again)
        return {"scalar": _distance(outputs(stock, TOKENS_BS), found["scalar"])}

    _require_near(run_ranks(1, load))


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


def test_model_that_no_family_holds_is_refused_with_every_reason(odd: tuple[Path, dict[str, Tensor]]) -> None:
    root, _ = odd
    with pytest.raises(ModelFolderError) as refused:
        open_megatron(root / "gpt2", None, None)
    for reason in (
        "normalization='LayerNorm' instead of 'RMSNorm'",
        "swiglu=False",
        "position_embedding_type='learned_absolute'",
        "add_bias_linear=True",
    ):
        assert reason in str(refused.value)


def test_router_that_no_family_has_is_refused_though_its_weights_fit(
    odd: tuple[Path, dict[str, Tensor]],
) -> None:
    root, _ = odd
    with pytest.raises(ModelFolderError) as refused:
        open_megatron(root / "sigmoid", None, None)
    assert "moe_router_score_function='sigmoid' instead of 'softmax'" in str(refused.value)
    assert "moe_router_topk_scaling_factor=2.5" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}, "rope_theta=9000.0, trained with 5000.0"),
        ({"rms_norm_eps": 1e-5}, "norm_eps=1e-05, trained with 1e-06"),
        ({"num_key_value_heads": 1}, "num_kv_heads=1, trained with 2"),
        ({"tie_word_embeddings": True}, "is_tied=True, trained with False"),
    ],
)  # fmt: skip
def test_config_that_contradicts_the_arguments_is_refused_by_name(
    changes: dict[str, object], reason: str, odd: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, _ = odd
    write_family(tmp_path, "llama", vocab_size=VOCAB_SIZE, **changes)
    with pytest.raises(ModelFolderError) as refused:
        open_megatron(root / "bf16", tmp_path, None)
    assert reason in str(refused.value)
    assert str(refused.value).count("trained with") == 1


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
