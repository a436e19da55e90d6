"""Every model family on Megatron: Hugging Face's numbers, names and bits, and one training step at every layout."""

import math
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from engine.layouts import CONTEXT, LAYOUTS, frozen, topology, trained
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from stepping import take_step
from tiny_families import VARIANTS, hugging_face_outputs, write_family
from tiny_models import SEQUENCES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_megatron.algorithms import sft
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout, supervised_microbatches, token_batch
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.parameters import num_parameters, parameter_map, stage_sizes
from rto_megatron.types import Demonstration, LossOutput, SupervisedMicrobatch

# The package binds the same name to a function.
finalize = import_module("megatron.core.distributed.finalize_model_grads")
SGD = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)
HEADS = {False: "language", True: "scalar"}
RUN = [name for name, changes in VARIANTS.items() if FAMILIES[str(changes["model_type"])].not_run is None]
# With parts that Llama has not.
OWN = ["smollm3", "olmo2", "granite", "gemma2", "gemma3_text", "glm4", "phi3", "phi3_longrope"]
TRAINED = ["mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed", *OWN]
MIXTURES = [name for name in TRAINED if "moe" in name]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name in VARIANTS:
        for is_scalar, head in HEADS.items():
            write_family(root / name / head, name, is_scalar)
    return root


@cache
def _hugging_face(folder: Path) -> list[Tensor]:
    """Log-probs of the next tokens, or the scalar head's value of every token, of each sequence."""
    is_scalar = folder.name == HEADS[True]
    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    return hugging_face_outputs(model, SEQUENCES, is_scalar)


def _read_all(layout: str, root: Path) -> dict[str, tuple[list[Tensor], set[str]]]:
    """`variant/head` -> outputs of each sequence, and tensors of this stage that differ from the file's bits."""
    place, seen = topology(layout), {}
    batch = token_batch(
        [(ids, 1) for ids, _ in SEQUENCES], True, place.row_multiple, place.device.torch_device
    )
    for name in OWN if layout in (*CONTEXT, "pp2_v2") else RUN:
        for is_scalar, head in HEADS.items():
            model = frozen(place, root / name / head, is_scalar)
            (values_T,) = model.token_outputs([batch])
            outputs = [
                values_T[start : last + 1].clone()
                for start, last in zip(batch.cu_seqlens, batch.last_positions, strict=False)
            ]
            stored = load_file(root / name / head / "model.safetensors")
            ours = stage_hf_tensors(model.module, model.shape, is_scalar, place)
            seen[f"{name}/{head}"] = (outputs, {n for n, t in ours if not torch.equal(t, stored[n])})
    return seen


@cache
def _read(layout: str, root: Path) -> list[dict[str, tuple[list[Tensor], set[str]]]]:
    """Every variant in one job a layout: starting ranks is the expensive part."""
    return run_ranks(LAYOUTS[layout][0], _read_all, layout, root)


@pytest.mark.parametrize("head", HEADS.values())
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *product(RUN, ("one", "tp2", "tp2_sp", "pp2", "tp2_pp2_sp")),
        *product(OWN, ("cp2", "cp2_gather", "pp2_v2")),
    ],
)
def test_outputs_and_weights_equal_hugging_face(name: str, layout: str, head: str, root: Path) -> None:
    want = _hugging_face(root / name / head)
    worst = 0.0
    for rank in _read(layout, root):
        got, changed = rank[f"{name}/{head}"]
        assert changed == set()
        for ours, theirs in zip(got, want, strict=True):
            worst = max(worst, float((ours[: len(theirs)] - theirs).abs().max()))
    print(name, head, layout, f"{worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("head", HEADS.values())
@pytest.mark.parametrize("name", VARIANTS)
def test_the_map_has_the_names_and_sizes_of_the_file(name: str, head: str, root: Path) -> None:
    folder, is_scalar = root / name / head, head == HEADS[True]
    shape = read_shape(folder)
    mapped = [p for p in parameter_map(shape, is_scalar) if not p.is_copy]
    ours = {n: size for p in mapped for n, size in zip(p.hf, p.hf_shapes, strict=True)}
    with safe_open(folder / "model.safetensors", "pt") as opened:
        stored = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
    assert ours == stored
    assert sum(len(p.hf) for p in mapped) == len(stored)
    assert num_parameters(shape, is_scalar) == sum(math.prod(size) for size in stored.values())


@pytest.mark.parametrize("head", HEADS.values())
@pytest.mark.parametrize("name", ["qwen3_moe_mixed", "qwen2_moe", "deepseek_v3", "llama3_tied"])
def test_stages_and_experts_are_counted_in_the_file(name: str, head: str, root: Path) -> None:
    folder, is_scalar = root / name / head, head == HEADS[True]
    shape, stored = read_shape(folder), load_file(folder / "model.safetensors")
    stages = [0, 0]
    for tensor_name, tensor in stored.items():
        if "layers." in tensor_name:
            stages[int(tensor_name.split("layers.")[1].split(".")[0]) // 2] += tensor.numel()
        else:
            stages["embed_tokens" not in tensor_name] += tensor.numel()
    if shape.is_tied and not is_scalar:
        stages[1] += stored["model.embed_tokens.weight"].numel()
    assert [sum(size) for size in stage_sizes(shape, is_scalar, 2)] == stages
    ((others, experts),) = stage_sizes(shape, is_scalar, 1)
    assert others + experts == sum(t.numel() for t in stored.values())
    assert experts == sum(t.numel() for name, t in stored.items() if ".experts." in name)


def _value_loss(values_T: Tensor, micro: SupervisedMicrobatch) -> LossOutput:
    loss = (micro.weight_T * (values_T - 1.0).square()).sum()
    return LossOutput(loss, {})


def _step_all(layout: str, root: Path, is_broken: bool) -> dict[str, dict[str, Tensor]]:
    """`variant/head` -> whole tensors of this stage after one step on all sequences."""
    if is_broken:
        finalize._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None
    place, seen = topology(layout), {}
    demonstrations = [
        Demonstration(str(i), tuple(ids[:n]), tuple(ids[n:])) for i, (ids, n) in enumerate(SEQUENCES)
    ]
    rows = Layout(2, True, place.row_multiple, place.device.torch_device)
    own = demonstrations[place.data_rank :: place.data_size]
    microbatches = supervised_microbatches(own, sum(len(d.response_ids) for d in demonstrations), rows)
    names = TRAINED if layout != "tp2" else [n for n in TRAINED if n not in MIXTURES]
    for name in PARTIAL[layout] if is_broken else names:
        for is_scalar, head in HEADS.items():
            model = trained(place, root / name / head, is_scalar, SGD)
            loss = _value_loss if is_scalar else sft.SFT(sft.Config()).loss
            take_step(model, microbatches, loss, [["x"]] * len(microbatches), SGD.lr)
            whole = stage_hf_tensors(model.module, model.shape, is_scalar, place)
            seen[f"{name}/{head}"] = {n: t.clone() for n, t in whole}
    return seen


@cache
def _stepped(layout: str, root: Path, is_broken: bool = False) -> dict[str, dict[str, Tensor]]:
    merged: dict[str, dict[str, Tensor]] = {}
    for seen in run_ranks(LAYOUTS[layout][0], _step_all, layout, root, is_broken):
        for key, tensors in seen.items():
            merged.setdefault(key, {}).update(tensors)
    return merged


def _errors(key: str, layout: str, root: Path, is_broken: bool = False) -> dict[str, float]:
    """Tensor -> relative L2 error of its change against one rank."""
    start = load_file(root / key / "model.safetensors")
    want, got = _stepped("one", root)[key], _stepped(layout, root, is_broken)[key]
    assert start.keys() == want.keys() == got.keys()
    moved = {n: float((want[n] - start[n]).norm()) for n in start}
    # An expert that no token of a response chose stays where it was, to the bit.
    assert all(moved[n] or (".experts." in n and torch.equal(got[n], want[n])) for n in start)
    return {n: float((got[n] - want[n]).norm()) / (moved[n] or 1.0) for n in start}


@pytest.mark.parametrize("head", HEADS.values())
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name in TRAINED
        for layout in ("tp2", "tp2_sp", "pp2", "dp2")
        if layout != "tp2" or name not in MIXTURES  # Megatron trains those only with sequence parallelism
    ],
)
def test_one_step_equals_one_rank(name: str, layout: str, head: str, root: Path) -> None:
    errors = _errors(f"{name}/{head}", layout, root)
    worst = max(errors, key=lambda n: errors[n])
    print(name, head, layout, f"{errors[worst]:.1e}", worst)
    assert errors[worst] < 1e-4


# layout -> variant -> what a rank sees only a part of, though all ranks hold it
PARTIAL = {
    "tp2": {"qwen2": (), "qwen3": ("q_norm", "k_norm"), "olmo2": ()},
    "tp2_sp": {
        "qwen2": ("layernorm", "model.norm"),
        "olmo2": ("layernorm", "model.norm"),
        "qwen3": ("q_norm", "k_norm", "layernorm", "model.norm"),
        "qwen2_moe": ("shared_expert_gate", "mlp.gate.", "layernorm", "model.norm"),
        "qwen3_moe_mixed": ("q_norm", "k_norm", "mlp.gate.", "layernorm", "model.norm"),
    },
}


@pytest.mark.parametrize("head", HEADS.values())
@pytest.mark.parametrize(("layout", "name"), [(ly, name) for ly, names in PARTIAL.items() for name in names])
def test_a_missing_reduction_is_seen(layout: str, name: str, head: str, root: Path) -> None:
    parts = PARTIAL[layout][name]
    if layout == "tp2_sp" and head == HEADS[True]:
        parts = (*parts, "score")
    errors = _errors(f"{name}/{head}", layout, root, is_broken=True)
    partial = {n for n in errors if any(part in n for part in parts)}
    assert {n for n, error in errors.items() if error > 1e-2} == partial
