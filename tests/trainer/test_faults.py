"""What goes wrong is refused on every rank, by name, before a weight changes or a checkpoint is written."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, topology, trained
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from stepping import take_step
from tiny_models import SEQUENCES, write_llama
from tiny_tokenizers import change_json, set_padding
from trainer.tiny_runs import ENGINE_VOCAB, WORDS, configure, train, write_rows

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.schema import Stage
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout, supervised_microbatches
from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from rto_megatron.errors import ModelFolderError, RecipeError, TokenizerError, UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare
from rto_megatron.trainer.setup import prepare_stage
from rto_megatron.types import Demonstration, LossOutput

DATA = [Demonstration(f"s{i}", tuple(ids[:p]), tuple(ids[p:])) for i, (ids, p) in enumerate(SEQUENCES)]


def place_of(tensor: int, pipeline: int, data: int = 1) -> Topology:
    """A place in a layout that was never started: enough for what is checked before any model is built."""
    return Topology(prepare(), 0, 0, tensor, 0, pipeline, 0, data, False)


def poison(source: Path, folder: Path, token: int) -> Path:
    """A copy of a model that is not finite on every sequence that holds `token`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rare_prompt(files: Path, root: Path) -> tuple[int, str]:
    """Prompts of which one, `rare`, holds a token that no other prompt and no sampled response holds."""
    tokenizer = load_tokenizer(files / "tokenizer")
    known = {word: tokenizer.encode(f" {word}", add_special_tokens=False) for word in WORDS}
    word, token = next((w, ids[0]) for w, ids in known.items() if len(ids) == 1 and ids[0] >= ENGINE_VOCAB)
    others = [w for w in WORDS if w != word]
    texts = [f"{others[i % 11]} {others[(i * 3 + 1) % 11]}" for i in range(15)]
    rows = [(f"p{i}", text) for i, text in enumerate(texts)]
    rows.insert(3, ("rare", f"{others[0]} {word}"))
    turns = [{"prompt_id": i, "context_messages": [{"role": "user", "content": text}]} for i, text in rows]
    write_rows(root / "prompts.jsonl", turns)
    return token, str(root / "prompts.jsonl")


@pytest.mark.parametrize(
    ("role", "layout"),
    [("reward", "dp2"), ("reward", "pp2"), ("critic", "one"), ("dpo", "one"), ("policy", "tp2")],
)
def test_a_number_that_is_not_finite_stops_before_the_update(
    role: str, layout: str, files: Path, tmp_path: Path
) -> None:
    token, prompts = rare_prompt(files, tmp_path)
    bad = poison(files / "models" / role, tmp_path / role, token)
    config = configure(
        "rto", files, tmp_path / "run", layout, data__train=prompts, batch__rollout=16,
        run__max_skipped_updates=1, **{f"models__{role}": bad},
    )  # fmt: skip
    for error in run_ranks(LAYOUTS[layout][0], train, config):
        assert error is not None
        assert "NaN or infinite on 1 samples, ['rare']" in error
        assert {"reward": "reward model", "dpo": "DPO model"}.get(role, role) in error
    assert not (tmp_path / "run/checkpoints").exists()
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""


def _poisoned_step(layout: str, folder: Path, kind: str) -> tuple[str, bool]:
    """One step whose loss, or gradient alone, is not finite on sample s2; the error, and whether weights moved."""
    place = topology(layout)
    model = trained(place, folder, False, OptimizerConfig(lr=1e-2))
    own = DATA[place.data_rank :: place.data_size]
    microbatches = supervised_microbatches(own, 100, Layout(1, True, 1, place.device.torch_device))
    sft = SFT(Config())

    def loss(logp_T: torch.Tensor, micro: object) -> LossOutput:
        output = sft.loss(logp_T, micro)
        if micro.batch.tokens_T.numel() != len(SEQUENCES[2][0]):
            return output
        if kind == "loss":
            return LossOutput(output.loss * float("inf"), output.sums)
        # The root of zero is zero, and its slope is infinite.
        return LossOutput(output.loss + (logp_T - logp_T.detach()).sum().square().sqrt(), output.sums)

    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    try:
        take_step(model, microbatches, loss, [[one.id] for one in own], lr=1e-2)
    except UserError as error:
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))
        return str(error), moved
    return "", True


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2", "tp2"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_weight(
    layout: str, kind: str, tmp_path: Path
) -> None:
    write_llama(tmp_path)
    for message, moved in run_ranks(LAYOUTS[layout][0], _poisoned_step, layout, tmp_path, kind):
        assert f"{kind} of policy is NaN or infinite on " in message
        assert not moved
        if kind == "loss":
            assert "['s2']" in message


def test_rollouts_of_an_old_version_are_refused(files: Path, tmp_path: Path) -> None:
    config = configure("rto", files, tmp_path / "run", "tp2")
    for error in run_ranks(2, train, config, age=1):
        assert error is not None
        assert "was sampled by policy version -1, expected 0; nothing was trained on it" in error
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_pool_that_dies_ends_every_rank(files: Path, tmp_path: Path) -> None:
    config = configure("rto", files, tmp_path / "run", "dp2", run__steps=1)
    assert run_ranks(2, train, config, dies_at=0) == ["the pool died at version 0"] * 2


def refused(config: Stage, place: Topology, kind: type[UserError] = RecipeError) -> str:
    """The error of `prepare_stage`."""
    with pytest.raises(kind) as caught:
        prepare_stage(config, place)
    return str(caught.value)


def test_everything_wrong_with_the_layout_is_listed_at_once(files: Path, tmp_path: Path) -> None:
    config = configure("rto", files, tmp_path / "run", batch__train=3)
    config = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"tensor": 3, "pipeline": 3})}
    )
    train_tokenizer(["other words of another tongue"], tmp_path / "dpo", 40, byte_fallback=False)
    shutil.copy(files / "models/dpo/config.json", tmp_path / "dpo")
    config = config.model_copy(update={"models": config.models.model_copy(update={"dpo": tmp_path / "dpo"})})
    message = refused(config, place_of(3, 3, data=2))
    for role in ("policy", "reference", "reward", "critic", "dpo"):
        assert f"models.{role}: parallel.tensor=3 does not divide num_attention_heads=4" in message
        assert f"models.{role}: parallel.tensor=3 does not divide num_key_value_heads=2" in message
        assert f"models.{role}: parallel.pipeline=3 does not divide num_hidden_layers=4" in message
    assert f"models.dpo: the tokenizer in {tmp_path / 'dpo'} differs from the one of models.policy" in message
    assert "models.reward: the tokenizer" not in message
    assert "batch.train=3 is not a multiple of" in message


def test_only_the_policy_needs_a_chat_template(files: Path, tmp_path: Path) -> None:
    for role in ("policy", "reference"):
        shutil.copytree(files / "models" / role, tmp_path / role)
        path = tmp_path / role / "tokenizer_config.json"
        tokenizer = json.loads(path.read_text())
        del tokenizer["chat_template"]
        path.write_text(json.dumps(tokenizer))
    prepare_stage(
        configure("dpo", files, tmp_path / "run", models__reference=tmp_path / "reference"), place_of(1, 1)
    )
    config = configure("dpo", files, tmp_path / "run", models__policy=tmp_path / "policy")
    assert "no chat template" in refused(config, place_of(1, 1), TokenizerError)


def test_a_reward_model_without_mean_and_std_is_announced(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files / "models/critic", tmp_path / "critic")
    path = tmp_path / "critic/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mean": 0.1, "std": 2.0}))
    prepare_stage(
        configure("rto", files, tmp_path / "run", models__critic=tmp_path / "critic"), place_of(1, 1)
    )
    said = capsys.readouterr().out
    assert f"models.reward: {files / 'models/reward'}/config.json has no mean and std" in said
    assert said.count("has no mean and std") == 1


def test_a_reward_model_whose_score_transformers_reads_elsewhere_is_announced(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files / "models/reward", tmp_path / "reward")
    config = configure("rto", files, tmp_path / "run", models__reward=tmp_path / "reward")
    prepare_stage(config, place_of(1, 1))
    assert "transformers reads the scores" not in capsys.readouterr().out
    set_padding(tmp_path / "reward", "</s>", 2)
    prepare_stage(config, place_of(1, 1))
    said = capsys.readouterr().out
    assert f"models.reward: transformers reads the scores of {tmp_path / 'reward'} one token before" in said
    change_json(tmp_path / "reward/config.json", mean=0.1, std=2.0)  # as this program writes them
    prepare_stage(config, place_of(1, 1))
    assert "transformers reads the scores" not in capsys.readouterr().out


def test_weights_that_lie_unread_beside_the_read_ones_are_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files / "models/policy", tmp_path / "policy")
    (tmp_path / "policy/pytorch_model.bin").write_bytes(b"x")
    prepare_stage(
        configure("rto", files, tmp_path / "run", models__policy=tmp_path / "policy"), place_of(1, 1)
    )
    said = capsys.readouterr().out
    assert (
        f"models.policy: {tmp_path / 'policy'}: weights are read from model.safetensors, which transformers takes; "
        "not read are pytorch_model.bin beside it" in said
    )


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            "Qwen/Qwen2.5-0.5B",
            "hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B, and name Qwen2.5-0.5B",
        ),
        ("runs/quickstart/sft", "runs/quickstart/sft does not exist; run the stage that makes it first"),
    ],
)
def test_a_hub_name_is_told_to_download_and_a_run_to_be_run(
    named: str, message: str, files: Path, tmp_path: Path
) -> None:
    error = refused(
        configure("dpo", files, tmp_path / "run", models__policy=Path(named)),
        place_of(1, 1),
        ModelFolderError,
    )
    assert f"models.policy: {named} does not exist" in error and message in error
    assert ("hf download" in error) == named.startswith("Qwen")


@pytest.mark.parametrize("role", ["policy", "reference", "reward", "critic", "dpo"])
def test_a_missing_model_is_named(role: str, files: Path, tmp_path: Path) -> None:
    config = configure("rto", files, tmp_path / "run", **{f"models__{role}": tmp_path / "absent"})
    assert f"models.{role}: {tmp_path / 'absent'} does not exist" in refused(
        config, place_of(1, 1), ModelFolderError
    )


def test_a_run_without_a_finished_checkpoint_is_no_model(files: Path, tmp_path: Path) -> None:
    (tmp_path / "sft/checkpoints/.partial_step_000001/policy/weights").mkdir(parents=True)
    config = configure("rto", files, tmp_path / "run", models__policy=tmp_path / "sft")
    message = refused(config, place_of(1, 1), ModelFolderError)
    assert f"models.policy: {tmp_path / 'sft'} holds neither config.json nor a finished checkpoint" in message
    (tmp_path / "sft/checkpoints/step_000001/reward/weights").mkdir(parents=True)
    assert "finished checkpoint of policy_ema or policy; found ['reward']" in refused(
        config, place_of(1, 1), ModelFolderError
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty: it has 0 bytes"),
        ([("p0", "red " * 200)], "no rows to use; 1 read, 1 dropped with a prompt over its limit"),
        ([("p0", "red"), ("p1", "blue")], "2 items, fewer than one global batch of 8"),
    ],
)
def test_too_few_prompts_are_refused(
    rows: Sequence[tuple[str, str]], message: str, files: Path, tmp_path: Path
) -> None:
    turns = [{"prompt_id": i, "context_messages": [{"role": "user", "content": t}]} for i, t in rows]
    write_rows(tmp_path / "prompts.jsonl", turns)
    config = configure("rto", files, tmp_path / "run", "tp2", data__train=str(tmp_path / "prompts.jsonl"))
    for error in run_ranks(2, train, config):
        assert error is not None and message in error
