"""What Megatron-LM saves of unusual models is read as it is meant, or refused by name."""

import json
from pathlib import Path

import pytest
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
    fill_with_nan,
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
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_families import write_family
from torch import Tensor

from rto_megatron.convert.conversion import Proofs, convert_to_hf, convert_to_megatron, silent
from rto_megatron.convert.conversion_options import Options
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.errors import ModelFolderError


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
    require_near([{name: converted_distance(root / name, None, found, name, tmp_path / "hf")}])


def test_gate_and_up_in_entries_of_their_own_are_refused_by_name(
    odd: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """What metadata={"singleton_local_shards": True} makes, which no option of Megatron-LM 0.19.2 asks for."""
    source = open_megatron(odd[0] / "halves", None, None)
    with pytest.raises(ModelFolderError, match=r"experts\.linear_fc1\.weight is missing"):
        convert_to_hf(source, tmp_path / "hf", OPTIONS, Proofs(False, None), silent, dry_run=False)


def test_bfloat16_weights_stay_as_they_are(odd: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    root, found = odd
    require_near([{"bf16": converted_distance(root / "bf16", None, found, "bf16", tmp_path / "hf")}])
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
        return {"scalar": distance(outputs(stock, TOKENS_BS), found["scalar"])}

    require_near(run_ranks(1, load))


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
