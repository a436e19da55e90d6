"""The map of DeepSeek-V3, a family that is converted and not built here, against ModelOpt's importer for Megatron."""

from pathlib import Path

import torch
from convert.oracle_models import emptied, global_topology
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import MLATransformerConfig
from modelopt.torch.export import import_mcore_gpt_from_hf
from ranks import run_ranks
from tiny_families import write_family

from rto_megatron.engine.weights import local_parameters
from rto_megatron.models.chunks import ModelChunks
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.parameters import parameter_map
from rto_megatron.models.shape import ModelShape
from rto_megatron.storage.hf_folder import HfFolder


def _latent_config(shape: ModelShape) -> MLATransformerConfig:
    """What decides the parameters of a DeepSeek-V3 model; it is filled here and never run."""
    experts, latent = shape.experts, shape.latent
    assert experts is not None and latent is not None
    return MLATransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        qk_head_dim=latent.nope_dim,
        qk_pos_emb_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        num_moe_experts=experts.num,
        moe_ffn_hidden_size=experts.ffn_hidden_size,
        moe_shared_expert_intermediate_size=experts.shared_ffn_hidden_size,
        moe_layer_freq=[int(layer in experts.layers) for layer in range(shape.num_layers)],
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        moe_token_dispatcher_type="alltoall",
        rope_type="rope",
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )


def _different_latent(folder: Path) -> list[str]:
    place, shape = global_topology("one"), read_shape(folder)
    config = _latent_config(shape)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        # Megatron's local attention refuses latent attention; it has no parameters.
        layer.submodules.self_attention.submodules.core_attention = IdentityOp
    oracle = emptied(
        GPTModel(config, spec, shape.vocab_size, shape.max_positions, position_embedding_type="rope")
    )
    import_mcore_gpt_from_hf(oracle, str(folder), dtype=torch.float32)
    biases = {name: buffer for name, buffer in oracle.named_buffers() if name.endswith("expert_bias")}
    want = {**local_parameters(ModelChunks([oracle])), **biases}
    read = HfFolder(folder).read
    got = {
        mapped.megatron: mapped.layout.shard(
            [read(n, s) for n, s in zip(mapped.hf, mapped.hf_shapes, strict=True)],
            place.tensor_rank,
            place.tensor_size,
        )
        for mapped in parameter_map(shape, has_scalar_head=False)
    }
    assert got.keys() == want.keys()
    return [name for name in want if not torch.equal(got[name], want[name])]


# At TP 2 ModelOpt reads the down projections whole, and Megatron's local layers cut them.
def test_the_map_of_a_family_that_is_only_converted_equals_what_modelopt_imports(tmp_path: Path) -> None:
    write_family(tmp_path, "deepseek_v3")
    assert run_ranks(1, _different_latent, tmp_path) == [[]]
