"""A bf16 model whose head or residual is fp32: nearer to the fp32 model with the same weights, on every layout."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from engine.layouts import topology
from models.split_heads import make_head, own_rows
from ranks import run_ranks
from stepping import take_step
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.training import (
    Fp32Part,
    FrozenPrecisionConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainParallelConfig,
)
from rto_megatron.data.packing import token_batch
from rto_megatron.engine.build_roles import build_frozen, build_trained
from rto_megatron.engine.source import find_source
from rto_megatron.models.logit_shaping import LogitShaping
from rto_megatron.models.output_head import OutputProjection, Targets
from rto_megatron.models.token_logprobs import token_logprobs
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import SupervisedMicrobatch, TokenBatch

VOCAB = 97
PARTS: tuple[Fp32Part, ...] = ("head", "residual")


def _head_of_rank(layout: str, is_fp32: bool) -> tuple[Tensor, Tensor]:
    place, head = topology(layout), make_head(VOCAB, torch.bfloat16)
    hidden, weight = head.hidden_Nh.clone().requires_grad_(), own_rows(head.weight_Vh, place)
    projection = OutputProjection(weight, VOCAB, place.tensor_group(), LogitShaping(is_fp32=is_fp32))
    outputs = token_logprobs(hidden, projection, Targets(head.targets_N), 4)
    outputs.sum().backward()
    assert hidden.grad is not None
    return outputs.detach(), hidden.grad


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_logits_of_an_fp32_head_are_not_rounded(layout: str) -> None:
    head, num_ranks = make_head(VOCAB, torch.bfloat16), 1 if layout == "one" else 2
    hidden = head.hidden_Nh.double().requires_grad_()
    logp_NV = (hidden @ head.weight_Vh.double().t()).log_softmax(-1)
    exact_N = logp_NV.gather(1, head.targets_N[:, None])[:, 0]
    exact_N.sum().backward()
    assert hidden.grad is not None
    for (wide, _), (rounded, _) in zip(
        *(run_ranks(num_ranks, _head_of_rank, layout, is_fp32) for is_fp32 in (True, False)), strict=True
    ):
        torch.testing.assert_close(wide.double(), exact_N.detach(), atol=5e-6, rtol=1e-6)
        assert (rounded - exact_N).abs().max() > 1e-3
    total = sum(grad.double() for _, grad in run_ranks(num_ranks, _head_of_rank, layout, True))
    # Rounded to bf16 as ever, once for each rank's part.
    assert (total - hidden.grad).abs().max() < 0.01 * hidden.grad.abs().max()


def _batch(place: Topology, times: int = 1) -> TokenBatch:
    tokens = torch.randint(VOCAB, (times, 40), generator=torch.Generator().manual_seed(3)).tolist()
    pairs = [(part, 1) for row in tokens for part in (row[:25], row[25:])]
    return token_batch(pairs, True, place.row_multiple, place.device.torch_device)


def _outputs(
    layout: str, folder: Path, dtype: Literal["fp32", "bf16"], parts: tuple[Fp32Part, ...], times: int = 1
) -> Tensor:
    place, source = topology(layout), find_source(folder, False, is_random=False, key="test")
    precision = FrozenPrecisionConfig(dtype=dtype, fp32_parts=parts)
    return build_frozen("reference", source, False, precision, place).token_outputs([_batch(place, times)])[0]


def _gradient_norm(layout: str, folder: Path, precision: PrecisionConfig) -> float:
    place, source = topology(layout), find_source(folder, False, is_random=False, key="test")
    optimizer, parallel = OptimizerConfig(lr=1e-3), TrainParallelConfig()
    model = build_trained("policy", source, False, precision, optimizer, place, 1, parallel)
    batch = _batch(place)
    micro = SupervisedMicrobatch(batch, torch.full(batch.tokens_T.shape, 1 / 38))
    metrics = take_step(model, [micro], SFT(Config()).loss, [["a", "b"]], lr=1e-3)
    return metrics["policy/grad_norm"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15,
    )  # fmt: skip
    path, model = tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config)
    with torch.no_grad():  # as in trained models, layers add little to what is there, and logits are large
        model.model.embed_tokens.weight.mul_(20)
        model.lm_head.weight.mul_(4)
    model.bfloat16().save_pretrained(path)
    return path


def test_each_part_brings_log_probs_nearer_to_those_of_fp32(folder: Path) -> None:
    times = 200  # what is rounded, and so the order of few numbers, differs with a processor's products
    (exact,) = run_ranks(1, _outputs, "one", folder, "fp32", (), times)

    def gap(*parts: Fp32Part) -> float:
        (found,) = run_ranks(1, _outputs, "one", folder, "bf16", parts, times)
        return float((found - exact).abs().mean())

    plain, head, residual, both = gap(), gap("head"), gap("residual"), gap("head", "residual")
    print(f"{plain:.4f} plain, {head:.4f} head, {residual:.4f} residual, {both:.4f} both, nats")
    assert both < residual < 0.8 * plain
    assert both < head < plain


def test_stages_hand_the_residual_on_as_it_is(folder: Path) -> None:
    (one,) = run_ranks(1, _outputs, "one", folder, "bf16", PARTS)
    for found in run_ranks(2, _outputs, "pp2", folder, "bf16", PARTS):
        assert torch.equal(found, one)


def test_gradients_are_those_of_fp32_within_rounding(folder: Path) -> None:
    (exact,) = run_ranks(1, _gradient_norm, "one", folder, PrecisionConfig(dtype="fp32"))
    for layout, recompute in (("pp2", False), ("tp2_sp", True)):
        precision = PrecisionConfig(dtype="bf16", recompute=recompute, fp32_parts=PARTS)
        assert run_ranks(2, _gradient_norm, layout, folder, precision) == [pytest.approx(exact, rel=0.01)] * 2
