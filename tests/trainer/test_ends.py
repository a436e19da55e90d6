"""One set of tokens ends a sequence, in the pool, the trainer and the exports of a run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_megatron.algorithms.kl_controller import KLController, smallest_horizon
from rto_megatron.config.checks import find_problems
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.eos import read_eos, with_eos
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import ModelFolderError
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.types import EndOfSequence, Prompt, Rollout

EOS, PAD, WORD = 2, 3, 20


def policy_that_ends_with(ids: object, files: Path, folder: Path) -> Path:
    """A model whose generation_config.json names these ids, as Llama 3's names three."""
    shutil.copytree(files / "models/policy", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "top_p": 0.9}))
    return folder


def test_the_set_is_the_tokenizers_and_the_generation_configs(files: Path, tmp_path: Path) -> None:
    folder = policy_that_ends_with([PAD, WORD, 10**6], files, tmp_path / "policy")
    eos, warnings = read_eos(folder, load_tokenizer(folder), vocab_size=96)
    assert eos == EndOfSequence((EOS, PAD), EOS)
    assert f"names [{WORD}, {10**6}], which are no special tokens" in warnings[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["2"]}))
    with pytest.raises(ModelFolderError, match=r"eos_token_id is \['2'\], expected a token id"):
        read_eos(folder, load_tokenizer(folder), vocab_size=96)


@pytest.mark.parametrize(
    ("before", "after"), [(None, 2), (2, 2), (9, [9, 2]), ([9, 2], [9, 2]), ([9, 7], [9, 7, 2])]
)
def test_a_file_that_ends_elsewhere_gets_the_trained_end_and_keeps_its_own(
    before: object, after: object
) -> None:
    assert with_eos(before, EndOfSequence((EOS,), EOS)) == after


class Listening(ScriptedEngine):
    """Notes what it was asked for; every second response ends with the set's last token."""

    def __init__(self) -> None:
        super().__init__(ENGINE_VOCAB)
        self.asked: list[Sampling] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """Draws as ScriptedEngine does, with the other end."""
        self.asked.append(sampling)
        turned = Sampling(
            sampling.max_tokens, sampling.eos_ids[::-1], min_tokens=sampling.min_tokens, seed=sampling.seed
        )
        return super().generate(prompts, turned if version % 2 else sampling, version)


def test_the_pool_and_the_trainer_take_any_of_the_set(files: Path, tmp_path: Path) -> None:
    policy = policy_that_ends_with([PAD], files, tmp_path / "policy")
    config = configure("rto", files, tmp_path / "run", models__policy=policy, run__steps=2)

    def asked() -> list[tuple[int, ...]]:
        assert isinstance(config, ReinforcementStage)
        engine = Listening()
        train_online(config, join(config), ConnectedPool(engine, HeldPush(engine)))
        return [one.eos_ids for one in engine.asked]

    assert run_ranks(1, asked) == [[(EOS, PAD)] * 2]
    assert not (tmp_path / "run/poisoned.jsonl").exists()


def test_transformers_stops_an_export_where_it_was_trained_to(files: Path, tmp_path: Path) -> None:
    """Its own default is config.json's id, at which the model was never trained to stop."""
    policy = policy_that_ends_with(WORD, files, tmp_path / "policy")
    config_file = policy / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "eos_token_id": WORD}))
    run_dir = tmp_path / "run"
    assert run_ranks(1, train, configure("sft", files, run_dir, models__policy=policy, run__steps=1)) == [
        None
    ]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((run_dir / "hf" / name).read_text())["eos_token_id"] == [WORD, EOS]
    assert json.loads((run_dir / "hf/generation_config.json").read_text())["top_p"] == 0.9
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")

    def generated(folder: Path) -> int:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        prompt = torch.tensor([tokenizer.encode("red fox", add_special_tokens=False)])
        ids = model.generate(
            prompt, max_new_tokens=4, do_sample=False, pad_token_id=PAD,
            prefix_allowed_tokens_fn=lambda batch, before: [EOS],
        )  # fmt: skip
        return int(ids.shape[1] - prompt.shape[1])

    assert generated(run_dir / "hf") == 1
    assert generated(policy) == 4


@pytest.mark.parametrize("responses", [8, 9, 10, 1024])
def test_a_horizon_at_which_the_coefficient_ends_is_refused(
    responses: int, files: Path, tmp_path: Path
) -> None:
    smallest = smallest_horizon(responses)
    lowest = KLController(0.1, target=1.0, horizon=smallest).update(0.0, responses).coef
    assert lowest > 0 >= KLController(0.1, target=1.0, horizon=smallest - 1).update(0.0, responses).coef
    keys = {
        "batch__rollout": responses,
        "batch__train": responses,
        "batch__micro": 1,
        "algorithm__kl_target": 0.1,
    }
    bad = configure("rto", files, tmp_path / "run", algorithm__kl_horizon=smallest - 1, **keys)
    (problem,) = find_problems(bad, 1, {})
    assert problem.endswith(f"the smallest that works is algorithm.kl_horizon={smallest}")
    good = configure("rto", files, tmp_path / "run", algorithm__kl_horizon=smallest, **keys)
    assert find_problems(good, 1, {}) == []


def test_a_run_of_one_update_trains(files: Path, tmp_path: Path) -> None:
    """Its warm-up would be the whole run, at rate 0."""
    config = configure("sft", files, tmp_path / "run", run__steps=1)
    assert run_ranks(1, train, config) == [None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
        for folder in (files / "models/policy", tmp_path / "run/hf")
    )
    assert not torch.equal(before, after)
