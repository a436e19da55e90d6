"""What the options of a reinforcement stage do to whole runs."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS, frozen, topology, trained
from megatron.core import dist_checkpointing
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import write_llama
from torch import Tensor
from trainer.tiny_runs import ENGINE_VOCAB, FailingEngine, HeldPush, configure, join, train, write_rows
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rto_megatron.algorithms import ppo
from rto_megatron.config.rollouts import SamplingConfig
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_texts
from rto_megatron.data.packing import Layout
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.engine.build_roles import update_average
from rto_megatron.engine.megatron import FrozenModel, TrainedModel
from rto_megatron.generation.contract import Sampling
from rto_megatron.platform.safe_metadata import safe_reading
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.reference import weights_fingerprint
from rto_megatron.trainer.reward_source import ModelReward
from rto_megatron.trainer.reward_sum import alone
from rto_megatron.trainer.scoring import close_rollouts, score
from rto_megatron.types import EndOfSequence, Experience, Prompt, Rollout, ScoredRollouts

END = EndOfSequence((2,), 2)
# One optimizer step per rollout step at a rate that does not depend on the length of the run.
CRITIC_FREE = {"batch__train": 8, "optimizer__schedule": "constant", "optimizer__warmup_fraction": 0.0}
STEADY = {
    **CRITIC_FREE,
    "critic_optimizer__schedule": "constant",
    "critic_optimizer__warmup_fraction": 0.0,
}


def exported(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def run(stage: str, files: Path, run_dir: Path, layout: str = "one", **changes: object) -> Path:
    """Runs a stage to its end."""
    num_ranks = LAYOUTS[layout][0]
    config = configure(stage, files, run_dir, layout, **changes)
    assert run_ranks(num_ranks, train, config) == [None] * num_ranks
    return run_dir


def _weights(run_dir: Path) -> dict[str, dict[str, Tensor]]:
    dist.init_process_group("gloo")
    found = {}
    for weights in sorted((run_dir / "checkpoints").glob("*/*/weights")):
        with safe_reading(weights):
            loaded = dist_checkpointing.load_plain_tensors(str(weights))
        step = int(weights.parent.parent.name.removeprefix("step_"))
        found[f"{weights.parent.name}/{step}"] = {
            key: value
            for key, value in loaded.items()
            if isinstance(value, Tensor) and not key.startswith("optimizer")
        }
    return found


def checkpoints(run_dir: Path) -> dict[str, dict[str, Tensor]]:
    """`role/step` -> weights, by Megatron's names, of every checkpoint that is kept."""
    (found,) = run_ranks(1, _weights, run_dir)
    assert all(found.values())
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit-equal in every tensor."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


class RecordingEngine(FailingEngine):
    """Keeps what it was asked and what it answered."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Rollout] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """Draws as FailingEngine does without faults."""
        drawn = super().generate(prompts, sampling, version)
        self.drawn += drawn
        return drawn


def _recorded(config: ReinforcementStage) -> list[Rollout]:
    place = join(config)
    engine = RecordingEngine()
    train_online(config, place, ConnectedPool(engine if place.is_replica_lead else None, HeldPush(engine)))
    return engine.drawn


@pytest.mark.parametrize("layout", ["one", "dp2"])
@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_every_prompt_is_answered_several_times_side_by_side(
    stage: str, layout: str, files: Path, tmp_path: Path
) -> None:
    keys = {"batch__rollout": 4, "algorithm__samples_per_prompt": 3, "batch__train": 4, "run__steps": 2}
    config = configure(stage, files, tmp_path, layout, **keys)
    assert isinstance(config, ReinforcementStage) and config.responses_per_step == 12
    prompts = set()
    for drawn in run_ranks(LAYOUTS[layout][0], _recorded, config):
        assert len(drawn) == 2 * 12 // LAYOUTS[layout][0]
        for start in range(0, len(drawn), 3):
            group = drawn[start : start + 3]
            assert len({(r.prompt_id, r.prompt_ids) for r in group}) == 1
            assert len({r.response_ids for r in group}) == 3
            prompts.add((group[0].prompt_id, group[0].weight_version))
    assert len(prompts) == 8
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]


def test_a_policy_that_has_not_moved_has_no_loss_but_the_kl(files: Path, tmp_path: Path) -> None:
    keys = {"batch__rollout": 4, "algorithm__samples_per_prompt": 2, "batch__train": 8, "run__steps": 1}
    for layout in ("one", "dp2"):
        run_dir = run("grpo", files, tmp_path / layout, layout, algorithm__truncated="compat", **keys)
        (entry,) = read_metrics(run_dir)
        # The ratio is 1, and the advantages of a group sum to zero.
        assert entry["loss/policy_avg"] == pytest.approx(0.0, abs=1e-6)
        assert entry["loss/kl_avg"] > 0
        assert entry["val/ratio"] == pytest.approx(1.0, abs=1e-5)


def test_an_adaptive_coefficient_counts_every_response(files: Path, tmp_path: Path) -> None:
    target, horizon = 0.05, 50
    keys = {"algorithm__kl_target": target, "algorithm__kl_horizon": horizon, "run__steps": 3}
    run_dir = run("ppo", files, tmp_path, batch__rollout=4, algorithm__samples_per_prompt=2, **keys)
    entries = read_metrics(run_dir)
    coef = 0.01
    for entry in entries:
        assert entry["objective/kl_coef"] == pytest.approx(coef, rel=1e-9)
        error = min(max(entry["policy/kl_per_token"] / target - 1, -0.2), 0.2)
        coef *= 1 + error * 8 / horizon
    assert entries[0]["objective/kl_coef"] != entries[-1]["objective/kl_coef"]
    assert entries[1]["reward/kl_per_token"] == pytest.approx(
        -entries[1]["objective/kl_coef"] * entries[1]["policy/kl_per_token"], rel=1e-5
    )


def test_the_critic_is_trained_alone_at_first(files: Path, tmp_path: Path) -> None:
    keys = {**STEADY, "run__steps": 3, "run__save_every": 1, "run__keep_checkpoints": 3}
    run_dir = run("ppo", files, tmp_path, algorithm__critic_warmup_steps=2, **keys)
    found = checkpoints(run_dir)
    assert same(found["policy/1"], found["policy/2"])
    assert not same(found["policy/2"], found["policy/3"])
    for step in (1, 2):
        assert not same(found[f"critic/{step}"], found[f"critic/{step + 1}"])
    entries = read_metrics(run_dir)
    assert ["lr/policy" in entry for entry in entries] == [False, False, True]
    assert ["policy/grad_norm" in entry for entry in entries] == [False, False, True]
    assert all("critic/grad_norm" in entry for entry in entries)
    assert not same(load_file(files / "models/policy/model.safetensors"), exported(run_dir / "hf"))


def test_an_average_is_taken_after_every_optimizer_step(files: Path, tmp_path: Path) -> None:
    one = {**STEADY, "run__steps": 1, "run__save_every": 1}
    start = load_file(files / "models/policy/model.safetensors")
    stepped = exported(run("ppo", files, tmp_path / "plain", **one) / "hf")
    averaged = exported(run("ppo", files, tmp_path / "averaged", algorithm__ema_beta=0.75, **one) / "hf")
    for name, average in averaged.items():
        torch.testing.assert_close(average, 0.75 * start[name] + 0.25 * stepped[name], rtol=1e-6, atol=1e-9)
    assert not same(averaged, stepped) and not same(averaged, start)
    plain, with_average = checkpoints(tmp_path / "plain"), checkpoints(tmp_path / "averaged")
    assert "policy_ema/1" not in plain
    assert same(plain["policy/1"], with_average["policy/1"])


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.slow), "tp2"])
def test_an_average_follows_its_definition_and_survives_a_resume(
    layout: str, files: Path, tmp_path: Path
) -> None:
    keys = {**STEADY, "run__steps": 2, "run__save_every": 1, "algorithm__ema_beta": 0.5}
    run_dir = run("ppo", files, tmp_path / "whole", layout, **keys)
    found = checkpoints(run_dir)
    for name, average in found["policy_ema/2"].items():
        expected = 0.5 * found["policy_ema/1"][name] + 0.5 * found["policy/2"][name]
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-9)
    assert not same(found["policy_ema/1"], found["policy_ema/2"])
    shutil.copytree(run_dir, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step_000002")
    (tmp_path / "resumed/checkpoints/latest").unlink()
    shutil.rmtree(tmp_path / "resumed/hf")
    run("ppo", files, tmp_path / "resumed", layout, **keys)
    resumed = checkpoints(tmp_path / "resumed")
    assert all(same(found[key], resumed[key]) for key in found)
    assert same(exported(run_dir / "hf"), exported(tmp_path / "resumed/hf"))


def _fingerprints(*folders: Path) -> list[str]:
    place = topology("one")
    return [weights_fingerprint(frozen(place, folder, False)) for folder in folders]


def test_a_later_stage_starts_from_the_average(files: Path, tmp_path: Path) -> None:
    keys = {**STEADY, "run__steps": 1, "run__save_every": 1, "optimizer__lr": 1e-2}
    run_dir = run("ppo", files, tmp_path / "averaged", algorithm__ema_beta=0.5, **keys)
    plain = run("ppo", files, tmp_path / "plain", **keys)
    ((of_run, of_export, of_policy),) = run_ranks(1, _fingerprints, run_dir, run_dir / "hf", plain / "hf")
    assert of_run == of_export != of_policy
    # A rate below the last bit of every weight: a stage exports what it started from.
    later = {"models__policy": run_dir, "run__steps": 1, "run__save_every": None}
    started = run("sft", files, tmp_path / "sft", optimizer__lr=1e-30, **later)
    assert same(exported(started / "hf"), exported(run_dir / "hf"))


def test_one_step_of_the_average_equals_golden() -> None:
    def model(weight: float) -> SimpleNamespace:
        module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(module.weight, weight)
        return SimpleNamespace(module=module)

    average, policy = model(1.0), model(2.0)
    update_average(cast(FrozenModel, average), cast(TrainedModel, policy), 0.992)
    assert average.module.weight.item() == pytest.approx(1.008, rel=1e-6)
    assert policy.module.weight.item() == 2.0


TEXTS = ("red fox", "blue dog cat", "sun moon star rain", "snow", "wind red", "green", "cat star", "rain fox")
SGD = {
    **STEADY,
    "optimizer__kind": "sgd",
    "optimizer__lr": 1.0,
    "optimizer__max_grad_norm": None,
    "run__steps": 1,
    "run__save_every": None,
}


def language_model_loss(files: Path, texts: Path) -> tuple[float, dict[str, Tensor]]:
    """Mean over all tokens but each text's first, and its gradients, by Hugging Face."""
    model = LlamaForCausalLM.from_pretrained(files / "models/policy", attn_implementation="eager")
    loaded = load_texts(str(texts), load_tokenizer(files / "tokenizer"), Limits(100, 100, "error"))
    total, count = torch.tensor(0.0), 0
    for text in loaded.items:
        ids = torch.tensor([[*text.prompt_ids, *text.response_ids]])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        total = total - logprobs.gather(1, ids[0, 1:, None]).sum()
        count += len(text.response_ids)
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["one", "dp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_texts_add_their_gradient_to_that_of_the_policy(layout: str, files: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    write_rows(texts, [{"text": text} for text in TEXTS])
    loss, gradients = language_model_loss(files, texts)
    without = exported(run("ppo", files, tmp_path / "without", layout, **SGD) / "hf")
    worst = 0.0
    for coef in (0.5, 2.0) if layout == "one" else (2.0,):
        keys = {**SGD, "data__pretrain": str(texts), "algorithm__ptx_coef": coef}
        run_dir = run("ppo", files, tmp_path / f"with_{coef}", layout, **keys)
        added = {name: tensor - without[name] for name, tensor in exported(run_dir / "hf").items()}
        for name, delta in added.items():
            expected = -coef * gradients[name]
            worst = max(worst, float((delta - expected).norm() / expected.norm()))
        (entry,) = read_metrics(run_dir)
        assert entry["loss/ptx_avg"] == pytest.approx(loss, rel=1e-5)
        # The texts are no responses: they are not counted among them.
        (plain,) = read_metrics(tmp_path / "without")
        assert entry["loss/policy_avg"] == pytest.approx(plain["loss/policy_avg"], rel=1e-5, abs=1e-7)
    print(f"{layout}: largest relative difference {worst:.1e}")
    assert worst < 1e-3


def test_texts_are_walked_through_in_a_resumed_run_as_in_a_whole_one(files: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    write_rows(texts, [{"text": f"{one} {other}"} for one in TEXTS for other in TEXTS])
    keys = {
        **CRITIC_FREE,
        "run__steps": 2,
        "run__save_every": 1,
        "data__pretrain": str(texts),
        "batch__rollout": 4,
        "algorithm__samples_per_prompt": 2,
    }
    whole = run("grpo", files, tmp_path / "whole", **keys)
    shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step_000002")
    (tmp_path / "resumed/checkpoints/latest").unlink()
    shutil.rmtree(tmp_path / "resumed/hf")
    run("grpo", files, tmp_path / "resumed", **keys)
    assert same(exported(whole / "hf"), exported(tmp_path / "resumed/hf"))
    logs = [read_metrics(tmp_path / name) for name in ("whole", "resumed")]
    first, second = ([entry["loss/ptx_avg"] for entry in log] for log in logs)
    assert first == second
    assert first[0] != first[1]


def _bootstrapped(root: Path, policy: str) -> tuple[ScoredRollouts, Experience]:
    place = topology("one")
    adam = OptimizerConfig(lr=1e-3)
    config = ppo.Config.model_validate({"truncated": policy, "lam": 0.5, "gamma": 0.9})
    layout = Layout(3, True, 1, place.device.torch_device)
    roles = Roles(
        policy=trained(place, root / "policy", False, adam),
        average=None,
        critic=trained(place, root / "critic", True, adam),
        reference=frozen(place, root / "reference", False),
        reward=alone(ModelReward(frozen(place, root / "reward", True), layout, END, config.truncated), place),
        dpo=None,
        dpo_reference=None,
    )
    closed = close_rollouts(rollouts(), END, config.truncated)
    scored = score(closed, roles, layout, END, config.truncated, SamplingConfig(min_response_tokens=0))
    return scored, ppo.build(config, lambda _: frozenset()).credit(scored, 0.1, place.dp_sum)


def test_a_cut_response_continues_with_the_critics_value_behind_its_last_token(tmp_path: Path) -> None:
    for seed, role in enumerate(("policy", "reference", "reward", "critic")):
        write_llama(tmp_path / role, seed, is_scalar=role in ("reward", "critic"))
    ((scored, experience),) = run_ranks(1, _bootstrapped, tmp_path, "bootstrap")
    critic = LlamaForSequenceClassification.from_pretrained(tmp_path / "critic", attn_implementation="eager")
    is_cut = [rollout.finish_reason == "length" for rollout in scored.rollouts]
    assert sum(is_cut) == 2
    for row, rollout in enumerate(scored.rollouts):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        with torch.no_grad():
            behind = float(critic.score(critic.model(ids).last_hidden_state[0, -1]))
        last = len(rollout.response_ids) - 1
        paid = float(scored.score_B[row]) if not is_cut[row] else 0.0
        assert float(scored.bootstrap_B[row]) == pytest.approx(behind if is_cut[row] else 0.0, abs=1e-5)
        kl = float(scored.logp_old_BR[row, last] - scored.logp_ref_BR[row, last])
        want = paid - 0.1 * kl + 0.9 * (behind if is_cut[row] else 0.0)
        assert float(experience.returns_BR[row, last]) == pytest.approx(want, abs=1e-4)
        assert float(experience.rewards.score_BR[row].sum()) == pytest.approx(paid, abs=1e-5)
    ((penalised, _),) = run_ranks(1, _bootstrapped, tmp_path, "penalise")
    assert not penalised.bootstrap_B.any()
    assert torch.equal(replace(penalised, bootstrap_B=scored.bootstrap_B).values_BR, scored.values_BR)


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_cut_responses_can_be_bootstrapped_in_a_whole_run(layout: str, files: Path, tmp_path: Path) -> None:
    keys = {**STEADY, "run__steps": 1, "run__save_every": None}
    run_dir = run("ppo", files, tmp_path / "bootstrap", layout, algorithm__truncated="bootstrap", **keys)
    other = run("ppo", files, tmp_path / "mask", layout, algorithm__truncated="mask", **keys)
    ((entry,), (masked,)) = read_metrics(run_dir), read_metrics(other)
    assert 0 < entry["rollout/truncated_fraction"] == masked["rollout/truncated_fraction"] < 1
    assert entry["reward/score"] != masked["reward/score"]
    assert entry["value/return_mean"] != masked["value/return_mean"]


def test_delimiters_that_no_token_holds_are_refused(files: Path, tmp_path: Path) -> None:
    config = configure("semi_rto", files, tmp_path)
    (error,) = run_ranks(1, train, config)
    assert error is not None
    assert "no token of the vocabulary holds one of ['.', '!', '?', '\\n']" in error
    assert not (tmp_path / "checkpoints").exists()


def test_delimiters_move_the_dpo_reward_of_a_run_but_not_its_sum(files: Path, tmp_path: Path) -> None:
    keys = {**STEADY, "run__steps": 1, "run__save_every": None}
    semi = run("semi_rto", files, tmp_path / "semi_rto", algorithm__delimiters=("e",), **keys)
    rto = run("rto", files, tmp_path / "rto", **keys)
    ((moved,), (plain,)) = read_metrics(semi), read_metrics(rto)
    for name in ("reward/dpo_per_token", "reward/dpo_clip_fraction", "reward/score"):
        assert moved[name] == pytest.approx(plain[name], rel=1e-4), name
    assert moved["value/return_mean"] != pytest.approx(plain["value/return_mean"], rel=1e-4)
    tokenizer = load_tokenizer(files / "tokenizer")
    assert any("e" in tokenizer.decode([token]) for token in range(4, ENGINE_VOCAB))
