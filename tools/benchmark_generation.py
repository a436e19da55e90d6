#!/usr/bin/env python
"""Generation over HTTP beside vLLM in-process: the same prompts, seeds and model, in one run.

Usage: .venv/bin/python tools/benchmark_generation.py [--prompts 64] [--prompt-tokens 64] [--tokens 64] [--rounds 9]
           [--model FOLDER] [--dtype fp32]

A round is one `LLM.generate` in a process that holds vLLM and does nothing else, and one `VllmPool.generate` against
one server of ours: all prompts at once, a seed per prompt, log-probs of the sampled tokens; in turns which of the two
goes first. Whichever is not measured is stopped (SIGSTOP). Every round has new prompts, so that no prefix is cached.
Both sides sample with the same seeds: the share of equal responses is printed, and so are the CPU seconds of each
process: on a machine with as many busy processes as cores, time is CPU time. Takes about two minutes and 3 GB with the
tiny model that it makes; --model takes a Hugging Face folder instead, twice in memory.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Sampling, request_seed
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.generation.vllm.start.server import (
    DTYPES,
    Server,
    ServerOptions,
    start_server,
    stop_server,
    wait_until_ready,
)
from rto_megatron.types import Prompt

_VERSION = 0
_VOCABULARY = 480
_STOPS_NEVER = (2,)  # min_tokens forbids it, so that every response is as long as the others
_GPU_MEMORY_FRACTION = 0.3  # two engines share the device
_WARM_UP_ROUNDS = 2

Responses = list[tuple[int, ...]]
if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Work:
    """What both sides do in a round."""

    num_prompts: int
    prompt_tokens: int
    tokens: int
    dtype: Dtype

    def prompts(self, round_index: int) -> list[Prompt]:
        draw = random.Random(round_index)
        return [
            Prompt(
                f"prompt-{index}", tuple(draw.randrange(3, _VOCABULARY) for _ in range(self.prompt_tokens))
            )
            for index in range(self.num_prompts)
        ]

    def sampling(self, round_index: int) -> Sampling:
        return Sampling(self.tokens, _STOPS_NEVER, min_tokens=self.tokens, seed=round_index)

    @property
    def max_model_len(self) -> int:
        return self.prompt_tokens + self.tokens


@dataclass(frozen=True)
class Measured:
    """One generation: wall-clock seconds, CPU seconds by process, and what was sampled."""

    seconds: float
    cpu: dict[str, float]
    responses: Responses


def _write_model(folder: Path, max_positions: int) -> None:
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=max_positions, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.08,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _serve_in_process(model: Path, work: Work) -> None:
    """What the child does: generates the round named on each line of stdin, and prints a line."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    on_cpu = not torch.cuda.is_available()
    llm = LLM(
        str(model), dtype=DTYPES[work.dtype], skip_tokenizer_init=True, max_model_len=work.max_model_len,
        gpu_memory_utilization=_GPU_MEMORY_FRACTION, enforce_eager=on_cpu, enable_chunked_prefill=not on_cpu,
    )  # fmt: skip
    print("ready", flush=True)
    for line in sys.stdin:
        round_index = int(line)
        asked = work.sampling(round_index)
        prompts = [TokensPrompt(prompt_token_ids=list(one.token_ids)) for one in work.prompts(round_index)]
        params = [
            SamplingParams(
                max_tokens=asked.max_tokens, min_tokens=asked.min_tokens, temperature=asked.temperature,
                top_p=asked.top_p, seed=request_seed(asked.seed, _VERSION, index), logprobs=0, detokenize=False,
                stop_token_ids=list(asked.eos_ids), ignore_eos=True,
            )
            for index in range(len(prompts))
        ]  # fmt: skip
        start, cpu = time.monotonic(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        responses = [tuple(one.outputs[0].token_ids) for one in outputs]
        logprobs = [_sampled_logprobs(one.outputs[0]) for one in outputs]
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        assert all(len(one) == work.tokens for one in logprobs)
        print(json.dumps({"seconds": seconds, "cpu": cpu, "responses": responses}), flush=True)


def _sampled_logprobs(completion: "CompletionOutput") -> list[float]:
    assert completion.logprobs is not None
    found = []
    for at, token in zip(completion.logprobs, completion.token_ids, strict=True):
        assert at is not None
        found.append(at[token].logprob)
    return found


class InProcess:
    """vLLM's own `LLM`, in a child process that can be stopped."""

    def __init__(self, model: Path, work: Work, log_file: Path) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if not torch.cuda.is_available():
            environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        sizes = [str(one) for one in (work.num_prompts, work.prompt_tokens, work.tokens)]
        command = [
            sys.executable,
            __file__,
            "--prompts",
            sizes[0],
            "--prompt-tokens",
            sizes[1],
            "--tokens",
            sizes[2],
            "--dtype",
            work.dtype,
        ]
        self._log_file = log_file
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--child", str(model)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_until_ready(self) -> None:
        self._line("ready")

    def generate(self, round_index: int) -> Measured:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{round_index}\n")
        self._process.stdin.flush()
        answer = json.loads(self._line("{"))
        return Measured(
            answer["seconds"], {"vLLM": answer["cpu"]}, [tuple(one) for one in answer["responses"]]
        )

    def signal(self, which: signal.Signals) -> None:
        self._process.send_signal(which)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self, beginning: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # vLLM prints here too
            if line.startswith(beginning):
                return line
        tail = self._log_file.read_text(errors="replace").splitlines()[-15:]
        raise UserError("vLLM in-process ended; the last lines of its log:\n  " + "\n  ".join(tail))


class OverHttp:
    """`VllmPool` and one server."""

    def __init__(self, server: Server, work: Work) -> None:
        self._server, self._work = server, work
        self._pool = VllmPool([server.address], read_token(server.token_file), timeout_s=300)

    def label_weights(self) -> None:
        with ServerClient(self._server.address, read_token(self._server.token_file), timeout_s=30) as client:
            client.request("POST", "/update_weight_version", {"new_version": str(_VERSION)})

    def generate(self, round_index: int) -> Measured:
        prompts, sampling = self._work.prompts(round_index), self._work.sampling(round_index)
        before = self._cpu()
        start = time.monotonic()
        rollouts = self._pool.generate(prompts, sampling, _VERSION)
        seconds = time.monotonic() - start
        cpu = {name: seconds - before[name] for name, seconds in self._cpu().items()}
        return Measured(seconds, cpu, [one.response_ids for one in rollouts])

    def signal(self, which: signal.Signals) -> None:
        os.killpg(self._server.process.pid, which)

    def _cpu(self) -> dict[str, float]:
        front = psutil.Process(self._server.process.pid)
        engine = sum(_cpu_seconds(one) for one in front.children(recursive=True))
        return {"client": time.process_time(), "API server": _cpu_seconds(front), "engine": engine}


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def _both(folder: Path, model: Path | None, work: Work, say: Console) -> Iterator[tuple[InProcess, OverHttp]]:
    if model is None:
        model = folder / "model"
        _write_model(model, work.max_model_len)
    say.print("starting vLLM in-process and one server ...")
    options = ServerOptions(
        model, folder / "token", folder / "server.log", dtype=work.dtype, load_weights=True,
        max_model_len=work.max_model_len, gpu_memory_fraction=_GPU_MEMORY_FRACTION,
    )  # fmt: skip
    inside = InProcess(model, work, folder / "in_process.log")
    try:
        inside.wait_until_ready()
        server = start_server(options)
        try:
            wait_until_ready(server, progress=say.print)
            over_http = OverHttp(server, work)
            over_http.label_weights()
            yield inside, over_http
        finally:
            _continue(server)
            stop_server(server)
    finally:
        inside.kill()


def _continue(server: Server) -> None:
    """A stopped process does not see SIGTERM."""
    if server.process.poll() is None:
        os.killpg(server.process.pid, signal.SIGCONT)


def _measure(side: InProcess | OverHttp, round_index: int) -> Measured:
    side.signal(signal.SIGCONT)
    measured = side.generate(round_index)
    side.signal(signal.SIGSTOP)
    return measured


def _benchmark(folder: Path, model: Path | None, work: Work, rounds: int) -> None:
    say = Console(stderr=True)
    measured: dict[str, list[Measured]] = {"in-process": [], "HTTP": []}
    with _both(folder, model, work, say) as (inside, over_http):
        sides: list[tuple[str, InProcess | OverHttp]] = [("in-process", inside), ("HTTP", over_http)]
        for _, side in sides:
            side.signal(signal.SIGSTOP)
        for index in range(-_WARM_UP_ROUNDS, rounds):
            for kind, side in sides if index % 2 else reversed(sides):
                one = _measure(side, index)
                rate = work.num_prompts * work.tokens / one.seconds
                say.print(f"{'warm-up' if index < 0 else f'round {index + 1}'} {kind}: {rate:,.0f} tokens/s")
                if index >= 0:
                    measured[kind].append(one)
    _report(work, measured)


def _report(work: Work, measured: dict[str, list[Measured]]) -> None:
    size = work.num_prompts * work.tokens
    table = Table(
        title=f"{work.num_prompts} prompts of {work.prompt_tokens} tokens, {work.tokens} tokens each"
    )
    for name in ("", "tokens/s median", "best", "s median", "CPU s median"):
        table.add_column(name, justify="right")
    for kind, ones in measured.items():
        seconds = [one.seconds for one in ones]
        cpu = {name: statistics.median(one.cpu[name] for one in ones) for name in ones[0].cpu}
        parts = ", ".join(f"{name} {value:.2f}" for name, value in cpu.items())
        table.add_row(
            kind, f"{size / statistics.median(seconds):,.0f}", f"{size / min(seconds):,.0f}",
            f"{statistics.median(seconds):.3f}", f"{sum(cpu.values()):.2f} = {parts}",
        )  # fmt: skip
    Console(width=140).print(table)
    pairs = list(zip(measured["in-process"], measured["HTTP"], strict=True))
    ratios = sorted(inside.seconds / http.seconds for inside, http in pairs)
    equal = [a == b for inside, http in pairs for a, b in zip(inside.responses, http.responses, strict=True)]
    print(
        f"HTTP reaches {statistics.median(ratios):.2f} of in-process (median of {len(ratios)} rounds, "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}); {sum(equal)} of {len(equal)} responses are equal"
    )


def main() -> None:
    """Runs the benchmark, or as a child the in-process half of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a round")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each response")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side, after a warm-up")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; otherwise a tiny model is made")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--folder", type=Path, help="keep model and logs here, otherwise they are removed")
    parser.add_argument("--child", type=Path, metavar="MODEL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if min(given.prompts, given.prompt_tokens, given.tokens, given.rounds) < 1:
        parser.error("every number must be at least 1")
    work = Work(given.prompts, given.prompt_tokens, given.tokens, given.dtype)
    if given.child:
        _serve_in_process(given.child, work)
        return
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _benchmark(given.folder or Path(scratch), given.model, work, given.rounds)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    main()
