"""What config.json of each family may say: the traps of two transformers versions, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_families import COMMON, VARIANTS, configuration_of, write_family
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_megatron.config.training import GridConfig
from rto_megatron.errors import ModelFolderError
from rto_megatron.models.config_files import config_of, read_shape
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.layout_checks import check_layout
from rto_megatron.models.parameters import num_parameters, parameter_map

WINDOWED = ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"]
_LONGROPE = {"type": "su", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
TOKENS = torch.tensor([[5, 9, 2, 11, 60, 1, 33, 8]])


def _written(folder: Path, config: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _config(folder: Path, name: str, *absent: str, **changes: object) -> Path:
    """A config.json as transformers 5 writes it, with changes and without the keys in `absent`."""
    values = AutoConfig.for_model(**configuration_of(name)).to_dict()
    return _written(folder, {**{k: v for k, v in values.items() if k not in absent}, **changes})


def test_every_family_has_a_tiny_variant_of_its_name() -> None:
    assert FAMILIES.keys() == {n for n, changes in VARIANTS.items() if changes["model_type"] == n}


@pytest.mark.parametrize("is_scalar", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_written_config_gives_the_shape_and_transformers_model_back(
    name: str, is_scalar: bool, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    model = write_family(tmp_path / "theirs", name, is_scalar)
    shape = read_shape(tmp_path / "theirs")
    config = config_of(shape, is_scalar, "float32")
    assert read_shape(_written(tmp_path / "ours", config)) == shape
    shutil.copy(tmp_path / "theirs/model.safetensors", tmp_path / "ours")
    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    again = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(again) is type(model)
    hidden = [m.model(TOKENS).last_hidden_state for m in (model, again)]
    assert torch.equal(*hidden)


def test_layers_with_experts_follow_transformers(tmp_path: Path) -> None:
    for name, step, dense in [("qwen2_moe", 2, []), ("qwen3_moe", 2, [3]), ("qwen3_moe", 1, [0, 1])]:
        write_family(tmp_path, name, decoder_sparse_step=step, mlp_only_layers=dense)
        with safe_open(tmp_path / "model.safetensors", "pt") as opened:
            stored = set(opened.keys())
        shape = read_shape(tmp_path)
        assert {n for p in parameter_map(shape, False) for n in p.hf} == stored
        assert shape.experts is not None and not shape.is_uniform
        assert read_shape(_written(tmp_path, config_of(shape, False, "float32"))) == shape


@pytest.mark.parametrize("name", VARIANTS)
def test_rope_of_transformers_4_and_5_is_the_same(name: str, tmp_path: Path) -> None:
    new = read_shape(_config(tmp_path, name))
    rope = dict(VARIANTS[name].get("rope_parameters", COMMON["rope_parameters"]))
    local = {}
    if "full_attention" in rope:
        local = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = dict(rope["full_attention"])
    theta = rope.pop("rope_theta")
    scaling = None if rope == {"rope_type": "default"} else rope
    old = _config(tmp_path, name, "rope_parameters", rope_theta=theta, rope_scaling=scaling, **local)
    assert read_shape(old) == new
    assert new.rope_theta == theta


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_transformers_meaning(name: str, tmp_path: Path) -> None:
    absent = ("rope_parameters", "tie_word_embeddings", "norm_topk_prob", "decoder_sparse_step")
    shape = read_shape(_config(tmp_path, name, *absent))
    theirs = AutoConfig.from_pretrained(tmp_path)
    rope = theirs.rope_parameters
    assert shape.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert shape.is_tied == theirs.tie_word_embeddings
    if shape.experts is not None and name != "mixtral":
        assert shape.experts.is_normalized == theirs.norm_topk_prob


def test_the_number_of_experts_has_two_names(tmp_path: Path) -> None:
    new = read_shape(_config(tmp_path, "qwen3_moe"))
    assert "num_local_experts" in json.loads((tmp_path / "config.json").read_text())
    assert read_shape(_config(tmp_path, "qwen3_moe", "num_local_experts", num_experts=4)) == new
    with pytest.raises(ModelFolderError, match="has no num_experts;"):
        read_shape(_config(tmp_path, "qwen3_moe", "num_local_experts"))


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "qwen2", "qwen2_moe"])
def test_a_null_head_dimension_is_hidden_size_over_heads(name: str, tmp_path: Path) -> None:
    assert read_shape(_config(tmp_path, name, head_dim=None)).head_dim == 16


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_keys_are_named_all_at_once(name: str, tmp_path: Path) -> None:
    own = FAMILIES[name].required
    folder = _config(tmp_path, name, "hidden_size", "rms_norm_eps", *own)
    with pytest.raises(ModelFolderError) as caught:
        read_shape(folder)
    assert f"has no {', '.join(('hidden_size', 'rms_norm_eps', *own))}; expected" in str(caught.value)


def test_a_window_counts_where_it_cuts(tmp_path: Path) -> None:
    read_shape(_config(tmp_path, "mistral", sliding_window=None))
    read_shape(_config(tmp_path, "mistral", sliding_window=256))
    with pytest.raises(ModelFolderError, match="sliding_window=255 is below max_position_embeddings=256"):
        read_shape(_config(tmp_path, "mistral", sliding_window=255))
    # Absent is transformers' default for Mistral, which cuts in a model of 8192 positions.
    with pytest.raises(ModelFolderError, match="sliding_window=4096 is below"):
        read_shape(_config(tmp_path, "mistral", "sliding_window", max_position_embeddings=8192))


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_of_qwen_counts_only_when_it_is_used(name: str, tmp_path: Path) -> None:
    plain = read_shape(_config(tmp_path, name))
    unused = {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2}
    assert read_shape(_config(tmp_path, name, "layer_types", **unused)) == plain
    for used in (
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 4},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
    ):
        with pytest.raises(ModelFolderError, match="sliding_window=32 is below"):
            read_shape(_config(tmp_path, name, "layer_types", **{"sliding_window": 32, **used}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, "softmax over one chosen expert"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "softmax over one chosen expert"),
        ("qwen2_moe_normalized", {"num_experts_per_tok": 1}, "softmax over one chosen expert"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts"),
        ("qwen2_moe", {"decoder_sparse_step": 5}, "no layer has experts"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is false"),
        ("qwen3", {"attention_bias": True}, r"\['attention_bias'\] is set"),
        ("qwen3", {"head_dim": None}, "has no head_dim"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "factor=0.5"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "one for each kind of layer"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, r"found \['mscale'\]"),
        ("qwen2", {"rope_scaling": {"type": "yarn"}}, "found no factor"),
        ("mistral", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling .*yarn.* cannot be"),
        ("smollm3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "this family has no scaling"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
        ("olmo2", {"attention_bias": True}, r"\['attention_bias'\] is set"),
        ("granite", {"mlp_bias": True}, r"\['mlp_bias'\] is set"),
        ("gemma2", {"use_bidirectional_attention": True}, r"\['use_bidirectional_attention'\] is set"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("gemma2", {"sliding_window": None}, "sliding_window is null"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "only the others'",
        ),
        ("seed_oss", {"attention_out_bias": True}, r"\['attention_out_bias'\] is set"),
        (
            "phi3_longrope",
            {"partial_rotary_factor": 0.5, "rope_scaling": _LONGROPE},
            "has 6 short and 6 long factors",
        ),
        (
            "phi3_longrope",
            {"rope_scaling": {**_LONGROPE, "attention_factor": 1.2}},
            r"\['attention_factor'\] of rope",
        ),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "this family has longrope"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "sigmoid scores"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "every layer after the first dense"),
    ],
)
def test_what_megatron_cannot_express_is_refused(
    name: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFolderError, match=message) as caught:
        read_shape(_config(tmp_path, name, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_longrope_is_read_up_to_the_positions_of_pretraining(tmp_path: Path) -> None:
    shape = read_shape(_config(tmp_path, "phi3_longrope", max_position_embeddings=128))
    assert shape.max_positions == 64
    assert config_of(shape, False, "float32")["max_position_embeddings"] == 128
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
    assert shape.rotation.longrope is not None
    assert shape.rotation.longrope.amplitude == pytest.approx(theirs.attention_scaling)


def test_one_expert_a_token_without_normalisation_is_accepted(tmp_path: Path) -> None:
    experts = read_shape(_config(tmp_path, "qwen2_moe", num_experts_per_tok=1)).experts
    assert experts is not None and experts.per_token == 1


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("gemma", "of Gemma, 2 and the text models of 3"),
        ("gemma3", "a vision tower.*Gemma3ForCausalLM, model_type gemma3_text"),
    ],
)
def test_the_other_gemmas_are_refused(model_type: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=f"model_type is '{model_type}': .*{said}"):
        read_shape(_written(tmp_path, {"model_type": model_type}))


def test_deepseek_is_read_and_not_built(tmp_path: Path) -> None:
    shape = read_shape(_config(tmp_path, "deepseek_v3"))
    assert shape.latent is not None and shape.head_dim == 24
    assert shape.experts is not None and shape.experts.layers == (1, 2, 3)
    assert shape.experts.shared_ffn_hidden_size == 96
    (problem,) = check_layout(shape, GridConfig(tensor=3, pipeline=3), "models.policy")
    assert problem.startswith("models.policy: no deepseek_v3 model can be built here: multi-head latent")
    yarn = {"rope_type": "yarn", "factor": 40.0, "rope_theta": 1e4}
    assert read_shape(_config(tmp_path, "deepseek_v3", rope_parameters=yarn)).rope_scaling_factor is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", "an expert's intermediate size=96; it can be one of [1, 2, 4, 8, 16, 32]"),
        ("qwen3_moe", "an expert's intermediate size=48; it can be one of [1, 2, 4, 8, 16]"),
        ("qwen2_moe", "the shared expert's intermediate size=80; it can be one of [1, 2, 4, 8, 16]"),
    ],
)
def test_sizes_of_experts_limit_the_tensor_ranks(name: str, message: str, tmp_path: Path) -> None:
    grid = GridConfig(tensor=64, pipeline=2)
    problems = check_layout(read_shape(_config(tmp_path, name)), grid, "models.policy")
    assert f"models.policy: parallel.tensor=64 does not divide {message}" in problems


# Hugging Face name -> (family, published number of parameters, sizes that its config.json gives)
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
PUBLISHED: dict[str, tuple[str, int, tuple[int, ...], dict[str, object]]] = {
    "Mistral-7B-v0.1": ("mistral", 7_241_732_096, (4096, 32, 14336, 32, 8), {"vocab_size": 32000}),
    "Qwen2.5-7B": ("qwen2", 7_615_616_512, (3584, 28, 18944, 28, 4), {"vocab_size": 152064}),
    "Qwen3-8B": ("qwen3", 8_190_735_360, (4096, 36, 12288, 32, 8), {"vocab_size": 151936, "head_dim": 128}),
    "Mixtral-8x7B-v0.1": (
        "mixtral",
        46_702_792_704,
        (4096, 32, 14336, 32, 8),
        {"vocab_size": 32000, "num_local_experts": 8},
    ),
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        14_315_784_192,
        (2048, 24, 5632, 16, 16),
        {
            "vocab_size": 151936,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        30_532_122_624,
        (2048, 48, 6144, 32, 4),
        {"vocab_size": 151936, "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "SmolLM3-3B": (
        "smollm3",
        3_075_098_624,
        (2048, 36, 11008, 16, 4),
        {"vocab_size": 128256, "no_rope_layer_interval": 4},
    ),
    "OLMo-2-1124-7B": ("olmo2", 7_298_617_344, (4096, 32, 11008, 32, 32), {"vocab_size": 100352}),
    "granite-3.1-8b-instruct": (
        "granite",
        8_170_848_256,
        (4096, 40, 12800, 32, 8),
        {"vocab_size": 49155, "tie_word_embeddings": True},
    ),
    "gemma-2-9b": (
        "gemma2",
        9_241_705_984,
        (3584, 42, 14336, 16, 8),
        {"vocab_size": 256000, "head_dim": 256, "query_pre_attn_scalar": 256},
    ),
    "gemma-3-1b-it": (
        "gemma3_text",
        999_885_952,
        (1152, 26, 6912, 4, 1),
        {"vocab_size": 262144, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512},
    ),
    "GLM-4-9B-0414": (
        "glm4",
        9_400_279_040,
        (4096, 40, 13696, 32, 2),
        {"vocab_size": 151552, "head_dim": 128},
    ),
    "Seed-OSS-36B": (
        "seed_oss",
        36_151_104_512,
        (5120, 64, 27648, 80, 8),
        {"vocab_size": 155136, "head_dim": 128},
    ),
    "phi-4": ("phi3", 14_659_507_200, (5120, 40, 17920, 40, 10), {"vocab_size": 100352}),
    "DeepSeek-V3 without its predictor of more tokens": (
        "deepseek_v3",
        671_026_419_200,
        (7168, 61, 18432, 128, 128),
        {
            "vocab_size": 129280,
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str, tmp_path: Path) -> None:
    family, published, sizes, own = PUBLISHED[name]
    common = {"model_type": family, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    config = {**common, **dict(zip(_SIZES, sizes, strict=True)), "num_experts_per_tok": 8, **own}
    assert num_parameters(read_shape(_written(tmp_path, config)), has_scalar_head=False) == published
