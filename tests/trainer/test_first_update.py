"""RTO's first step, from prompts to both gradients, against slow loops over what Hugging Face's models say."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from trainer.test_options import RecordingEngine
from trainer.tiny_runs import HeldPush, configure, join
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rto_megatron.config.schema import Stage
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.types import Rollout

END = 2
BETA_KL, BETA_DPO, DPO_CLIP, GAMMA, LAM, PENALTY = 0.2, 0.5, 0.4, 0.9, 0.8, 0.7
KEYS = {
    "beta_kl": BETA_KL,
    "beta_dpo": BETA_DPO,
    "dpo_clip": DPO_CLIP,
    "gamma": GAMMA,
    "lam": LAM,
    "truncated_penalty": PENALTY,
}


def _sampled(config: Stage) -> list[Rollout]:
    place, engine = join(config), RecordingEngine()
    train_online(config, place, ConnectedPool(engine, HeldPush(engine)))
    return engine.drawn


def _logprobs(model: LlamaForCausalLM, rollout: Rollout) -> Tensor:
    """Of each response token."""
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
    own = model(tokens).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
    return own.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


def _values(model: LlamaForSequenceClassification, ids: tuple[int, ...]) -> Tensor:
    """Of each token."""
    return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]


def _advantages(rewards: list[float], values: list[float]) -> list[float]:
    """Sum over k of (gamma lambda)^k delta_{t + k}."""
    after = [*values[1:], 0.0]
    deltas = [r + GAMMA * later - now for r, later, now in zip(rewards, after, values, strict=True)]
    places = range(len(deltas))
    return [sum((GAMMA * LAM) ** (k - t) * deltas[k] for k in places if k >= t) for t in places]


def _norm(loss: Tensor, model: LlamaForCausalLM | LlamaForSequenceClassification) -> float:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(torch.cat([one.flatten() for one in gradients]).norm())


def test_rewards_advantages_and_gradients_are_those_of_the_definition(files: Path, tmp_path: Path) -> None:
    keys = {"run__steps": 1, "run__save_every": None, "batch__train": 8, "algorithm": KEYS}
    (rollouts,) = run_ranks(1, _sampled, configure("rto", files, tmp_path, **keys))
    assert len(rollouts) == 8 and {r.finish_reason for r in rollouts} == {"stop", "length"}
    policy, reference, dpo = (
        LlamaForCausalLM.from_pretrained(files / "models" / name) for name in ("policy", "reference", "dpo")
    )
    critic, judge = (
        LlamaForSequenceClassification.from_pretrained(files / "models" / name)
        for name in ("critic", "reward")
    )
    logps, values, advantages, num_clipped, paid = [], [], [], 0, 0.0
    for rollout in rollouts:
        is_cut = rollout.finish_reason == "length"
        whole = (*rollout.prompt_ids, *rollout.response_ids)
        with torch.no_grad():
            logp_ref, logp_dpo = _logprobs(reference, rollout), _logprobs(dpo, rollout)
            score = float(_values(judge, (*whole, *([END] * is_cut)))[-1])
        logps.append(_logprobs(policy, rollout))
        values.append(_values(critic, whole)[len(rollout.prompt_ids) - 1 : -1])
        rewards = []
        for logp, ref, better in zip(logps[-1].tolist(), logp_ref.tolist(), logp_dpo.tolist(), strict=True):
            dense = BETA_DPO * (better - ref)
            num_clipped += abs(dense) > DPO_CLIP
            rewards.append(max(-DPO_CLIP, min(DPO_CLIP, dense)) - BETA_KL * (logp - ref))
        rewards[-1] += score - PENALTY * is_cut
        paid += score - PENALTY * is_cut
        advantages.append(_advantages(rewards, values[-1].tolist()))
    every = torch.tensor([one for row in advantages for one in row])
    spread = every.std(correction=0)
    policy_loss = critic_loss = torch.tensor(0.0)
    for logp, value, row in zip(logps, values, advantages, strict=True):
        own = torch.tensor(row)
        # The ratio to the policy that sampled is 1, and its gradient that of the log-prob.
        policy_loss = policy_loss - ((own - every.mean()) / spread * logp).mean() / 8
        critic_loss = critic_loss + 0.5 * (value - (own + value).detach()).square().mean() / 8
    (entry,) = read_metrics(tmp_path)
    assert 0 < num_clipped < len(every)
    assert entry["reward/score"] == pytest.approx(paid / 8, rel=1e-4)
    assert entry["reward/dpo_clip_fraction"] == pytest.approx(num_clipped / len(every))
    assert entry["advantage/mean"] == pytest.approx(float(every.mean()), rel=1e-4)
    assert entry["loss/value_avg"] == pytest.approx(critic_loss.item(), rel=1e-4)
    assert entry["critic/grad_norm"] == pytest.approx(_norm(critic_loss, critic), rel=1e-3)
    assert entry["policy/grad_norm"] == pytest.approx(_norm(policy_loss, policy), rel=1e-3)
