"""Mixtral on Megatron: log-probs and scores of Hugging Face, layouts that agree, and the load-balancing loss."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from ranks import run_ranks
from safetensors.torch import load_file
from stepping import take_step
from tiny_families import hugging_face_outputs
from tiny_models import SEQUENCES
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, MixtralForSequenceClassification

from rto_megatron.algorithms import sft
from rto_megatron.config.training import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RoleGridConfig,
    TrainParallelConfig,
)
from rto_megatron.data.packing import Layout, supervised_microbatches, token_batch
from rto_megatron.engine.build_roles import build_trained
from rto_megatron.engine.export import export_hf
from rto_megatron.engine.source import find_source
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.errors import ModelFolderError
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.layout_checks import check_experts
from rto_megatron.types import Demonstration

COEF = 0.05
EXPERTS, TOP_K = 4, 2
SGD = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)


def write_mixtral(folder: Path, is_scalar: bool = False, **changes: object) -> torch.nn.Module:
    torch.manual_seed(3)
    kind = MixtralForSequenceClassification if is_scalar else MixtralForCausalLM
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
        num_labels=1,
        attn_implementation="eager",
        **changes,
    )
    model = kind(config).float().eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtral")
    write_mixtral(root / "language")
    write_mixtral(root / "scalar", is_scalar=True)
    return root


def _outputs(layout: str, model: Path, is_scalar: bool) -> list[Tensor]:
    place = topology(layout)
    batch = token_batch(
        [(ids, 1) for ids, _ in SEQUENCES], True, place.row_multiple, place.device.torch_device
    )
    (values_T,) = frozen(place, model, is_scalar).token_outputs([batch])
    return [
        values_T[start : last + 1]
        for start, last in zip(batch.cu_seqlens, batch.last_positions, strict=False)
    ]


@pytest.mark.parametrize("is_scalar", [False, True], ids=["language", "scalar"])
@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2", "tp2_pp2_sp"])
def test_outputs_equal_hugging_face(layout: str, is_scalar: bool, folder: Path) -> None:
    name = "scalar" if is_scalar else "language"
    kind = MixtralForSequenceClassification if is_scalar else MixtralForCausalLM
    want = hugging_face_outputs(kind.from_pretrained(folder / name).eval(), SEQUENCES, is_scalar)
    ours = run_ranks(LAYOUTS[layout][0], _outputs, layout, folder / name, is_scalar)
    worst = max(float((g[: len(w)] - w).abs().max()) for got in ours for g, w in zip(got, want, strict=True))
    print(layout, name, f"{worst:.1e}")
    assert worst < 1e-4


def _microbatches(place, micro: int):
    demonstrations = [
        Demonstration(str(i), tuple(ids[:n]), tuple(ids[n:])) for i, (ids, n) in enumerate(SEQUENCES)
    ]
    own = demonstrations[place.data_rank :: place.data_size]
    targets = sum(len(d.response_ids) for d in demonstrations)
    layout = Layout(micro, True, place.row_multiple, place.device.torch_device)
    return supervised_microbatches(own, targets, layout)


def _step(
    layout: str, model: Path, coef: float, export: Path | None
) -> tuple[dict[str, Tensor], float | None]:
    """One step on all sequences in one micro-batch; whole weights of this rank's stage, and the metric."""
    place = topology(layout)
    source = find_source(model, False, is_random=False, key="test")
    trained = build_trained(
        "policy", source, False, PrecisionConfig(dtype="fp32"), SGD, place, 1, TrainParallelConfig(),
        moe_aux_loss_coef=coef,
    )  # fmt: skip
    microbatches = _microbatches(place, len(SEQUENCES))
    metrics = take_step(trained, microbatches, sft.SFT(sft.Config()).loss, [["x"]], SGD.lr)
    if export is not None:
        export_hf(trained, model, export)
    weights = {n: t.clone() for n, t in stage_hf_tensors(trained.module, trained.shape, False, place)}
    return weights, metrics.get("loss/policy_moe_aux", (None, 1.0))[0]


def _merged(layout: str, folder: Path, coef: float) -> tuple[dict[str, Tensor], set[float | None]]:
    parts = run_ranks(LAYOUTS[layout][0], _step, layout, folder / "language", coef, None)
    return {name: t for weights, _ in parts for name, t in weights.items()}, {aux for _, aux in parts}


@torch.no_grad()
def _balance_by_definition(model: MixtralForCausalLM) -> float:
    """E sum_e (share of the assignments to e) (mean probability of e), mean over layers; all tokens in one batch."""
    losses = []
    logits = [model(torch.tensor([ids]), output_router_logits=True).router_logits for ids, _ in SEQUENCES]
    for layer in range(model.config.num_hidden_layers):
        chances = torch.cat([rows[layer] for rows in logits]).softmax(-1)
        chosen = torch.zeros_like(chances).scatter(1, chances.topk(TOP_K).indices, 1.0)
        losses.append(EXPERTS * (chosen.mean(0) / TOP_K * chances.mean(0)).sum())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2", "cp2", "cp2_ep2"])
def test_load_balancing_loss_is_its_definition_and_one_step_equals_one_rank(
    layout: str, folder: Path
) -> None:
    expected = _balance_by_definition(MixtralForCausalLM.from_pretrained(folder / "language").eval())
    start = load_file(folder / "language/model.safetensors")
    (want, _), (got, aux) = _merged("one", folder, COEF), _merged(layout, folder, COEF)
    assert all(value == pytest.approx(expected, rel=1e-4) for value in aux), (aux, expected)
    worst = max(float((got[name] - want[name]).norm() / (want[name] - start[name]).norm()) for name in start)
    print(layout, f"balance {expected:.4f}, step {worst:.1e}")
    assert worst < 1e-4


def test_weight_of_the_loss_moves_the_router_along_its_gradient(folder: Path) -> None:
    (without, none), (with_it, _), (twice, _) = (_merged("one", folder, c) for c in (0.0, COEF, 2 * COEF))
    assert none == {None}
    name = "model.layers.0.block_sparse_moe.gate.weight"
    once_moved, twice_moved = with_it[name] - without[name], twice[name] - without[name]
    assert once_moved.norm() > 0
    # SGD is linear in the gradient.
    assert (twice_moved - 2 * once_moved).norm() < 1e-4 * once_moved.norm()


def test_export_loads_in_transformers_with_the_same_log_probs(folder: Path, tmp_path: Path) -> None:
    run_ranks(2, _step, "tp2_sp", folder / "language", 0.0, tmp_path / "hf")
    exported = MixtralForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = run_ranks(1, _outputs, "one", tmp_path / "hf", False)[0]
    for got, want in zip(ours, hugging_face_outputs(exported, SEQUENCES, False), strict=True):
        assert (got[: len(want)] - want).abs().max() < 1e-4


def test_what_cannot_be_trained_is_said(folder: Path) -> None:
    shapes = {"policy": read_shape(folder / "language")}
    sound, alone = ParallelConfig(tensor=2, sequence=True), ParallelConfig()
    assert check_experts(shapes, sound, COEF) == check_experts(shapes, alone, 0.0) == []
    assert "set parallel.sequence=true" in check_experts(shapes, ParallelConfig(tensor=2), COEF)[0]
    assert "no trained model has experts" in check_experts({}, alone, COEF)[0]
    of_critic = ParallelConfig(tensor=2, sequence=True, roles={"critic": RoleGridConfig(tensor=2)})
    (problem,) = check_experts({**shapes, "critic": shapes["policy"]}, of_critic, COEF)
    assert "models.critic" in problem and "set parallel.roles.critic.sequence=true" in problem


def test_a_sliding_window_that_would_cut_is_refused(tmp_path: Path) -> None:
    write_mixtral(tmp_path, sliding_window=32)
    with pytest.raises(ModelFolderError, match="sliding_window=32 is below"):
        read_shape(tmp_path)
