#!/usr/bin/env python
"""A step of RTO of this program, with a real vLLM pool, beside the paper's way: the same folders, prompts and cores.

Usage: .venv/bin/python tools/benchmark_rto.py [--prompts FILE] [--rounds 2] [--steps 4] [--batch 32] [--tokens 64]
           [--mean-tokens 20] [--max-prompt 64] [--hidden 256] [--layers 4] [--vocab 8000] [--ours 2x1x8]
           [--paper 1x2x8] [--pool-threads 1] [--try-ways] [--any-load]

FILE has rows with `context_messages`; without it the synthetic task's prompts are taken: the first that are short
enough, as many as a step has. Policy, reference and DPO model are Llamas of the stated size, reward model and critic
the same with a scalar head, with random weights of their own, in float32; a step samples one response of up to
--tokens tokens to every prompt, scores it by all five and takes one optimizer step of policy and critic. Random weights
hardly ever end a response, so all have --tokens; with --mean-tokens N each token ends one with probability 1/N.

Peers: this program, this program with rollout.old_logprobs=pool, and Hugging Face's `generate` with padded forwards
(tools/paper_way.py), each started anew in every round on the same cores; the pool is started once, and idles while
others are measured. A round's figures are medians of its steps but the first. With --try-ways each peer is tried first
with several ways to use the cores, and its fastest is taken. What other processes use of the cores is measured, and
more than a tenth of them ends the program; --any-load goes on all the same. About five minutes as it stands; --tokens
512 takes about ten times as long.
"""

import argparse
import gzip
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from side_by_side import (
    Parts,
    Peer,
    Way,
    add_model_sizes,
    all_ways,
    compare,
    run_ranks,
    stated_llama,
    stated_way,
)
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

_ROOT = Path(__file__).parents[1]
_RECIPE = _ROOT / "launchers" / "recipes" / "quickstart" / "rto.yaml"
_ROLES = ("policy", "reference", "dpo", "reward", "critic")
_PARTS = ("step", "sample", "score", "update", "push")
_WIDTH = 140  # columns
_LARGE = 30.0  # beside the numbers of random states
_SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}  # as `rto launch` says where pool and ranks share cores


@dataclass(frozen=True)
class Work:
    """What all peers do."""

    root: Path
    steps: int
    batch: int
    tokens: int
    max_prompt: int

    @property
    def prompts(self) -> Path:
        """One step's."""
        return self.root / "prompts.jsonl"


def keys_of(work: Work, folder: Path, way: Way) -> list[str]:
    """A run of this program, as overrides of its recipe."""
    keys = {
        "run.dir": folder,
        "run.steps": work.steps,
        "run.samples_every": "null",
        "parallel.tensor": 1,
        **{f"models.{role}": work.root / role for role in _ROLES},
        "models.allow_unverified_reference": "true",
        "data.train": work.prompts,
        "data.max_prompt_tokens": work.max_prompt,
        "batch.rollout": work.batch,
        "batch.train": work.batch,
        "batch.micro": way.micro,
        "optimizer.lr": 1e-6,
        "critic_optimizer.lr": 1e-6,
        "sampling.max_response_tokens": work.tokens,
        "sampling.min_response_tokens": 0,
        "rollout.bucket_mb": 64,
    }
    return [f"{key}={value}" for key, value in keys.items()]


@contextmanager
def pool_of(work: Work, way: Way, threads: int) -> Iterator[list[str]]:
    """A server on the cores that all share; gives the overrides by which runs find it."""
    from rto_megatron.config.load import load_stage
    from rto_megatron.config.schema import ReinforcementStage
    from rto_megatron.launching.launched_pool import launched_pool

    config = load_stage(_RECIPE, ReinforcementStage, keys_of(work, work.root / "pool", way))
    os.environ |= {"OMP_NUM_THREADS": str(threads), **_SHARED_CORES, "CUDA_VISIBLE_DEVICES": ""}
    with launched_pool(config, [1], range(0)) as pool:
        assert pool.prepare(1)
        yield pool.arguments


def ours(work: Work, keys: Sequence[str], way: Way, name: str) -> list[Parts]:
    """Steps of a run of this program."""
    folder = work.root / name
    program = ["-m", "rto_megatron.cli.main", "train", str(_RECIPE), *keys_of(work, folder, way), *keys]
    run_ranks(program, way, folder.with_suffix(".log"), _SHARED_CORES)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {**{part: line[f"time/{part}_s"] for part in _PARTS}, "tokens": line["rollout/response_tokens"]}
        for line in lines
    ]


def papers_way(work: Work, way: Way, name: str) -> list[Parts]:
    """Steps of tools/paper_way.py."""
    out = work.root / f"{name}.json"
    arguments = ["paper", work.root, out, work.steps, way.micro, work.tokens]
    run_ranks([__file__, *map(str, arguments)], way, out.with_suffix(".log"))
    found: list[Parts] = json.loads(out.read_text())
    return found


def paper_rank(root: Path, out: Path, steps: int, micro: int, tokens: int) -> None:
    """One rank of the paper's way."""
    from paper_way import run

    prompts = json.loads((root / "prompt_ids.json").read_text())
    run({role: root / role for role in _ROLES}, prompts, steps, micro, tokens, out)


def write_work(root: Path, given: argparse.Namespace) -> Work:
    """Five model folders, a tokenizer of the prompts' words, and the prompts as rows and as ids."""
    from rto_megatron.data.synthetic import Sizes, write_synthetic_task
    from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer

    source = given.prompts
    if source is None:
        write_synthetic_task(root / "task", 0, Sizes(8, 8, 8, 8, 8 * given.batch, 8))
        source = root / "task" / "prompts_train.jsonl"
    text = gzip.decompress(source.read_bytes()).decode() if source.suffix == ".gz" else source.read_text()
    rows = text.splitlines()
    said = [turn["content"] for row in rows for turn in json.loads(row)["context_messages"]]
    for number, role in enumerate(_ROLES):
        train_tokenizer(said, root / role, given.vocab, byte_fallback=True)
        _write_model(root / role, role in ("reward", "critic"), number, given)
    tokenizer = load_tokenizer(root / "policy")
    taken: dict[str, list[int]] = {}
    for row in rows:
        turns = json.loads(row)["context_messages"]
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if len(ids) <= given.max_prompt and len(taken) < given.batch:
            taken[row] = ids
    if len(taken) < given.batch:
        sys.exit(
            f"error: {len(taken)} prompts have at most --max-prompt {given.max_prompt} tokens, --batch wants "
            f"{given.batch}"
        )
    work = Work(root, given.steps, given.batch, given.tokens, given.max_prompt)
    work.prompts.write_text("\n".join(taken) + "\n")
    (root / "prompt_ids.json").write_text(json.dumps(list(taken.values())))
    print(f"{given.batch} prompts of {sum(map(len, taken.values()))} tokens a step")
    return work


def _write_model(folder: Path, is_scalar: bool, seed: int, given: argparse.Namespace) -> None:
    torch.manual_seed(seed)
    config = stated_llama(given, 2 * (given.max_prompt + given.tokens))
    model = (LlamaForSequenceClassification if is_scalar else LlamaForCausalLM)(config)
    if isinstance(model, LlamaForCausalLM) and given.mean_tokens is not None:
        _end_responses(model, given.mean_tokens)
    model.save_pretrained(folder)


@torch.no_grad()
def _end_responses(model: LlamaForCausalLM, mean_tokens: float) -> None:
    """Gives end-of-sequence one chance in `mean_tokens` at every place.

    The first number of every state stays so large that the norm of states is its own: only end-of-sequence reads it.
    """
    model.model.embed_tokens.weight[:, 0] = _LARGE
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    head = model.lm_head.weight
    head[:, 0] = 0.0
    head[model.config.eos_token_id] = 0.0
    normed = model.config.hidden_size**0.5
    head[model.config.eos_token_id, 0] = math.log(len(head) / (mean_tokens - 1)) / normed


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["paper"]:
        root, out, *numbers = sys.argv[2:]
        paper_rank(Path(root), Path(out), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--prompts", type=Path, help="rows with `context_messages`, .gz or not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of a round; the first is not counted")
    parser.add_argument("--batch", type=int, default=32, help="prompts of a step")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a response")
    parser.add_argument("--mean-tokens", type=float, help="of responses without that limit; default: endless")
    parser.add_argument("--max-prompt", type=int, default=64, help="tokens of a prompt")
    add_model_sizes(parser)
    parser.add_argument(
        "--ours",
        type=stated_way,
        default=Way(cores, 1, 8),
        metavar="2x1x8",
        help="processes, threads, sequences a forward",
    )
    parser.add_argument(
        "--paper", type=stated_way, default=Way(1, cores, 8), metavar="1x2x8", help="of the paper's way"
    )
    parser.add_argument("--pool-threads", type=int, default=1, help="as `rto launch` gives it")
    parser.add_argument("--try-ways", action="store_true", help="try several ways of each peer first")
    parser.add_argument("--any-load", action="store_true", help="measure on a machine that others use too")
    given = parser.parse_args()
    own, papers = (all_ways(cores, given.batch),) * 2 if given.try_ways else ((given.ours,), (given.paper,))
    with ExitStack() as stack:
        work = write_work(Path(stack.enter_context(tempfile.TemporaryDirectory())), given)
        found = stack.enter_context(pool_of(work, own[0], given.pool_threads))
        peers = [
            Peer("ours", partial(ours, work, found), own),
            Peer("ours, old_logprobs=pool", partial(ours, work, [*found, "rollout.old_logprobs=pool"]), own),
            Peer("the paper's way", partial(papers_way, work), papers),
        ]
        title = f"RTO, {work.batch} prompts a step, responses of up to {work.tokens} tokens"
        Console(width=_WIDTH).print(compare(peers, given.rounds, given.any_load, title))


if __name__ == "__main__":
    main()
