"""The HTTP engine against a real vLLM server."""

import asyncio

import httpx
import pytest
import torch
from pool_server import PoolServer, tiny_llama
from transformers import LlamaForCausalLM
from weight_sync.trainer_ranks import ModelSource, TrainerRanks

from rto_megatron.errors import MachineError, PoolError
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.generation.vllm.start.server import ServerOptions, start_server
from rto_megatron.types import Prompt, Rollout

pytestmark = pytest.mark.pool

VERSION = 7
PROMPTS = [
    Prompt(f"prompt-{index}", (1, *((7 * index + 3 * at) % 470 + 5 for at in range(63))))
    for index in range(64)
]


def frequent_stops() -> LlamaForCausalLM:
    """A model that puts a good part of its mass on token 2: responses end early and late."""
    model = tiny_llama(11)
    with torch.no_grad():
        model.lm_head.weight[2] += 0.25 * model.lm_head.weight.abs().max() * torch.ones(128).sign()
    return model


@pytest.fixture
def pool(pool_server: PoolServer) -> VllmPool:
    ranks = TrainerRanks(pool_server, [ModelSource(frequent_stops())])
    ranks.push(VERSION)
    ranks.close()
    return VllmPool([pool_server.address], pool_server.token, timeout_s=60)


def test_order_ids_and_ends_of_64_responses(pool: VllmPool) -> None:
    rollouts = pool.generate(PROMPTS, Sampling(max_tokens=24, eos_ids=(2, 9), seed=1), VERSION)
    assert [(one.prompt_id, one.prompt_ids) for one in rollouts] == [
        (one.id, one.token_ids) for one in PROMPTS
    ]
    assert {one.finish_reason for one in rollouts} == {"stop", "length"}
    for one in rollouts:
        assert not {2, 9} & set(one.response_ids[:-1])
        assert len(one.sampled_logprobs) == len(one.response_ids)
        if one.finish_reason == "stop":
            assert one.response_ids[-1] in (2, 9)
        else:
            assert one.response_ids[-1] not in (2, 9) and len(one.response_ids) == 24


def test_a_seed_decides_and_the_batch_does_not(pool: VllmPool) -> None:
    """64 x 64 prompt tokens are twice what one step of the server takes: prefills would be cut without our
    options."""
    sampling = Sampling(max_tokens=12, eos_ids=(2,), seed=1)
    together = [one.response_ids for one in pool.generate(PROMPTS, sampling, VERSION)]
    assert together == [one.response_ids for one in pool.generate(PROMPTS, sampling, VERSION)]
    assert together[:3] == [one.response_ids for one in pool.generate(PROMPTS[:3], sampling, VERSION)]
    other = Sampling(max_tokens=12, eos_ids=(2,), seed=2)
    assert together != [one.response_ids for one in pool.generate(PROMPTS, other, VERSION)]


def test_a_repeated_prompt_gets_different_responses(pool: VllmPool) -> None:
    rollouts = pool.generate([PROMPTS[0]] * 8, Sampling(max_tokens=12, eos_ids=(2,)), VERSION)
    assert len({one.response_ids for one in rollouts}) == 8


def test_responses_to_a_prompt_share_its_prefill_until_the_weights_change(pool: VllmPool) -> None:
    long = Prompt("long", tuple((11 * at) % 470 + 5 for at in range(200)))  # a block has 128 tokens on a CPU
    how = Sampling(max_tokens=8, eos_ids=(479,), temperature=0.7)
    pool.measured()
    rollouts = pool.generate([long] * 8, how, VERSION)
    num_cached, num_read = pool.measured()["pool/prefix_hit_fraction"]
    print(f"{num_cached:g} of {num_read:g} prompt tokens were cached")
    # The first request of a push finds nothing, whatever was asked before it.
    assert num_read == 8 * 200 and 0 < num_cached <= 7 * 128
    model = frequent_stops()
    for one in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([long.token_ids + one.response_ids])).logits[0, 199:-1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(one.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.sampled_logprobs), expected, atol=1e-4, rtol=0)
    assert pool.measured()["pool/prefix_hit_fraction"] == (0, 0)


def test_no_end_before_the_minimum(pool: VllmPool) -> None:
    without = pool.generate(PROMPTS, Sampling(max_tokens=12, eos_ids=(2,)), VERSION)
    assert min(len(one.response_ids) for one in without) < 6
    rollouts = pool.generate(PROMPTS, Sampling(max_tokens=12, min_tokens=6, eos_ids=(2,)), VERSION)
    assert min(len(one.response_ids) for one in rollouts) >= 6
    assert any(one.finish_reason == "stop" for one in rollouts)


def test_greedy_takes_the_most_likely_token(pool: VllmPool) -> None:
    model = frequent_stops()
    for one in pool.generate(PROMPTS[:4], Sampling(max_tokens=5, eos_ids=(479,), temperature=0), VERSION):
        ids = torch.tensor([one.prompt_ids + one.response_ids])
        with torch.no_grad():
            best = model(ids).logits[0, len(one.prompt_ids) - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == one.response_ids


def test_a_response_that_does_not_fit_the_server_is_an_error(pool: VllmPool) -> None:
    with pytest.raises(PoolError, match=r"max-model-len|maximum|context"):
        pool.generate(PROMPTS[:1], Sampling(max_tokens=400, eos_ids=(479,)), VERSION)
    pool.check_alive()


def test_a_wrong_token_is_named_on_every_route(pool_server: PoolServer) -> None:
    with pytest.raises(PoolError, match="refused the token"):
        VllmPool([pool_server.address], "b" * 64, 10).check_alive()
    for route in (
        "/health",
        "/pause",
        "/collective_rpc",
        "/update_weights",
        "/v1/models",
        "/metrics",
        "/openapi.json",
    ):
        for method in ("GET", "POST"):
            assert httpx.request(method, pool_server.address + route).status_code == 401, route


def test_a_second_server_on_a_taken_port_is_refused(pool_server: PoolServer, tmp_path: object) -> None:
    port = int(pool_server.address.rsplit(":", 1)[1])
    log_file = pool_server.token_file.with_name("second.log")
    options = ServerOptions(pool_server.model, pool_server.token_file, log_file, port=port)
    with pytest.raises(MachineError, match=f"cannot listen on 127.0.0.1:{port}"):
        start_server(options)


def test_a_request_moves_to_the_other_server_when_the_first_is_dead(
    pool: VllmPool, pool_server: PoolServer
) -> None:
    dead = "http://127.0.0.1:9"
    both = VllmPool([dead, pool_server.address], pool_server.token, timeout_s=30)
    sampling = Sampling(max_tokens=6, eos_ids=(2,))
    expected = pool.generate(PROMPTS[:8], sampling, VERSION)
    # The version check would find the dead server; one that dies later is met by the requests.
    came: dict[int, Rollout] = {}
    assert asyncio.run(both._generate_all(PROMPTS[:8], sampling, VERSION, came.__setitem__)) == expected
    assert [came[place] for place in range(8)] == expected
    assert both.members.serving == (pool_server.address,)


def test_workers_are_counted(pool_server: PoolServer) -> None:
    with ServerClient(pool_server.address, pool_server.token, 10) as client:
        assert client.num_workers() == 1
