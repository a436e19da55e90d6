"""On one GPU: log-probs, values and scores of all roles equal Hugging Face's, in float32 and in bf16."""

import pytest
import torch
from gpu import oracle
from gpu.roles import EOS, TEXTS, HfModel, Prepared, frozen, trained
from torch import Tensor

from rto_megatron.data.packing import token_batch
from rto_megatron.engine.megatron import Model
from rto_megatron.parallel.seeds import seed_step
from rto_megatron.parallel.topology import Topology

pytestmark = pytest.mark.gpu
FP32 = 1e-4
# Against the float32 oracle: bf16 keeps 8 bits, and four layers add up. Largest and mean error, nats or reward units.
BF16_MAX, BF16_MEAN = 0.15, 0.02


def _pairs(model: Model, hf: HfModel, packed: bool, place: Topology) -> list[tuple[Tensor, Tensor]]:
    """(ours, Hugging Face's) per sequence."""
    whole = [(ids, 1) for ids, _ in TEXTS]  # every token but the first is asked for
    groups = (whole[:3], whole[3:])
    # A multiple of 8 leaves a trailing padding segment.
    batches = [token_batch(group, packed, 8, place.device.torch_device) for group in groups]
    outputs = model.token_outputs(batches)
    assert {(output.dtype, output.device) for output in outputs} == {
        (torch.float32, place.device.torch_device)
    }
    ours = [
        output[start : last + hf.is_scalar].cpu()
        for batch, output in zip(batches, outputs, strict=True)
        for start, last in zip(batch.cu_seqlens, batch.last_positions, strict=False)
    ]
    with torch.no_grad():
        return [(mine, oracle.sequence_outputs(hf, ids)) for mine, (ids, _) in zip(ours, TEXTS, strict=True)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("role", ["policy", "reference", "critic"])
def test_float32_outputs_equal_hugging_face(
    role: str, packed: bool, place: Topology, models: dict[str, HfModel]
) -> None:
    worst = 0.0
    for ours, want in _pairs(frozen(place, models[role]), models[role], packed, place):
        torch.testing.assert_close(ours, want, atol=FP32, rtol=0)
        worst = max(worst, float((ours - want).abs().max()))
    print(f"{role}: largest error {worst:.1e}")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_bf16_outputs_are_near_hugging_face_in_float32(
    role: str, packed: bool, place: Topology, models: dict[str, HfModel]
) -> None:
    pairs = _pairs(frozen(place, models[role], "bf16"), models[role], packed, place)
    errors = torch.cat([(ours - want).abs() for ours, want in pairs])
    print(f"{role}: largest error {errors.max():.3f}, mean {errors.mean():.4f}")
    assert errors.max() < BF16_MAX and errors.mean() < BF16_MEAN


def test_scored_rollouts_equal_hugging_face(prepared: Prepared, models: dict[str, HfModel]) -> None:
    scored = oracle.on_cpu(prepared.scored)
    with torch.no_grad():
        for row, rollout in enumerate(scored.rollouts):
            n, first = len(rollout.response_ids), len(rollout.prompt_ids) - 1
            ids = rollout.prompt_ids + rollout.response_ids
            said = {name: oracle.sequence_outputs(model, ids) for name, model in models.items()}
            of_response = {name: outputs[first : first + n] for name, outputs in said.items()}
            closed = ids if ids[-1] == EOS else (*ids, EOS)
            for got, want in (
                (scored.logp_old_BR, of_response["policy"]),
                (scored.logp_ref_BR, of_response["reference"]),
                (scored.dpo_logratio_BR, of_response["dpo"] - of_response["reference"]),
                (scored.values_BR, of_response["critic"]),
                (scored.mask_BR, torch.ones(n)),
                (scored.score_B[:, None], oracle.sequence_outputs(models["reward"], closed)[-1:]),
            ):
                torch.testing.assert_close(got[row, : len(want)], want, atol=FP32, rtol=0)
                assert not got[row, len(want) :].any()


def test_credit_on_the_device_equals_credit_on_the_cpu(prepared: Prepared) -> None:
    found = prepared.algorithm.credit(prepared.scored, 0.01, lambda total: total)
    wanted = prepared.algorithm.credit(oracle.on_cpu(prepared.scored), 0.01, lambda total: total)
    for got, want in (
        (found.advantages_BR, wanted.advantages_BR),
        (found.returns_BR, wanted.returns_BR),
        (found.rewards.total_BR(), wanted.rewards.total_BR()),
    ):
        assert got.device == prepared.scored.mask_BR.device
        torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)


def test_a_steps_draws_depend_on_seed_and_step_alone(place: Topology) -> None:
    def draw(step: int) -> list[float]:
        seed_step(3, step, place.tensor_rank)
        return torch.rand(4, device=place.device.torch_device).tolist()

    first = draw(5)
    assert draw(6) != first
    assert draw(5) == first


def test_parameters_and_gradients_live_on_the_device(place: Topology, models: dict[str, HfModel]) -> None:
    model = trained(place, models["critic"], dtype="bf16")
    tensors = [t for p in model.module.parameters() for t in (p, p.main_grad, p.main_param)]
    tensors += [*frozen(place, models["policy"]).module.parameters(), *model.module.buffers()]
    assert {tensor.device for tensor in tensors} == {place.device.torch_device}
    assert {p.main_grad.dtype for p in model.module.parameters()} == {torch.float32}
