"""Where end-of-sequence was forbidden, policy and reference are compared without it, and the DPO reward is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import frozen, topology, trained
from ranks import run_ranks
from tiny_models import write_llama
from trainer.tiny_runs import configure, train, write_files
from transformers import LlamaForCausalLM, MinNewTokensLengthLogitsProcessor, TemperatureLogitsWarper

from rto_megatron.algorithms.termination import compared_ban
from rto_megatron.config.rollouts import SamplingConfig
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.evaluate import kl_to_reference
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.reward_source import ModelReward
from rto_megatron.trainer.reward_sum import alone
from rto_megatron.trainer.scoring import score
from rto_megatron.types import Distribution, EndOfSequence, Rollout, ScoredRollouts

END = EndOfSequence((2, 95), 2)
MIN_TOKENS = 5
NAMES = ("policy", "reference", "dpo", "dpo_reference")


def _sampled() -> list[Rollout]:
    """Responses as a pool leaves them that forbids to end before the fifth token; the last is cut there."""
    made = []
    for r in rollouts(8):
        words = [token for token in (*r.prompt_ids, *r.response_ids, *range(10, 20)) if token not in END.ids]
        end = () if r.finish_reason == "length" else (95 if len(made) % 2 else 2,)
        response = (*words[: MIN_TOKENS + len(made) % 3 - len(end)], *end)
        made.append(replace(r, response_ids=response, sampled_logprobs=(-1.0,) * len(response)))
    made[-1] = replace(
        made[-1], response_ids=made[-1].response_ids[:MIN_TOKENS], sampled_logprobs=(-1.0,) * MIN_TOKENS
    )
    assert made[-1].finish_reason == "length"
    return made


SAMPLED = _sampled()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per role."""
    root = tmp_path_factory.mktemp("roles")
    for seed, role in enumerate(NAMES):
        write_llama(root / role, seed)
    for seed, role in enumerate(("reward", "critic")):
        write_llama(root / role, seed + 10, is_scalar=True)
    return root


def _scored(
    models: Path, own_reference: bool, packed: bool, min_tokens: int, temperature: float
) -> ScoredRollouts:
    place = topology("one")
    layout = Layout(3, packed, 1, place.device.torch_device)
    roles = Roles(
        policy=trained(place, models / "policy", False, OptimizerConfig(lr=1e-3)),
        average=None,
        critic=None,
        reference=frozen(place, models / "reference", False),
        reward=alone(ModelReward(frozen(place, models / "reward", True), layout, END, "compat"), place),
        dpo=frozen(place, models / "dpo", False),
        dpo_reference=frozen(place, models / "dpo_reference", False) if own_reference else None,
    )
    how = SamplingConfig(min_response_tokens=min_tokens, temperature=temperature)
    return score(SAMPLED, roles, layout, END, "compat", how)


@torch.no_grad()
def _logprobs(
    folder: Path, closed: tuple[Rollout, ...], min_tokens: int, temperature: float = 1.0
) -> torch.Tensor:
    """transformers', with its own temperature, and rule for the shortest response, but where a token stands that it
    forbids."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    grid = torch.zeros(len(closed), max(len(r.response_ids) for r in closed))
    for row, r in enumerate(closed):
        tokens = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        logits = model(tokens).logits[0]
        rule = MinNewTokensLengthLogitsProcessor(len(r.prompt_ids), min_tokens, list(END.ids))
        for column, token in enumerate(r.response_ids):
            at = len(r.prompt_ids) + column
            whole = TemperatureLogitsWarper(temperature)(tokens[:, :at], logits[at - 1][None])
            left = rule(tokens[:, :at], whole.clone()) if token not in END.ids else whole
            grid[row, column] = left.log_softmax(-1)[0, token]
    return grid


@pytest.mark.parametrize(("min_tokens", "temperature"), [(0, 0.7), (1, 1.0), (MIN_TOKENS, 1.6)])
@pytest.mark.parametrize(("own_reference", "packed"), [(False, True), (True, False)])
def test_policy_and_reference_leave_out_what_could_not_be_sampled(
    models: Path, own_reference: bool, packed: bool, min_tokens: int, temperature: float
) -> None:
    (scored,) = run_ranks(1, _scored, models, own_reference, packed, min_tokens, temperature)
    banned = MIN_TOKENS if min_tokens == MIN_TOKENS else 0  # 1 stays as it was released
    compared = {name: _logprobs(models / name, scored.rollouts, banned, temperature) for name in NAMES}
    whole = {name: _logprobs(models / name, scored.rollouts, 0) for name in NAMES}
    torch.testing.assert_close(scored.logp_old_BR, compared["policy"], atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.logp_ref_BR, compared["reference"], atol=1e-5, rtol=0)
    logratio = whole["dpo"] - whole["dpo_reference" if own_reference else "reference"]
    torch.testing.assert_close(scored.dpo_logratio_BR, logratio, atol=2e-5, rtol=0)
    # The end that `compat` writes into the last banned place keeps the whole vocabulary.
    assert scored.rollouts[-1].response_ids[MIN_TOKENS - 1] == END.written
    assert torch.isfinite(scored.logp_old_BR).all()
    if banned or temperature != 1:
        assert (compared["policy"] - whole["policy"]).abs().max() > 1e-3
    if banned:
        finished = [r.finish_reason == "stop" for r in SAMPLED]
        assert scored.sampled_BR[finished, :MIN_TOKENS].all()


def _kl(models: Path) -> list[float]:
    place = topology("one")
    policy, reference = (frozen(place, models / name, False) for name in ("policy", "reference"))
    drawn = Distribution(ban=compared_ban(END, MIN_TOKENS))
    return kl_to_reference(SAMPLED, policy, reference, Layout(3, True, 1, place.device.torch_device), drawn)


def test_evaluation_compares_what_could_be_sampled(models: Path) -> None:
    (found,) = run_ranks(1, _kl, models)
    compared, whole = (
        _logprobs(models / "policy", tuple(SAMPLED), ban)
        - _logprobs(models / "reference", tuple(SAMPLED), ban)
        for ban in (MIN_TOKENS, 0)
    )
    torch.testing.assert_close(torch.tensor(found), compared.sum(1), atol=1e-4, rtol=0)
    assert (compared.sum(1) - whole.sum(1)).abs().max() > 1e-3


@pytest.mark.parametrize("min_tokens", [0, 1])
def test_an_empty_response_forbidden_is_no_ban(min_tokens: int) -> None:
    assert compared_ban(END, min_tokens) is None


def _train(root: Path, run_dir: Path) -> None:
    # One update of all responses: the policy is still the one that was compared.
    config = configure(
        "rto", root, run_dir, run__steps=1, run__save_every=None, batch__train=8, sampling__min_response_tokens=6,
        optimizer__warmup_fraction=0.0,
    )  # fmt: skip
    assert train(config) is None


def test_the_update_takes_log_probs_as_the_scoring_did(tmp_path: Path) -> None:
    write_files(tmp_path)
    run_ranks(1, _train, tmp_path, tmp_path / "run")
    (metrics,) = read_metrics(tmp_path / "run")
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/approxkl_avg"] < 1e-10
    assert metrics["policy/grad_norm"] > 0
