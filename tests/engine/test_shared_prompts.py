"""A prompt that is computed once gives each of its responses the numbers and the gradients of a prompt of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS, frozen, topology, trained
from engine.whole_tensors import whole
from ranks import run_ranks
from tiny_families import write_family
from tiny_models import write_llama
from torch import Tensor

from rto_megatron.algorithms import dpo, ppo, reward_model, tdpo
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout, minibatches, pair_microbatches, response_mask, rollout_batches
from rto_megatron.engine.divergence import divergence_from, divergence_microbatches
from rto_megatron.engine.megatron import Loss, Microbatch, TrainedModel
from rto_megatron.engine.readings import Reading
from rto_megatron.models.build import is_padding
from rto_megatron.models.model_flops import forward_flops, head_flops
from rto_megatron.types import Ban, Distribution, PreferencePair, Rollout, TokenBatch, TrainingRows

# A long prompt with four responses, a short one with two, and one that has a single response.
PROMPTS = (tuple(range(30, 51)), (5, 9, 7, 6), (60, 61, 62))
GROUPED = [
    replace(one, prompt_ids=PROMPTS[number])
    for one, number in zip(rollouts(7), (0, 0, 1, 0, 1, 0, 2), strict=True)
]
REPEATED = (21, 21)  # prompts that are not read again, in micro-batches of four and of three
PAIRS = [
    PreferencePair(str(n), PROMPTS[n], one.response_ids, other.response_ids, 0.3 * n)
    for n, (one, other) in enumerate(zip(rollouts(6)[::2], rollouts(6)[1::2], strict=True))
]
DRAWN = Distribution(0.7, Ban((2, 95), 5))
SGD = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)
DPO, TDPO = dpo.DPO(dpo.Config(beta=0.5)), tdpo.TDPO(tdpo.Config(beta=0.5))
REWARD = reward_model.RewardModel(reward_model.Config())
PPO = ppo.build(ppo.Config(), lambda _: frozenset())


def _experience(grouped: Sequence[Rollout]) -> tuple[TrainingRows, Tensor]:
    """Numbers of any kind for each token, and a weight for it."""
    mask_BR = response_mask(grouped, torch.device("cpu"))
    chance = torch.Generator().manual_seed(3)
    fields = [torch.randn(mask_BR.shape, generator=chance) * mask_BR for _ in range(4)]
    logp_old, advantages, values, returns = fields
    rows = TrainingRows(
        tuple(grouped), mask_BR, logp_old - 4, logp_old - 4, mask_BR, values, advantages, returns, DRAWN
    )
    return rows, mask_BR / mask_BR.sum()


def _gradients(
    layout: Layout, policy: TrainedModel, critic: TrainedModel, root: Path
) -> dict[str, dict[str, Tensor]]:
    """Of every kind of loss, whole tensors."""
    reference = frozen(policy.topology, root / "reference", False)
    rows, weights_BR = _experience(GROUPED)
    updates = minibatches(rows, weights_BR, range(len(GROUPED)), layout)
    pairs = pair_microbatches(PAIRS, torch.zeros(len(PAIRS), 2), len(PAIRS), layout)
    divergences = divergence_microbatches(PAIRS, len(PAIRS), reference, layout)
    found: dict[str, dict[str, Tensor]] = {}

    def note(
        kind: str,
        model: TrainedModel,
        steps: Sequence[Microbatch],
        loss: Loss[Microbatch],
        reading: Reading[Microbatch] | None = None,
    ) -> None:
        assert (steps[0].batch.shared is not None) == layout.shares_prompts
        model.gradients(steps, loss, [["x"]] * len(steps), reading)
        found[kind] = whole(model, lambda p: p.main_grad)

    note("dpo", policy, pairs, DPO.loss)
    note("tdpo", policy, divergences, TDPO.loss, divergence_from(reference))
    note("ppo", policy, updates, PPO.policy_loss)
    note("value", critic, updates, PPO.value_loss)
    note("reward_model", critic, pairs, REWARD.loss)
    return found


def _of_rank(layout_name: str, root: Path) -> dict[str, float]:
    """How far each kind's gradients are from those of prompts of their own, and its outputs."""
    place = topology(layout_name)
    policy, critic = (
        trained(place, root / name, is_scalar, SGD, recompute=layout_name == "one")
        for name, is_scalar in (("policy", False), ("critic", True))
    )
    plain = Layout(4, True, place.row_multiple, torch.device("cpu"))
    want, got = (
        _gradients(one, policy, critic, root) for one in (plain, replace(plain, shares_prompts=True))
    )
    apart = {
        kind: max(float((got[kind][name] - one).norm() / one.norm()) for name, one in tensors.items())
        for kind, tensors in want.items()
    }
    for name, model in (("policy", policy), ("critic", critic)):
        place.work.take()
        both, work = [], []
        for is_shared in (False, True):
            both.append(_read(model, replace(plain, shares_prompts=is_shared)))
            work.append(place.work.take() * place.replica_ranks)
        apart[name] = float((both[1] - both[0]).abs().max() / both[0].abs().max())
        spared = forward_flops(model.shape, model.has_scalar_head, REPEATED)
        if not model.has_scalar_head:
            spared -= head_flops(model.shape, sum(REPEATED))
        assert work[0] - work[1] == pytest.approx(spared)
    if layout_name == "one":
        apart["mixture"] = _mixture(replace(plain, multiple_of=4), root)
    return apart


def _mixture(plain: Layout, root: Path) -> float:
    """As `_of_rank`, of a policy with experts, in rows that are filled up."""
    policy, found = trained(topology("one"), root / "mixture", False, SGD), []
    for layout in (plain, replace(plain, shares_prompts=True)):
        (micro,) = pair_microbatches(PAIRS, torch.zeros(len(PAIRS), 2), len(PAIRS), layout)
        loads = policy.gradients([micro], DPO.loss, [["x"]])
        found.append(whole(policy, lambda p: p.main_grad))
        shared = micro.batch.shared
        row, sequences = (micro.batch.tokens_T, sum(micro.batch.lengths))
        if shared is not None:
            row, sequences = shared.tokens_K, sequences - sum(shared.repeated)
        assert len(row) > sequences == int((~is_padding(micro.batch)).sum())
        assert "router/policy_load_max" in loads
    return max(float((found[1][name] - one).norm() / one.norm()) for name, one in found[0].items())


def _read(model: TrainedModel, layout: Layout) -> Tensor:
    batches = rollout_batches(GROUPED, layout, DRAWN).batches
    return torch.cat(
        [one[_real(batch)] for one, batch in zip(model.token_outputs(batches), batches, strict=True)]
    )


def _real(batch: TokenBatch) -> slice:
    """Without what fills up the row."""
    return slice(0, batch.last_positions[-1] + 1)


@pytest.mark.parametrize("layout", ["one", "tp2_pp2_v2_sp"])
def test_numbers_and_gradients_are_those_of_prompts_of_their_own(layout: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("policy", "reference", "critic"), start=7):
        write_llama(tmp_path / name, seed, is_scalar=name == "critic")
    write_family(tmp_path / "mixture", "qwen3_moe", False)
    for apart in run_ranks(LAYOUTS[layout][0], _of_rank, layout, tmp_path):
        print(layout, {kind: f"{worst:.1e}" for kind, worst in apart.items()})
        assert max(apart.values()) < 1e-6
