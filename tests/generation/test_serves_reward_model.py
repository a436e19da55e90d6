"""transformers and vLLM give the folder of an exported reward model the scores of the Megatron model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.layouts import frozen, topology
from ranks import run_ranks
from tiny_models import SEQUENCES, write_llama
from transformers import AutoModelForSequenceClassification

from rto_megatron.data.packing import token_batch
from rto_megatron.data.tokenizer import train_tokenizer
from rto_megatron.engine.export import export_hf
from rto_megatron.generation.vllm.start.server import ServerOptions, _environment

pytestmark = [pytest.mark.pool, pytest.mark.slow]

MEAN, STD = -0.75, 2.5
TOLERANCE = 1e-4
# A process of its own: vLLM sets up torch.distributed and never gives it back. vLLM's default for one label is a
# sigmoid, and it reads no mean and std from config.json.
SERVE = """
import json, sys
from vllm import LLM, PoolingParams
folder, prompts = sys.argv[1], [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
llm = LLM(
    folder, runner="pooling", convert="classify", dtype="float32", max_model_len=64,
    enforce_eager=True, pooler_config=json.loads(sys.argv[3]), disable_log_stats=True,
    kv_cache_memory_bytes=1 << 28,
)
scores = {}
for name, params in (("served", PoolingParams()), ("activated", PoolingParams(use_activation=True))):
    outputs = llm.encode(prompts, params, pooling_task="classify", use_tqdm=False)
    scores[name] = [output.outputs.data.tolist() for output in outputs]
print("scores " + json.dumps(scores))
"""


def _score_and_export(source: Path, folder: Path) -> list[float]:
    place = topology("tp2")
    model = frozen(place, source, is_scalar=True)
    batch = token_batch(SEQUENCES, True, place.row_multiple, place.device.torch_device)
    scores = model.token_outputs([batch])[0][list(batch.last_positions)]
    export_hf(model, source, folder)
    return scores.tolist()


def _served(folder: Path, pooler_config: dict[str, object]) -> dict[str, torch.Tensor]:
    options = ServerOptions(folder, folder.parent / "token", folder.parent / "log")
    prompts = json.dumps([ids for ids, _ in SEQUENCES])
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder), prompts, json.dumps(pooler_config)],
        env=_environment(options) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("scores ")]
    assert done.returncode == 0 and len(answers) == 1, done.stdout + done.stderr
    return {
        name: torch.tensor(rows)[:, 0]
        for name, rows in json.loads(answers[0].removeprefix("scores ")).items()
    }


@torch.no_grad()
def test_transformers_and_vllm_score_an_exported_reward_model(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "exported"
    write_llama(source, is_scalar=True)
    # vLLM makes no pooling runner for a model with one label unless the folder has a tokenizer.
    train_tokenizer(["one two three"], source, vocab_size=40, byte_fallback=False)
    config = json.loads((source / "config.json").read_text()) | {"mean": MEAN, "std": STD}
    (source / "config.json").write_text(json.dumps(config))
    normalised, _ = map(torch.tensor, run_ranks(2, _score_and_export, source, folder))
    raw = normalised * STD + MEAN
    assert float(raw.std()) > 1000 * TOLERANCE

    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    loaded = torch.cat([model(torch.tensor([ids])).logits[0] for ids, _ in SEQUENCES])
    torch.testing.assert_close(loaded, raw, atol=TOLERANCE, rtol=0)

    served = _served(folder, {"use_activation": False})
    torch.testing.assert_close(served["served"], raw, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(served["activated"], raw.sigmoid(), atol=TOLERANCE, rtol=0)
    differences = [float((scores - raw).abs().max()) for scores in (loaded, served["served"])]
    print("largest difference from Megatron: transformers, vLLM", differences)
