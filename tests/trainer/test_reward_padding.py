"""A reward model whose tokenizer pads with the end-of-sequence token: exports score in transformers as in training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert.commands import convert
from engine.layouts import LAYOUTS
from ranks import run_ranks
from tiny_tokenizers import add_token, change_json, set_padding
from trainer.tiny_runs import configure, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_pairs
from rto_megatron.data.tokenizer import encoding_fingerprint, load_tokenizer
from rto_megatron.reporting.metrics import read_metrics

EOS, EOS_ID = "</s>", 2
RESERVED = "<|reserved_special_token_0|>"
RESERVED_ID = 3  # in the place of the tokenizer's own <pad>


@pytest.fixture(scope="module")
def padded_with_end(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `files` has, with a policy and a critic whose padding token is the end-of-sequence token."""
    root = tmp_path_factory.mktemp("padded") / "files"
    shutil.copytree(files, root)
    for role in ("policy", "critic"):
        folder = root / "models" / role
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"<pad>"', f'"{RESERVED}"'))
        (folder / "tokenizer.model").unlink()
        set_padding(folder, EOS, EOS_ID)
        change_json(folder / "generation_config.json", pad_token_id=EOS_ID)
        change_json(folder / "special_tokens_map.json", pad_token=EOS)
    return root


@torch.no_grad()
def batched_scores(folder: Path, sequences: list[list[int]], side: str) -> torch.Tensor:
    """The scores of all sequences in one batch, padded by the folder's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    return model(**batch).logits[:, 0]


def _answers(files: Path, count: int) -> list[list[int]]:
    """Chosen answers, then rejected ones, each behind its prompt."""
    tokenizer = load_tokenizer(files / "models/policy")
    pairs = load_pairs(str(files / "pairs.jsonl"), tokenizer, Limits(100, 200, "error"), count).items
    chosen = [[*pair.prompt_ids, *pair.chosen_ids] for pair in pairs]
    return chosen + [[*pair.prompt_ids, *pair.rejected_ids] for pair in pairs]


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_transformers_scores_batches_of_an_export_as_the_run_did(
    layout: str, padded_with_end: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure("reward_model", padded_with_end, tmp_path / "run", layout, optimizer__lr=1e-2)
    assert set(run_ranks(LAYOUTS[layout][0], train, config)) == {None}
    said = capfd.readouterr().out
    convert("megatron-to-hf", tmp_path / "run", tmp_path / "converted")
    # What the run measured on the pairs held out, at its last step.
    entry = read_metrics(tmp_path / "run")[-1]
    sequences = _answers(padded_with_end, 6)
    assert len({len(ids) for ids in sequences}) > 1  # there is something to pad
    for folder in (tmp_path / "run/hf", tmp_path / "converted"):
        kept = json.loads((folder / "config.json").read_text())
        for side in ("right", "left"):
            scores = batched_scores(folder, sequences, side)
            assert float(scores.mean()) == pytest.approx(kept["mean"], abs=1e-5)
            assert float(scores.std()) == pytest.approx(kept["std"], abs=1e-5)
            accuracy = float((scores[:6] > scores[6:]).float().mean())
            assert accuracy == pytest.approx(entry["eval/accuracy"], abs=1e-6)
        assert kept["pad_token_id"] == RESERVED_ID
        assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == RESERVED_ID
        assert f"padding is '{RESERVED}' (id {RESERVED_ID}), which nothing else writes" in said
        # The role goes on exchanging ids with the others.
        assert encoding_fingerprint(folder) == encoding_fingerprint(padded_with_end / "models/policy")


def test_a_critic_of_a_run_is_exported_alike_and_its_policy_untouched(
    padded_with_end: Path, tmp_path: Path
) -> None:
    config = configure("ppo", padded_with_end, tmp_path / "run", run__steps=1)
    assert run_ranks(1, train, config) == [None]
    convert("megatron-to-hf", tmp_path / "run", tmp_path / "critic", "--head", "scalar")
    convert("megatron-to-hf", tmp_path / "run", tmp_path / "policy")
    found = {
        name: (
            AutoTokenizer.from_pretrained(tmp_path / name).pad_token_id,
            json.loads((tmp_path / name / "config.json").read_text())["pad_token_id"],
        )
        for name in ("critic", "policy")
    }
    assert found == {"critic": (RESERVED_ID, RESERVED_ID), "policy": (EOS_ID, EOS_ID)}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        source = padded_with_end / "models/policy" / name
        assert (tmp_path / "policy" / name).read_bytes() == source.read_bytes()


def test_a_run_of_an_older_version_is_resumed_and_exports_the_right_padding(
    padded_with_end: Path, tmp_path: Path
) -> None:
    config = configure("reward_model", padded_with_end, tmp_path / "run")
    assert run_ranks(1, train, config) == [None]
    whole = json.loads((tmp_path / "run/hf/config.json").read_text())
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints/step_000004")
    shutil.rmtree(run / "hf")
    (run / "checkpoints/latest").write_text("step_000002\n")
    kept = run / "model_files/reward"
    set_padding(kept, EOS, EOS_ID)
    assert run_ranks(1, train, config) == [None]
    resumed = json.loads((run / "hf/config.json").read_text())
    assert resumed == whole and resumed["pad_token_id"] == RESERVED_ID


def test_without_an_unused_token_there_is_no_padding_and_a_warning(
    padded_with_end: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "files"
    shutil.copytree(padded_with_end, root)
    path = root / "models/policy/tokenizer.json"
    state = json.loads(path.read_text())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] != RESERVED]
    path.write_text(json.dumps(state))
    # One without a row in the embedding is no choice either.
    add_token(root / "models/policy", "<|pad|>")
    config = configure("reward_model", root, tmp_path / "run", run__steps=1)
    assert run_ranks(1, train, config) == [None]
    said = capfd.readouterr().out
    assert "padding is null, as '</s>' ends sequences and the tokenizer has no unused special token" in said
    assert "refuses batches" in said
    folder = tmp_path / "run/hf"
    kept = json.loads((folder / "config.json").read_text())
    assert kept["pad_token_id"] is None and AutoTokenizer.from_pretrained(folder).pad_token is None
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    sequences = _answers(padded_with_end, 6)
    with torch.no_grad():
        scores = torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])
        with pytest.raises(ValueError, match="batch sizes > 1"):  # what the warning says
            model(torch.tensor(sequences[:1] * 2))
    assert float(scores.mean()) == pytest.approx(kept["mean"], abs=1e-5)
