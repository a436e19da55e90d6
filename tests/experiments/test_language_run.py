"""The language experiment's own script from prompts to page: a tiny model that knows nothing, one step a run."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rto_megatron.data.tokenizer import train_tokenizer
from rto_megatron.experiments.language.language_arms import ARMS, NUM_PROMPTS
from rto_megatron.experiments.language.prompts import write_prompts

pytestmark = [pytest.mark.pool, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SEED = 0


def _write_model(folder: Path, prompts: list[dict[str, list[dict[str, str]]]]) -> None:
    said = [turn["content"] for row in prompts for turn in row["prompt"]]
    train_tokenizer(said, folder, 400, byte_fallback=True)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_the_script_runs_every_arm_and_writes_its_page(tmp_path: Path) -> None:
    model, root = tmp_path / "model", tmp_path / "language"
    task = root / f"seed{SEED}" / "task"
    train, _ = write_prompts(task, *NUM_PROMPTS, SEED)
    prompts = [json.loads(line) for line in train.read_text().splitlines()]
    _write_model(model, prompts)
    # Answers of a model without knowledge earn the same, so its own pairs would be none.
    answers = {"chosen": "always a quiet light", "rejected": "no"}
    pairs = [
        {"prompt": row["prompt"]}
        | {kind: [{"role": "assistant", "content": text}] for kind, text in answers.items()}
        for row in prompts[:32]
    ]
    for part in ("train", "test"):
        (root / f"seed{SEED}" / f"pairs_{part}.jsonl").write_text(
            "\n".join(json.dumps(pair) for pair in pairs)
        )
    variables = {"SEEDS": "1", "MODEL": str(model), "LANE_ARGS": "--set run.steps=1"}
    done = subprocess.run(
        ["bash", "launchers/experiments/language.sh", str(root)],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    logs = "".join(path.read_text()[-2000:] for path in root.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    evaluated = {path.parent.name for path in (root / f"seed{SEED}").glob("evaluations/*/evaluation.json")}
    assert {name.split("_x")[0] for name in evaluated} == {arm.name for arm in ARMS} | {"start", "dpo"}
    assert not list(root.glob("seed*/*_x*/checkpoints")) and list(root.glob("seed*/*_x*/hf"))
    assert "sampled_train" in {path.name for path in (root / f"seed{SEED}").iterdir()}
    assert "shuffled_rto" in done.stdout and list(root.glob("*.md"))
