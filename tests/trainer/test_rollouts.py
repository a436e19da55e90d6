"""Closing, scoring and comparing rollouts: the right token under every truncation policy, the right reference."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS, frozen, topology, trained
from ranks import run_ranks
from tiny_models import write_llama
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rto_megatron.algorithms.termination import TruncationPolicy
from rto_megatron.config.rollouts import SamplingConfig
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout, response_mask
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Sampling
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.reward_source import ModelReward
from rto_megatron.trainer.reward_sum import alone
from rto_megatron.trainer.sampler import sample
from rto_megatron.trainer.scoring import close_rollouts, score
from rto_megatron.types import EndOfSequence, Prompt, Rollout, ScoredRollouts, ValueScale

EOS = 2
END = EndOfSequence((EOS,), EOS)
ROLLOUTS = rollouts(4)  # the last one was cut by the length limit
POLICIES: tuple[TruncationPolicy, ...] = ("compat", "penalise", "bootstrap", "mask")
SCALE = ValueScale(mean=-0.3, std=1.7)


def test_only_compat_overwrites_and_only_cut_responses() -> None:
    for policy in POLICIES:
        closed = close_rollouts(ROLLOUTS, END, policy)
        assert closed[:3] == ROLLOUTS[:3]
        want = (*ROLLOUTS[3].response_ids[:-1], EOS) if policy == "compat" else ROLLOUTS[3].response_ids
        assert closed[3] == replace(ROLLOUTS[3], response_ids=want)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per role."""
    root = tmp_path_factory.mktemp("roles")
    for seed, role in enumerate(("policy", "reference", "dpo", "dpo_reference")):
        write_llama(root / role, seed)
    for seed, role in enumerate(("reward", "critic")):
        write_llama(root / role, seed + 10, is_scalar=True)
    return root


def _scores(layout: str, models: Path) -> dict[str, list[float]]:
    place = topology(layout)
    reward = replace(frozen(place, models / "reward", True), scale=SCALE)
    scores = {}
    for policy in POLICIES:
        closed = close_rollouts(ROLLOUTS, END, policy)
        for packed in (True, False):
            arranged = Layout(3, packed, 1, place.device.torch_device)
            scores[f"{policy}/{packed}"] = ModelReward(reward, arranged, END, policy).scores(closed).tolist()
    return scores


@torch.no_grad()
def test_the_score_is_read_at_the_end_of_sequence_token(models: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(models / "reward", attn_implementation="eager")
    for layout in ("one", "pp2"):
        for scores in run_ranks(LAYOUTS[layout][0], _scores, layout, models):
            for policy in POLICIES:
                want = []
                for rollout in ROLLOUTS:
                    ids = [*rollout.prompt_ids, *rollout.response_ids]
                    if rollout.finish_reason == "length":
                        ids = [*ids[:-1], EOS] if policy == "compat" else [*ids, EOS]
                    assert ids[-1] == EOS
                    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                    want.append((float(model.score(hidden)) - SCALE.mean) / SCALE.std)
                for packed in (True, False):
                    assert scores[f"{policy}/{packed}"] == pytest.approx(want, abs=1e-5)


def _roles(models: Path, place: Topology, layout: Layout, with_dpo: bool, own_reference: bool) -> Roles:
    adam = OptimizerConfig(lr=1e-3)
    return Roles(
        policy=trained(place, models / "policy", False, adam),
        average=None,
        critic=trained(place, models / "critic", True, adam),
        reference=frozen(place, models / "reference", False),
        reward=alone(ModelReward(frozen(place, models / "reward", True), layout, END, "penalise"), place),
        dpo=frozen(place, models / "dpo", False) if with_dpo else None,
        dpo_reference=frozen(place, models / "dpo_reference", False) if own_reference else None,
    )


def _scored(models: Path, with_dpo: bool, own_reference: bool) -> ScoredRollouts:
    place = topology("one")
    layout = Layout(2, True, 1, place.device.torch_device)
    roles = _roles(models, place, layout, with_dpo, own_reference)
    return score(ROLLOUTS, roles, layout, END, "penalise", SamplingConfig(min_response_tokens=0))


@torch.no_grad()
def _logprobs(folder: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    grid = torch.zeros(len(ROLLOUTS), max(len(r.response_ids) for r in ROLLOUTS))
    for row, r in enumerate(ROLLOUTS):
        tokens = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        logprobs = model(tokens).logits[0].log_softmax(-1)
        for column, token in enumerate(r.response_ids):
            grid[row, column] = logprobs[len(r.prompt_ids) + column - 1, token]
    return grid


def test_every_model_is_asked_and_the_dpo_reference_is_honoured(models: Path) -> None:
    ours = {name: _logprobs(models / name) for name in ("policy", "reference", "dpo", "dpo_reference")}
    assert (ours["dpo_reference"] - ours["reference"]).abs().max() > 0.1
    for with_dpo, own_reference in ((False, False), (True, False), (True, True)):
        (scored,) = run_ranks(1, _scored, models, with_dpo, own_reference)
        logratio = ours["dpo"] - ours["dpo_reference" if own_reference else "reference"]
        want = logratio if with_dpo else torch.zeros_like(logratio)
        torch.testing.assert_close(scored.dpo_logratio_BR, want, atol=2e-5, rtol=0)
        torch.testing.assert_close(scored.logp_old_BR, ours["policy"], atol=1e-5, rtol=0)
        torch.testing.assert_close(scored.logp_ref_BR, ours["reference"], atol=1e-5, rtol=0)
        assert torch.equal(scored.mask_BR, response_mask(ROLLOUTS, torch.device("cpu")))
        assert torch.equal(scored.mask_BR, (ours["policy"] != 0).float())


def test_values_are_those_of_the_states_before_the_actions(models: Path) -> None:
    (scored,) = run_ranks(1, _scored, models, False, False)
    model = LlamaForSequenceClassification.from_pretrained(models / "critic", attn_implementation="eager")
    for row, r in enumerate(ROLLOUTS):
        for column in range(len(r.response_ids)):
            state = torch.tensor([[*r.prompt_ids, *r.response_ids[:column]]])
            with torch.no_grad():
                value = model.score(model.model(state).last_hidden_state[0, -1])
            assert float(scored.values_BR[row, column]) == pytest.approx(float(value), abs=1e-5)


def _kept(policy: TruncationPolicy, min_tokens: int, models: Path) -> ScoredRollouts:
    place = topology("one")
    layout = Layout(2, True, 1, place.device.torch_device)
    sampled = [
        replace(r, sampled_logprobs=tuple(-0.5 - row - column for column in range(len(r.response_ids))))
        for row, r in enumerate(ROLLOUTS)
    ]
    how = SamplingConfig(min_response_tokens=min_tokens)
    return score(sampled, _roles(models, place, layout, False, False), layout, END, policy, how)


@pytest.mark.parametrize(
    ("policy", "min_tokens"), [("compat", 0), ("compat", 1), ("penalise", 0), ("penalise", 3)]
)
def test_log_probs_of_the_pool_lie_beside_ours_but_for_overwritten_tokens(
    policy: TruncationPolicy, min_tokens: int, models: Path
) -> None:
    (scored,) = run_ranks(1, _kept, policy, min_tokens, models)
    # The first token of a response that may not be empty: the pool leaves end-of-sequence out, and we do not.
    unlike = int(min_tokens == 1)
    for row, r in enumerate(ROLLOUTS):
        length = len(r.response_ids)
        assert scored.logp_pool_BR[row, :length].tolist() == [-0.5 - row - c for c in range(length)]
        overwritten = policy == "compat" and row == 3
        alike = [0.0] * unlike + [1.0] * (length - overwritten - unlike) + [0.0] * overwritten
        assert scored.sampled_BR[row, :length].tolist() == alike
        assert not scored.sampled_BR[row, length:].any() and not scored.logp_pool_BR[row, length:].any()
    assert scored.rollouts == close_rollouts(scored.rollouts, END, policy)
    assert scored.rollouts[3].response_ids[-1] == (
        EOS if policy == "compat" else ROLLOUTS[3].response_ids[-1]
    )


class _Recorder:
    """Answers with one fixed token and the data rank; fails on the replicas it is told to."""

    def __init__(self, data_rank: int, fails_on: int | None) -> None:
        self._data_rank = data_rank
        self._fails_on = fails_on

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        if self._fails_on == self._data_rank:
            raise UserError(f"server of replica {self._data_rank} is gone")
        return [
            Rollout(p.id, p.token_ids, (self._data_rank + 5, 2), (-0.25, -1 / 3), "stop", version)
            for p in prompts
        ]


def _sample(layout: str, fails_on: int | None) -> tuple[Rollout, ...] | str:
    place = topology(layout)
    prompts = [Prompt(f"{place.data_rank}-{i}", (1, i + 3)) for i in range(3)]
    engine = _Recorder(place.data_rank, fails_on) if place.is_replica_lead else None
    try:
        return sample(place, engine, prompts, Sampling(max_tokens=2, eos_ids=(2,)), version=4)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("layout", ["dp2", "tp2_pp2"])
def test_every_rank_of_a_replica_gets_what_its_lead_sampled(layout: str) -> None:
    for rank, sampled in enumerate(run_ranks(LAYOUTS[layout][0], _sample, layout, None)):
        data_rank = rank if layout == "dp2" else 0
        want = tuple(
            Rollout(f"{data_rank}-{i}", (1, i + 3), (data_rank + 5, 2), (-0.25, -1 / 3), "stop", 4)
            for i in range(3)
        )
        assert sampled == want


@pytest.mark.parametrize(("layout", "fails_on"), [("dp2", 1), ("tp2_pp2", 0)])
def test_a_failure_of_one_lead_is_raised_on_every_rank(layout: str, fails_on: int) -> None:
    answers = run_ranks(LAYOUTS[layout][0], _sample, layout, fails_on)
    assert answers == [f"server of replica {fails_on} is gone"] * LAYOUTS[layout][0]
