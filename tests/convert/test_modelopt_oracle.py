"""NVIDIA ModelOpt's own importer and exporter for Megatron as an independent oracle of the weight maps.

ModelOpt fills megatron-core's stock model (its own spec and norms, none of ours), and every parameter must be bit-equal
to what our map puts there. Its exporter reads a stock model that our map filled and must give the folder back.
"""

import shutil
from pathlib import Path

import pytest
import torch
from convert.oracle_models import emptied, global_topology
from engine.layouts import LAYOUTS
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from modelopt.torch.export import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_import_mapping
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_families import write_family

from rto_megatron.engine.weights import load_hf_tensors, local_parameters
from rto_megatron.models.build import build_model, transformer_config
from rto_megatron.models.chunks import ModelChunks
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import padded_vocab
from rto_megatron.parallel.topology import Topology
from rto_megatron.storage.hf_folder import HfFolder

VARIANTS = (
    *("llama", "llama2", "llama3_tied", "qwen2", "qwen2_tied", "qwen3", "qwen3_tied"),
    *("qwen3_moe", "qwen3_moe_mixed"),
)
VOCAB_SIZE = 96  # ModelOpt does not pad the vocabulary: it must be a multiple of the tensor size
HEAD_DIM_ROWS = 16  # rows of one head of the `llama` variant


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a variant."""
    root = tmp_path_factory.mktemp("families")
    for name in VARIANTS:
        write_family(root / name, name, vocab_size=VOCAB_SIZE)
    return {name: root / name for name in VARIANTS}


def _stock(shape: ModelShape, place: Topology) -> GPTModel:
    """Megatron's model as Megatron specifies it; every parameter is NaN until somebody fills it."""
    config = transformer_config(shape, place, torch.float32, recompute=False)
    if shape.experts is None:
        spec = get_gpt_layer_local_spec(None, qk_layernorm=shape.has_qk_norm, normalization="RMSNorm")
    else:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab(shape.vocab_size, place.tensor_size),
        max_sequence_length=shape.max_positions,
        pre_process=place.is_first_stage,
        post_process=place.is_last_stage,
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type="rope",
    )
    return emptied(model)


def _different(layout: str, ours: Path, theirs: Path) -> list[str]:
    """Names of this rank's parameters that differ between our reading of `ours` and ModelOpt's of `theirs`."""
    place, shape = global_topology(layout), read_shape(ours)
    config = transformer_config(shape, place, torch.float32, recompute=False)
    filled = ModelChunks([emptied(build_model(shape, config, place, has_scalar_head=False))])
    load_hf_tensors(filled, shape, False, place, HfFolder(ours).read)
    oracle = _stock(shape, place)
    import_mcore_gpt_from_hf(oracle, str(theirs), dtype=torch.float32)
    got, want = local_parameters(filled), local_parameters(ModelChunks([oracle]))
    assert got.keys() == want.keys()
    return [name for name in want if not torch.equal(got[name], want[name])]


def _export(layout: str, folder: Path, out: Path) -> None:
    """ModelOpt's export of a stock model that our map filled; every rank of a pipeline writes its layers."""
    place, shape = global_topology(layout), read_shape(folder)
    model = _stock(shape, place)
    load_hf_tensors(ModelChunks([model]), shape, False, place, HfFolder(folder).read)
    export_mcore_gpt_to_hf(model, str(folder), dtype=torch.float32, export_dir=str(out))


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_equals_what_modelopt_imports(
    folders: dict[str, Path], name: str, layout: str
) -> None:
    different = run_ranks(LAYOUTS[layout][0], _different, layout, folders[name], folders[name])
    assert different == [[]] * LAYOUTS[layout][0]


# At TP 2 its exporter writes the shard of the first tensor rank as if it were whole: nothing to compare with.
@pytest.mark.parametrize("layout", ["one", "pp2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_modelopt_exports_our_parameters_as_the_folder_they_came_from(
    folders: dict[str, Path], tmp_path: Path, name: str, layout: str
) -> None:
    run_ranks(LAYOUTS[layout][0], _export, layout, folders[name], tmp_path)
    exported = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    source = load_file(folders[name] / "model.safetensors")
    assert exported.keys() == source.keys()
    assert [n for n in source if not torch.equal(exported[n], source[n])] == []


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_rows_of_q_and_k_in_each_others_place_are_noticed(
    folders: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    swapped = shutil.copytree(folders["llama"], tmp_path / "swapped")
    tensors = load_file(swapped / "model.safetensors")
    q, k = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qk")
    of_q = q[:HEAD_DIM_ROWS].clone()
    q[:HEAD_DIM_ROWS], k[:HEAD_DIM_ROWS] = k[:HEAD_DIM_ROWS].clone(), of_q
    save_file(tensors, swapped / "model.safetensors", metadata={"format": "pt"})
    different = run_ranks(LAYOUTS[layout][0], _different, layout, swapped, folders["llama"])
    # The first head belongs to the first key-value group, which the first tensor rank holds.
    first, *others = different
    assert first == ["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert others == [[]] * len(others)


def test_the_families_without_this_oracle_are_known() -> None:
    """Fails when an installed ModelOpt learns one of them: add it to VARIANTS then."""
    without = {
        name
        for name, family in FAMILIES.items()
        if family.architectures[False] not in all_mcore_hf_import_mapping
    }
    assert without == {
        *("mistral", "mixtral", "qwen2_moe", "seed_oss"),
        *("gemma2", "gemma3_text", "glm4", "granite", "olmo2", "phi3", "smollm3"),  # with parts of their own
    }
