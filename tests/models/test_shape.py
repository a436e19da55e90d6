"""What config.json may say, what is refused, and why a model cannot be cut."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from models.shapes import SHAPE
from tiny_models import llama_config

from rto_megatron.config.training import GridConfig
from rto_megatron.errors import ModelFolderError
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.layout_checks import check_kernels, check_layout

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _write(folder: Path, **changes: object) -> Path:
    config = {**llama_config(97, is_tied=True).to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sizes_are_read(tmp_path: Path) -> None:
    shape = read_shape(_write(tmp_path))
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (
        "llama",
        4,
        128,
        176,
    )
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 32)
    assert (shape.vocab_size, shape.max_positions, shape.norm_eps) == (97, 256, 1e-6)
    assert (shape.rope_theta, shape.rope_scaling_factor, shape.is_tied) == (5000.0, None, True)


def test_older_keys_and_absent_ones_have_transformers_meaning(tmp_path: Path) -> None:
    _write(tmp_path, rope_parameters=None, rope_theta=700.0, head_dim=None, num_key_value_heads=None)
    shape = read_shape(tmp_path)
    assert (shape.rope_theta, shape.head_dim, shape.num_kv_heads) == (700.0, 32, 4)
    _write(tmp_path, rope_parameters=None, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
    assert (read_shape(tmp_path).rope_theta, read_shape(tmp_path).rope_scaling_factor) == (5e5, 32.0)
    _write(tmp_path, rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5})
    assert (read_shape(tmp_path).rope_theta, read_shape(tmp_path).rope_scaling_factor) == (5e5, 32.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, r"model_type is 'gpt_neox'; supported are \[.*'llama'"),
        ({"model_type": None}, r"model_type is None"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope scaling .*yarn.* cannot be.* this family has llama3",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, r"rope scaling .*linear.* cannot be"),
        ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, r"rope scaling .* cannot be"),
        (
            {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
            r"rope scaling .* cannot be",
        ),
        ({"attention_bias": True}, r"\['attention_bias'\] is set"),
        ({"attention_bias": True, "mlp_bias": True}, r"\['attention_bias', 'mlp_bias'\] is set"),
        ({"hidden_act": "gelu"}, r"hidden_act"),
    ],
)
def test_what_megatron_cannot_express_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelFolderError, match=message) as caught:
        read_shape(_write(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"has no config\.json; expected a Hugging Face model folder"):
        read_shape(tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": "llama", "num_hid', "[]", '{"model_type": "llama"}'])
def test_a_damaged_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        read_shape(tmp_path)


def test_a_layout_that_fits_has_no_problems() -> None:
    grids = [GridConfig(tensor=t, pipeline=p) for t, p in ((1, 1), (2, 2), (4, 1))]
    assert [check_layout(SHAPE, grid, "models.policy") for grid in grids] == [[]] * 3


def test_ulysses_needs_a_head_for_every_context_rank() -> None:
    shape = replace(SHAPE, num_heads=12, num_kv_heads=4)
    fits = [GridConfig(tensor=2, context=c) for c in (1, 2, 3, 6)]
    gathers = GridConfig(tensor=2, context=4, context_scheme="gather")
    assert [check_layout(shape, grid, "models.policy") for grid in (*fits, gathers)] == [[]] * 5
    assert check_layout(shape, GridConfig(tensor=2, context=4), "models.critic", "parallel.roles.critic") == [
        "models.critic: parallel.roles.critic.context=4 does not divide the 6 attention heads of a tensor rank "
        "(num_attention_heads=12 / parallel.roles.critic.tensor=2), which ulysses shares out; it can be one of "
        "[1, 2, 3, 6], or set parallel.roles.critic.context_scheme=gather"
    ]


def test_a_family_with_layers_of_its_own_refuses_transformer_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_kernels({"policy": SHAPE}, "transformer_engine") == []
    monkeypatch.setitem(
        FAMILIES, "llama", replace(FAMILIES["llama"], layer_spec=lambda shape, config, num_experts: None)
    )
    assert check_kernels({"policy": SHAPE}, "auto") == []
    assert check_kernels({"policy": SHAPE}, "transformer_engine") == [
        "models.policy: llama models have layers of their own (layer_spec), in whose place TransformerEngine's cannot "
        "be; set precision.kernels=auto or torch"
    ]


def test_a_norm_over_all_heads_takes_no_head_twice() -> None:
    shape = replace(SHAPE, family="olmo2", num_heads=8, num_kv_heads=2, has_whole_qk_norm=True)
    assert check_layout(shape, GridConfig(tensor=4), "models.policy") == [
        "models.policy: parallel.tensor=4 is above num_key_value_heads=2, over all of which olmo2 has one norm; it can "
        "be one of [1, 2]"
    ]


def test_every_obstacle_is_a_sentence() -> None:
    shape = replace(SHAPE, num_heads=6, num_kv_heads=2, ffn_hidden_size=22, num_layers=6)
    assert check_layout(shape, GridConfig(tensor=4, pipeline=4), "models.critic") == [
        "models.critic: parallel.tensor=4 does not divide num_attention_heads=6; it can be one of [1, 2]",
        "models.critic: parallel.tensor=4 does not divide intermediate_size=22; it can be one of [1, 2]",
        "models.critic: parallel.pipeline=4 does not divide num_hidden_layers=6; it can be one of [1, 2, 3, 6], "
        "or set parallel.stages=auto",
    ]
