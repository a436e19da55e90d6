"""The pool's log-probs as those of the old policy: what the trainer's would teach, without its forward."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS
from engine.test_layout_parity import PromptEngine
from ranks import run_ranks
from torch import Tensor
from trainer.test_options import exported
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join
from transformers import LlamaForCausalLM

from rto_megatron.algorithms.pool_importance import pool_log_ratio
from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.generation.contract import Sampling
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.checked_scores import Scorer
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import build_roles, train_online
from rto_megatron.trainer.setup import prepare_stage
from rto_megatron.types import Prompt, Rollout, ScoredRollouts


@torch.no_grad()
def logprobs(model: LlamaForCausalLM, rollout: Rollout) -> Tensor:
    """Hugging Face's, of the response's tokens."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
    of_next = model(ids).logits[0, :-1].log_softmax(-1)
    return of_next.gather(1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1 :, 0]


class HonestEngine(PromptEngine):
    """Says the log-probs that a model folder gives of what it drew, `shift` nats too high."""

    def __init__(self, folder: Path, shift: float) -> None:
        super().__init__(ENGINE_VOCAB)
        self._model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self._shift = shift

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        drawn = super().generate(prompts, sampling, version)
        said = [tuple((logprobs(self._model, one) + self._shift).tolist()) for one in drawn]
        return [replace(one, sampled_logprobs=spoken) for one, spoken in zip(drawn, said, strict=True)]


def _train(config: ReinforcementStage, shift: float) -> None:
    place = join(config)
    engine = HonestEngine(config.models.policy, shift) if place.is_replica_lead else None
    train_online(config, place, ConnectedPool(engine, HeldPush(engine)))


SGD = {"kind": "sgd", "lr": 0.05, "schedule": "constant", "warmup_fraction": 0.0}
SAMPLING = {"max_response_tokens": 8, "min_response_tokens": 0}
BATCH = {"rollout": 20, "train": 20, "micro": 2}
POOL = {"rollout__old_logprobs": "pool"}


def run(
    files: Path, run_dir: Path, layout: str = "one", shift: float = 0.0, **keys: object
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What two passes over a rollout step of RTO export, and its metrics."""
    config = configure(
        "rto", files, run_dir, layout, run__steps=1, run__save_every=None, optimizer=SGD, critic_optimizer=SGD,
        sampling=SAMPLING, algorithm__epochs=2, algorithm__beta_kl=0.5, **{"batch": BATCH, **keys},
    )  # fmt: skip
    run_ranks(LAYOUTS[layout][0], _train, config, shift)
    (entry,) = read_metrics(run_dir)
    return exported(run_dir / "hf"), entry


def _flops(entry: dict[str, float]) -> float:
    return entry["time/model_tflops"] * entry["time/step_s"]


def test_an_honest_pool_teaches_what_the_trainers_own_log_probs_do(files: Path, tmp_path: Path) -> None:
    plain, own = run(files, tmp_path / "trainer")
    taught, entry = run(files, tmp_path / "pool", **POOL)
    start = exported(files / "models/policy")
    for name, tensor in plain.items():
        moved = float((tensor - start[name]).abs().max())
        assert moved > 0 and float((taught[name] - tensor).abs().max()) < 1e-3 * moved, name
    timed = ("time", "memory/", "pool/logprob_gap")
    for name, value in own.items():
        assert name.startswith(timed) or entry[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert entry["pool/logprob_gap_max"] < 1e-5 and entry["pool/logprob_gap_alarm"] == 0
    # Five forwards to score and two passes of three forwards' work for policy and critic, less one forward of 18 in 20.
    assert _flops(entry) / _flops(own) == pytest.approx(1 - 0.9 / 17, abs=0.005)


def test_the_gap_to_a_wrong_pool_is_measured_and_rings(files: Path, tmp_path: Path) -> None:
    # The critic lies on a rank of its own, which hears what two replicas of the policy say, each of one response of
    # those that it scores.
    keys = {
        "parallel__roles": {"critic": {"ranks": "2"}},
        "batch": {"rollout": 20, "train": 20, "tokens": 64},
    }
    _, entry = run(files, tmp_path / "pool", "dp2_of_3", shift=0.25, **POOL, **keys)
    assert entry["pool/logprob_gap_mean"] == pytest.approx(0.25, abs=1e-5)
    assert entry["pool/logprob_gap_alarm"] == 1


def _sampled(files: Path, run_dir: Path) -> tuple[ScoredRollouts, Tensor]:
    model = LlamaForCausalLM.from_pretrained(files / "models/policy", attn_implementation="eager")
    config = configure("rto", files, run_dir, sampling=SAMPLING, **POOL)
    setup = prepare_stage(config, join(config))
    drawn = rollouts(18)
    scored = Scorer(config, setup, build_roles(config, setup)).opinions(drawn, step=1)
    want = torch.zeros_like(scored.logp_pool_BR)
    for row in (0, 16):
        want[row, : len(drawn[row].response_ids)] = logprobs(model, drawn[row])
    return scored, want


def test_the_trainers_policy_is_asked_of_one_response_in_sixteen(files: Path, tmp_path: Path) -> None:
    ((scored, want),) = run_ranks(1, _sampled, files, tmp_path)
    assert scored.by_trainer is not None
    assert scored.by_trainer.is_asked_B.nonzero().flatten().tolist() == [0, 16]
    torch.testing.assert_close(scored.by_trainer.logp_BR, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.logp_old_BR, -scored.mask_BR)  # as the rollouts say
    compared = want[[0, 16]] + scored.mask_BR[[0, 16]]
    total = float(pool_log_ratio(scored).sum())
    assert total == pytest.approx(float(compared.sum()), rel=1e-4)


def test_log_probs_of_anything_else_than_what_was_sampled_are_refused() -> None:
    recipe = Path(__file__).parents[2] / "launchers" / "recipes" / "llama3_8b" / "rto.yaml"

    def problems(*overrides: str) -> list[str]:
        return find_problems(load_recipe(recipe, ("rollout.old_logprobs=pool", *overrides)), 4, {})

    (first,) = problems()
    assert "sampling.min_response_tokens=1 the pool's log-prob of a first token leaves end-of-seq" in first
    for whole in ("0", "2"):
        assert problems(f"sampling.min_response_tokens={whole}", "sampling.temperature=0.7") == []
    base = "sampling.min_response_tokens=0"
    for override, part in (
        ("algorithm.truncated=compat", "algorithm.truncated=compat trains on end-of-sequence"),
        ("algorithm.pool_importance_cap=2", "algorithm.pool_importance_cap=2 would correct nothing"),
        ("sampling.top_k=4", "with sampling.top_k=4 the pool's log-probs are of the likeliest tokens alone"),
    ):
        assert any(part in problem for problem in problems(base, override)), override
    # The ratio to the pool's policy is the correction that rollouts of older weights need.
    assert problems(base, "rollout.ahead=1") == []
