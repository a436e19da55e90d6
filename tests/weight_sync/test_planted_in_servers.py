"""Faults inside a real server's workers, with the weights of the optimizer step before: each must be named.

The session's server is spoilt alone; in the slow tests one with two tensor ranks is, and the session's is well.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from plants import KEYS_AND_VALUES, NORMS, PLAIN, SQUARE
from pool_server import PoolServer, tiny_llama
from safetensors.torch import save_file
from trainer_ranks import ModelSource, TrainerRanks, canary_of, served_distance
from transformers import LlamaForCausalLM

from rto_megatron.generation.contract import Sampling, StaleWeights
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.types import Prompt
from rto_megatron.weight_sync.canary import check_canary
from rto_megatron.weight_sync.push import NoServersLeft

pytestmark = pytest.mark.pool

LEARNING_RATE = 5e-7  # the paper's for the policy; Adam moves every weight by about as much in one step


@dataclass
class Pool:
    """Servers, the trainer's ranks, and two models that are one optimizer step apart."""

    servers: list[PoolServer]
    ranks: TrainerRanks
    source: ModelSource
    before: LlamaForCausalLM
    after: LlamaForCausalLM
    old: Path
    version: int = 1000

    def push(self, model: LlamaForCausalLM) -> None:
        """A push that every server takes."""
        self.source.model = model
        self.version += 1
        report = self.ranks.push(self.version)
        assert report.lost == {}, report.lost

    def assert_all_serve_the_new_weights(self) -> None:
        self.push(self.after)
        for server in self.servers:
            assert_serves(server, self.after, self.before)


def one_step_later(model: LlamaForCausalLM) -> LlamaForCausalLM:
    later = tiny_llama(0)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for ours, theirs in zip(later.parameters(), model.parameters(), strict=True):
            signs = torch.randint(0, 2, theirs.shape, generator=generator) * 2 - 1
            ours.copy_(theirs + LEARNING_RATE * signs)
    return later


def pool_of(servers: list[PoolServer], folder: Path) -> Iterator[Pool]:
    before = tiny_llama(21)
    old = folder / "old.safetensors"
    save_file({name: value.detach().clone() for name, value in before.named_parameters()}, old)
    source = ModelSource(before, num_stages=2)
    ranks = TrainerRanks(servers, [source, source], timeout_s=30)
    yield Pool(servers, ranks, source, before, one_step_later(before), old)
    ranks.close()


@pytest.fixture(scope="module")
def pool(pool_server: PoolServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    yield from pool_of([pool_server], tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def pool_of_two(
    pool_server: PoolServer, sharded_server: PoolServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pool]:
    yield from pool_of([pool_server, sharded_server], tmp_path_factory.mktemp("old_of_two"))


def assert_serves(server: PoolServer, model: LlamaForCausalLM, other: LlamaForCausalLM) -> None:
    """By mean |difference| of log-probs from Hugging Face's in fp32, which tells one step from the next."""
    distance, distance_of_other = served_distance(server, model), served_distance(server, other)
    print(f"{server.address}: {distance:.1e} nats from its model, {distance_of_other:.1e} from the other")
    assert distance < distance_of_other / 3


def assert_refuses(server: PoolServer, version: int) -> None:
    with ServerClient(server.address, server.token, 60) as client:
        assert client.is_paused()
    with pytest.raises(StaleWeights):
        VllmPool([server.address], server.token, timeout_s=60).generate(
            [Prompt("one", (1, 5, 6))], Sampling(max_tokens=2, eos_ids=(2,)), version
        )


def test_the_canary_cannot_tell_adjacent_steps(pool: Pool) -> None:
    pool.push(pool.before)
    (server,) = pool.servers
    assert_serves(server, pool.before, pool.after)
    with ServerClient(server.address, server.token, 60) as client:
        check_canary(client, canary_of(pool.after))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("skip", ["rank 2: not loaded: lm_head.weight, "]),
        ("put back", [f"rank 2: changed after it was loaded: {PLAIN}"]),
        ("exchange keys and values", ["loaded into the place of another: " + ", ".join(KEYS_AND_VALUES)]),
        ("exchange norms", ["loaded into the place of another: " + ", ".join(NORMS)]),
        ("transpose", [f"rank 2: not loaded: {SQUARE}"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_spoilt_load_is_named_and_its_server_serves_nothing(
    pool: Pool, kind: str, words: list[str]
) -> None:
    pool.push(pool.before)
    (server,) = pool.servers
    pool.source.model = pool.after
    pool.version += 1
    with server.planted(kind, None, pool.old), pytest.raises(NoServersLeft) as failed:
        pool.ranks.push(pool.version)
    assert all(one in str(failed.value) for one in words), failed.value
    assert_refuses(server, pool.version)
    pool.assert_all_serve_the_new_weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "words", "absent"),
    [
        ("skip", None, ["rank 3: not loaded: lm_head.weight, ", "rank 4: not loaded: "], "rank 2: "),
        ("skip", 1, ["rank 4: not loaded: lm_head.weight, "], "rank 3: "),
        ("put back", 1, [f"rank 4: changed after it was loaded: {PLAIN}"], "rank 3: "),
        (
            "exchange keys and values",
            None,
            ["loaded into the place of another: " + ", ".join(KEYS_AND_VALUES)],
            "not loaded",
        ),
        (
            "exchange norms",
            None,
            ["loaded into the place of another: " + ", ".join(NORMS)],
            "not loaded",
        ),
        ("transpose", None, [f"rank 3: not loaded: {SQUARE}", f"rank 4: not loaded: {SQUARE}"], "rank 2: "),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else None,
)
def test_a_spoilt_load_is_named_and_its_server_left_out(
    pool_of_two: Pool, kind: str, rank: int | None, words: list[str], absent: str
) -> None:
    pool = pool_of_two
    well, guilty = pool.servers
    pool.push(pool.before)
    pool.source.model = pool.after
    pool.version += 1
    started = time.monotonic()
    with guilty.planted(kind, rank, pool.old):
        report = pool.ranks.push(pool.version)
    print(
        f"{kind}: {time.monotonic() - started:.2f} s with the second push to the other server; {report.lost}"
    )
    assert report.serving == (well.address,)
    assert list(report.lost) == [guilty.address]
    reason = report.lost[guilty.address]
    assert all(one in reason for one in words) and absent not in reason, reason
    assert_serves(well, pool.after, pool.before)
    assert_refuses(guilty, pool.version)
    pool.assert_all_serve_the_new_weights()
