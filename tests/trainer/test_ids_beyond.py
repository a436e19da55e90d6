"""Ids without a row in an embedding: refused by name at every layout before the first step, where one rank would crash
and several would train on zeros."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from ranks import run_ranks
from tiny_models import write_llama
from tiny_tokenizers import add_token, change_json
from trainer.tiny_runs import configure, join, train, write_rows

from rto_megatron.config.schema import EvaluateStage
from rto_megatron.data.packing import token_batch
from rto_megatron.errors import DataError, RecipeError, UserError
from rto_megatron.trainer.evaluate import evaluate

EXTRA = "<|extra|>"
VOCAB_SIZE = 96  # of the models, and of their tokenizer before a token is added


@pytest.fixture(scope="module")
def beyond(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `files` has, with one more token in the policy's tokenizer, rows that spell it and a larger policy."""
    root = tmp_path_factory.mktemp("beyond") / "files"
    shutil.copytree(files, root)
    assert add_token(root / "models/policy", EXTRA) == VOCAB_SIZE
    write_llama(root / "models/larger", vocab_size=VOCAB_SIZE + 8)
    shutil.copytree(files / "tokenizer", root / "models/larger", dirs_exist_ok=True)
    user, answer = {"role": "user", "content": "red fox"}, {"role": "assistant", "content": "sun"}
    odd = {"role": "assistant", "content": f"blue {EXTRA} dog"}
    plain = [{"messages": [user, answer], "prompt_id": f"p{n}"} for n in range(5)]
    write_rows(root / "demonstrations.jsonl", [*plain, {"messages": [user, odd], "prompt_id": "odd"}])
    asked = [{"role": "user", "content": f"red {word}"} for word in ("fox", "dog", "cat", "sun", "moon")]
    pairs = [
        {"chosen": [t, answer], "rejected": [t, answer], "prompt_id": f"p{n}"} for n, t in enumerate(asked)
    ]
    write_rows(
        root / "some_pairs.jsonl", [*pairs, {**pairs[0], "rejected": [asked[0], odd], "prompt_id": "odd"}]
    )
    prompts = [{"prompt": f"red {n}", "prompt_id": f"p{n}"} for n in range(8)]
    write_rows(root / "some_prompts.jsonl", [*prompts, {"prompt": f"red {EXTRA}", "prompt_id": "odd"}])
    write_rows(root / "texts.jsonl", [{"text": "red fox"}] * 8 + [{"text": f"fox {EXTRA}", "id": "odd"}])
    return root


CASES = {
    "demonstrations": ("sft", "data__train", "demonstrations.jsonl"),
    "held out": ("sft", "data__eval", "demonstrations.jsonl"),
    "pairs": ("dpo", "data__train", "some_pairs.jsonl"),
    "verdicts": ("kto", "data__train", "some_pairs.jsonl"),
    "reward's pairs": ("reward_model", "data__eval", "some_pairs.jsonl"),
    "prompts": ("ppo", "data__train", "some_prompts.jsonl"),
    "texts": ("grpo", "data__pretrain", "texts.jsonl"),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [*((case, "tp2") for case in CASES), ("demonstrations", "one"), ("prompts", "one"), ("texts", "pp2")],
)
def test_a_row_with_such_an_id_is_refused_at_every_layout(
    case: str, layout: str, beyond: Path, tmp_path: Path
) -> None:
    stage, key, name = CASES[case]
    config = configure(stage, beyond, tmp_path / "run", layout, **{key: str(beyond / name)})
    for error in run_ranks(LAYOUTS[layout][0], train, config):
        assert error is not None
        assert f"{beyond / name}: models." in error
        assert f"has no row in the embedding (vocab_size={VOCAB_SIZE}) for tokens of the data" in error
        assert "resize that embedding to 97 rows or more" in error
        assert f"'{EXTRA}' (id {VOCAB_SIZE}), which the text spells: first in odd" in error
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_a_template_that_writes_such_an_id_is_refused_with_it(
    layout: str, beyond: Path, tmp_path: Path
) -> None:
    shutil.copytree(beyond / "models/policy", tmp_path / "policy")
    template = json.loads((tmp_path / "policy/tokenizer_config.json").read_text())["chat_template"]
    change_json(tmp_path / "policy/tokenizer_config.json", chat_template=EXTRA + template)
    config = configure("sft", beyond, tmp_path / "run", layout, models__policy=tmp_path / "policy")
    for error in run_ranks(LAYOUTS[layout][0], train, config):
        assert error is not None
        assert (
            f"models.policy: the token '{EXTRA}' (id {VOCAB_SIZE}), which the chat template writes, has no row"
            in error
        )
    assert not (tmp_path / "run").exists()


def test_a_token_that_nothing_uses_is_warned_of(
    beyond: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(beyond / "models/policy", tmp_path / "policy")
    change_json(tmp_path / "policy/tokenizer_config.json", pad_token=EXTRA)
    config = configure("sft", beyond, tmp_path / "run", models__policy=tmp_path / "policy", run__steps=1)
    assert run_ranks(1, train, config) == [None]
    said = capfd.readouterr().out
    assert f"warning: models.policy: the embedding (vocab_size={VOCAB_SIZE}) has no row for '{EXTRA}'" in said
    assert "(the padding token)" in said and (tmp_path / "run/hf/config.json").is_file()


@pytest.mark.parametrize("role", [None, "reference", "reward", "critic", "dpo"])
def test_every_model_must_read_what_a_larger_policy_samples(
    role: str | None, beyond: Path, tmp_path: Path
) -> None:
    models = {f"models__{name}": beyond / "models/larger" for name in ("policy", "reference", "dpo")}
    for name in ("reward", "critic"):
        write_llama(tmp_path / name, vocab_size=VOCAB_SIZE + 8, is_scalar=True)
        shutil.copytree(beyond / "tokenizer", tmp_path / name, dirs_exist_ok=True)
        models[f"models__{name}"] = tmp_path / name
    if role is not None:
        models[f"models__{role}"] = beyond / "models" / role
    (error,) = run_ranks(1, train, configure("rto", beyond, tmp_path / "run", **models, run__steps=1))
    if role is None:
        assert error is None
        return
    assert error is not None
    assert f"models.{role} has vocab_size={VOCAB_SIZE} and models.policy, whose samples it reads" in error
    assert f"no row for ids from {VOCAB_SIZE} on; resize its embedding to {VOCAB_SIZE + 8} rows" in error


def _evaluated(config: EvaluateStage, kind: type[UserError]) -> str:
    with pytest.raises(kind) as caught:
        evaluate(config, join(config))
    return str(caught.value)


def test_an_evaluation_refuses_such_prompts_and_smaller_models(beyond: Path, tmp_path: Path) -> None:
    def config(policy: str, rows: str) -> EvaluateStage:
        models = {"policy": beyond / "models" / policy, "reference": beyond / "models/reference"}
        data = {"eval": str(beyond / rows), "max_prompt_tokens": 100}
        tree = {"stage": "evaluate", "run": {"dir": tmp_path / policy}, "models": models, "data": data}
        tree |= {"sampling": {"max_response_tokens": 8}, "evaluate": {"name": "SFT"}}
        return EvaluateStage.model_validate({**tree, "precision": {"dtype": "fp32"}})

    (prompt,) = run_ranks(1, _evaluated, config("policy", "some_prompts.jsonl"), DataError)
    assert f"'{EXTRA}' (id {VOCAB_SIZE}), which the text spells: first in odd" in prompt
    (smaller,) = run_ranks(1, _evaluated, config("larger", "prompts.jsonl"), RecipeError)
    assert f"models.reference has vocab_size={VOCAB_SIZE} and models.policy" in smaller


def _read_beyond(folder: Path, layout: str) -> str:
    place = topology(layout)
    model = frozen(place, folder, False)
    batch = token_batch([([5, VOCAB_SIZE, 7], 1)], True, place.row_multiple, torch.device("cpu"))
    with pytest.raises(ValueError) as caught:
        model.token_outputs([batch])
    return str(caught.value)


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_the_engine_reads_no_such_id(layout: str, beyond: Path) -> None:
    for said in run_ranks(LAYOUTS[layout][0], _read_beyond, beyond / "models/policy", layout):
        assert said.startswith(
            f"reference has no row for id {VOCAB_SIZE}, expected ids below its vocab_size of"
        )
