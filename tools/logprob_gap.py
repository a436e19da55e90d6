#!/usr/bin/env python
"""How far the log-probs of bf16 are from those of fp32, for trainer, pool and transformers, and what each part costs.

Usage: .venv/bin/python tools/logprob_gap.py MODEL [--prompts 16] [--tokens 64] [--rounds 3]

MODEL is a Hugging Face folder with a tokenizer. A server samples responses; everybody then says the log-probs of the
same tokens, with the same bf16 weights: the trainer and transformers in fp32, transformers in bf16, and trainer and
server in bf16 with each choice of `precision.fp32_parts`. Printed are mean absolute differences in nats, and CPU
seconds: of the trainer for scores and for gradients, medians; of the server for the responses. One server or one model
at a time, on one rank; about four minutes and 4 GB for a model of 135 million parameters.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.training import (
    Fp32Part,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainParallelConfig,
)
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.generation.vllm.start.server import (
    Server,
    ServerOptions,
    label_weights,
    start_server,
    stop_server,
    wait_until_ready,
)
from rto_megatron.platform.device import prepare
from rto_megatron.trainer.stages import ranks
from rto_megatron.types import Prompt, SupervisedMicrobatch

_ASKED = ("Write a short note about", "Explain to a child", "Give three reasons for", "Tell a story about")
_OF = ("rain", "prime numbers", "a lighthouse", "bread", "the moon", "trains", "fever", "Paris")
_PARTS: tuple[tuple[Fp32Part, ...], ...] = ((), ("head",), ("residual",), ("head", "residual"))
_LONGEST = 512  # tokens of prompt and response


@dataclass(frozen=True)
class Text:
    """A prompt and the response that a server sampled."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def token_ids(self) -> list[int]:
        """Both."""
        return [*self.prompt_ids, *self.response_ids]


@dataclass(frozen=True)
class Said:
    """Log-probs of all response tokens [N], and the CPU seconds that were measured."""

    logp_N: Tensor
    seconds: tuple[float, ...]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prompts = _prompts(options.model, options.prompts)
    texts: list[Text] = []
    pool: dict[tuple[Fp32Part, ...], Said] = {}
    for parts in _PARTS:
        with _server(options.model, parts) as server:
            responses, seconds = _sampled(server, prompts, options.tokens)
            texts = texts or responses
            pool[parts] = Said(_of_server(server, texts), (seconds,))
            print(f"a server with fp32_parts={list(parts)} has answered", file=sys.stderr)
    exact_N, of_trainer = _of_trainer(options.model, texts, options.rounds)
    hugging_face = [
        _of_transformers(options.model, texts, dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    console = Console(width=120)
    console.print(f"{len(exact_N)} response tokens of {options.model.name}, torch {torch.__version__}")
    console.print(
        f"transformers to the trainer in fp32: {_gap(hugging_face[0], exact_N):.1e} in fp32, "
        f"{_gap(hugging_face[1], exact_N):.4f} in bf16"
    )
    table = Table(
        "fp32_parts", "trainer to fp32", "pool to fp32", "trainer to pool", title="mean |difference|, nats"
    )
    for name in ("score s", "gradients s", "sample s"):
        table.add_column(name, justify="right")
    for parts in _PARTS:
        ours, theirs = of_trainer[parts], pool[parts]
        gaps = (
            _gap(ours.logp_N, exact_N),
            _gap(theirs.logp_N, exact_N),
            _gap(ours.logp_N, theirs.logp_N),
        )
        took = (*ours.seconds, *theirs.seconds)
        table.add_row(" ".join(parts) or "none", *(f"{x:.4f}" for x in gaps), *(f"{x:.2f}" for x in took))
    console.print(table)


def _gap(one_N: Tensor, other_N: Tensor) -> float:
    return float((one_N - other_N).abs().mean())


def _prompts(model: Path, count: int) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    asked = [f"{ask} {what}." for what in _OF for ask in _ASKED][:count]
    if tokenizer.chat_template is None:
        made = [tokenizer(text)["input_ids"] for text in asked]
    else:
        turns = [[{"role": "user", "content": text}] for text in asked]
        made = [
            tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            for turn in turns
        ]
    return [Prompt(f"{number}", tuple(ids)) for number, ids in enumerate(made)]


@contextmanager
def _server(model: Path, parts: tuple[Fp32Part, ...]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        options = ServerOptions(
            model, Path(folder, "token"), Path(folder, "log"), fp32_parts=parts, load_weights=True,
            max_model_len=_LONGEST,
        )  # fmt: skip
        server = start_server(options)
        try:
            wait_until_ready(server)
            label_weights(server, 0)
            yield server
        finally:
            stop_server(server)


def _sampled(server: Server, prompts: Sequence[Prompt], num_tokens: int) -> tuple[list[Text], float]:
    """Responses, and the CPU seconds of all processes of the server."""
    engine = VllmPool([server.address], read_token(server.token_file), timeout_s=300)
    # A token that may not be sampled before the limit: every response is as long as the others.
    sampling = Sampling(num_tokens, eos_ids=(2,), min_tokens=num_tokens, seed=1)
    engine.generate(prompts[:2], sampling, 0)
    before = _cpu_seconds(server)
    rollouts = engine.generate(prompts, sampling, 0)
    took = _cpu_seconds(server) - before
    return [Text(one.prompt_ids, one.response_ids) for one in rollouts], took


def _cpu_seconds(server: Server) -> float:
    leader = psutil.Process(server.process.pid)
    times = [one.cpu_times() for one in (leader, *leader.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def _of_server(server: Server, texts: Sequence[Text]) -> Tensor:
    with ServerClient(server.address, read_token(server.token_file), timeout_s=300) as client:
        said = [client.prompt_logprobs(text.token_ids)[-len(text.response_ids) :] for text in texts]
    return torch.tensor([logp for of_text in said for logp in of_text], dtype=torch.float64)


def _of_transformers(model: Path, texts: Sequence[Text], dtype: torch.dtype) -> Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
    found = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(text.token_ids)
            logp = loaded(ids[None]).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            found.append(logp[-len(text.response_ids) :])
    return torch.cat(found).double()


def _of_trainer(
    model: Path, texts: Sequence[Text], num_rounds: int
) -> tuple[Tensor, dict[tuple[Fp32Part, ...], Said]]:
    """In fp32, and in bf16 with each choice of parts; one model at a time is in memory."""
    with ranks(prepare(), ParallelConfig(), 0) as topology:
        from rto_megatron.data.packing import token_batch
        from rto_megatron.engine.build_roles import build_trained
        from rto_megatron.engine.source import find_source

        source = find_source(model, False, is_random=False, key="MODEL")
        device = topology.device.torch_device
        pairs = [(text.token_ids, len(text.prompt_ids)) for text in texts]
        batches = [
            token_batch(pairs[first : first + 8], True, 1, device) for first in range(0, len(pairs), 8)
        ]
        weight = 1 / sum(len(batch.asked_N) for batch in batches)
        micros = [SupervisedMicrobatch(batch, torch.full(batch.tokens_T.shape, weight)) for batch in batches]

        def said(dtype: Literal["fp32", "bf16"], parts: tuple[Fp32Part, ...], num_rounds: int) -> Said:
            precision = PrecisionConfig(dtype=dtype, fp32_parts=parts)
            optimizer, parallel = OptimizerConfig(lr=1e-6), TrainParallelConfig()
            policy = build_trained("policy", source, False, precision, optimizer, topology, 0, parallel)
            names = [["text"]] * len(micros)
            rows = zip(policy.token_outputs(batches), batches, strict=True)
            logp_N = torch.cat([row_T[batch.asked_N] for row_T, batch in rows]).double()
            scores = [_took(lambda: policy.token_outputs(batches)) for _ in range(num_rounds)]
            updates = [
                _took(lambda: policy.gradients(micros, SFT(Config()).loss, names)) for _ in range(num_rounds)
            ]
            medians = [statistics.median(took) for took in (scores, updates) if took]
            return Said(logp_N, tuple(medians))

        return said("fp32", (), 0).logp_N, {parts: said("bf16", parts, num_rounds) for parts in _PARTS}


def _took(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
