"""A checkpoint answers in a real vLLM pool, and a real vLLM server judges: every number is known beforehand."""

import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from benchmarks.made_files import INSTRUCTIONS, alpaca_outputs, arena_questions, rto
from tiny_models import llama_config
from transformers import LlamaForCausalLM

from rto_megatron.benchmarks.answer_files import read_answers
from rto_megatron.benchmarks.judging import shows_model_first
from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from rto_megatron.errors import JudgeError
from rto_megatron.generation.vllm.start.server import ServerOptions, _environment

pytestmark = [pytest.mark.pool, pytest.mark.slow]

KEY = "key-of-the-judge"
LARGE, SMALL = 9.0, 8.0  # logits of M and m; those of all other tokens are 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that says M, or less often m, whatever it reads: all embeddings are alike, and no layer adds anything."""
    folder = tmp_path_factory.mktemp("models") / "letters"
    train_tokenizer(["m M Say Ask one two three"] * 3, folder, 400, byte_fallback=True)
    config = llama_config(vocab_size=448)
    config.max_position_embeddings = 8192
    letters = LlamaForCausalLM(config).float()
    tokenizer = load_tokenizer(folder)
    with torch.no_grad():
        for name, parameter in letters.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        for letter, logit in (("M", LARGE), ("m", SMALL)):
            (number,) = tokenizer.encode(letter, add_special_tokens=False)
            letters.lm_head.weight[number] = logit / config.hidden_size
    letters.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vllm serve`, as a user would start it on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("judge")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    command += [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "8192",
        "--kv-cache-memory-bytes",
        "256M",
    ]
    command += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    environment = _environment(ServerOptions(model, folder / "token", folder / "log"))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_a_checkpoint_answers_and_is_judged(model: Path, judge_url: str, tmp_path: Path) -> None:
    rto("convert", "hf-to-megatron", model, tmp_path / "checkpoint")
    questions = arena_questions(tmp_path / "question.jsonl", "v0.1")
    arena = ("generate", tmp_path / "checkpoint", "--prompts", questions, "--out", tmp_path / "arena")
    rto(*arena, "--max-tokens", 5, "--count-tokens", "model", "--dtype", "fp32")
    answers = read_answers(tmp_path / "arena/model_answer/checkpoint.jsonl")
    assert {one.text for one in answers.by_key.values()} == {"MMMMM"}  # greedy

    prompts = alpaca_outputs(tmp_path / "base.json", "base")
    drawn = ("generate", tmp_path / "checkpoint", "--prompts", prompts, "--out", tmp_path / "alpaca")
    rto(*drawn, "--max-tokens", 64, "--name", "ours", "--dtype", "fp32")
    outputs = json.loads((tmp_path / "alpaca/model_outputs.json").read_text())
    letters = "".join(one["output"] for one in outputs)
    # At temperature 0.7 a letter is M with chance 1 / (1 + exp(-1 / 0.7)) = 0.807: 384 letters less a few others.
    share = letters.count("M") / (letters.count("M") + letters.count("m"))
    assert len({one["output"] for one in outputs}) == len(outputs)
    assert share == pytest.approx(1 / (1 + math.exp(-1 / 0.7)), abs=0.07)

    (tmp_path / "key").write_text(KEY)
    asked = ("judge", tmp_path / "alpaca/model_outputs.json", "--baseline", prompts, "--endpoint", judge_url)
    asked = (*asked, "--judge", "judge", "--out", tmp_path / "judged")
    with pytest.raises(JudgeError, match="status 401; the key is missing or wrong"):
        rto(*asked)
    shown = rto(*asked, "--key-file", tmp_path / "key")
    assert f"{len(INSTRUCTIONS)} requests" in shown
    first_wins = 2 - 1 / (1 + math.exp(LARGE - SMALL))
    rows = json.loads((tmp_path / "judged/annotations.json").read_text())
    wanted = [3 - first_wins if shows_model_first(text) else first_wins for text in INSTRUCTIONS]
    assert [one["preference"] for one in rows] == pytest.approx(wanted, abs=1e-5)
    rto("score", tmp_path / "judged", "--json", tmp_path / "s.json")
    (scored,) = json.loads((tmp_path / "s.json").read_text())["alpaca_eval"]
    assert scored["rate"]["win_rate"] == pytest.approx(100 * (sum(wanted) / len(wanted) - 1), abs=1e-3)
