"""Weight pushes into a real vLLM server; the truth is a Hugging Face model in fp32."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pool_server import VOCAB_SIZE, PoolServer, tiny_llama
from torch import Tensor
from trainer_ranks import TOLERANCE, ModelSource, TrainerRanks, canary_of
from transformers import LlamaForCausalLM

from rto_megatron.errors import PoolError
from rto_megatron.generation.contract import NoServersLeft, Sampling, StaleWeights
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.types import Prompt, Rollout
from rto_megatron.weight_sync.canary import canary_token_ids
from rto_megatron.weight_sync.manifest import PieceSpec
from rto_megatron.weight_sync.shared import OpenEnd, open_communicator
from rto_megatron.weight_sync.transport import Broadcast, Communicator

pytestmark = pytest.mark.pool

PROMPTS = [Prompt(f"prompt-{index}", (1, *range(5 + index, 12 + 2 * index))) for index in range(8)]
SAMPLING = Sampling(max_tokens=16, eos_ids=(2,), seed=3)


def generate(server: PoolServer, version: int) -> list[Rollout]:
    """Asks a pool that remembers nothing of earlier pushes."""
    return VllmPool([server.address], server.token, timeout_s=60).generate(PROMPTS, SAMPLING, version)


def logprobs(model: LlamaForCausalLM, token_ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def largest_difference(rollouts: list[Rollout], model: LlamaForCausalLM) -> float:
    differences = []
    for one in rollouts:
        expected = logprobs(model, one.prompt_ids + one.response_ids)[len(one.prompt_ids) - 1 :]
        differences.append((expected - torch.tensor(one.sampled_logprobs)).abs().max().item())
    return max(differences)


def served_difference(server: PoolServer, model: LlamaForCausalLM) -> float:
    """Asks the server itself, whatever its version, and resumes it for that."""
    with ServerClient(server.address, server.token, 30) as client:
        client.request("POST", "/resume")
        got = client.prompt_logprobs(list(canary_token_ids(VOCAB_SIZE)))
    return (logprobs(model, canary_token_ids(VOCAB_SIZE)) - torch.tensor(got)).abs().max().item()


def push_once(
    server: PoolServer, source: ModelSource, version: int, open_end: OpenEnd = open_communicator
) -> None:
    ranks = TrainerRanks(server, [source], open_end=open_end)
    try:
        ranks.push(version)
    finally:
        ranks.close()


def test_the_pool_samples_from_the_pushed_weights_and_not_from_older_ones(pool_server: PoolServer) -> None:
    first, second = tiny_llama(1), tiny_llama(2)
    source = ModelSource(first)
    ranks = TrainerRanks(pool_server, [source])
    ranks.push(10)
    assert largest_difference(generate(pool_server, 10), first) < TOLERANCE
    source.model = second
    ranks.push(11)
    rollouts = generate(pool_server, 11)
    assert {one.weight_version for one in rollouts} == {11}
    assert largest_difference(rollouts, second) < TOLERANCE
    assert largest_difference(rollouts, first) > 1
    ranks.close()


def test_another_version_than_the_pushed_one_is_refused(pool_server: PoolServer) -> None:
    push_once(pool_server, ModelSource(tiny_llama(1)), 20)
    for version in (19, 21):
        with pytest.raises(StaleWeights, match=f"holds weight version 20, expected {version}"):
            generate(pool_server, version)


def test_two_senders_and_a_bystander_push_one_model(pool_server: PoolServer) -> None:
    model = tiny_llama(3)
    source = ModelSource(model, num_stages=2)
    assert {spec.sender for spec in source.specs()} == {0, 1}
    ranks = TrainerRanks(pool_server, [source, source], num_bystanders=1)
    ranks.push(30)
    ranks.push(31)
    assert largest_difference(generate(pool_server, 31), model) < TOLERANCE
    ranks.close()


class DamagingEnd(Communicator):
    """Flips a bit of the third bucket that it sends, after its digests were taken."""

    num_sent = 0

    def start_broadcast(self, buffer: Tensor, source: int) -> Broadcast:
        self.num_sent += 1
        if self.num_sent == 3:
            buffer[buffer.numel() // 2] ^= 4
        return super().start_broadcast(buffer, source)


def test_one_flipped_bit_on_the_wire_is_refused_and_named(pool_server: PoolServer) -> None:
    old = tiny_llama(4)
    push_once(pool_server, ModelSource(old), 40)
    with pytest.raises(PoolError, match=r"rank 1: arrived with other numbers than were sent: model.layers.0"):
        push_once(pool_server, ModelSource(tiny_llama(5)), 41, DamagingEnd)
    assert_old_weights_survived(pool_server, old, 40)


def test_a_push_without_one_tensor_is_refused_and_named(pool_server: PoolServer) -> None:
    class WithoutOne(ModelSource):
        def specs(self) -> tuple[PieceSpec, ...]:
            return tuple(spec for spec in super().specs() if "layers.1.self_attn.k_proj" not in spec.name)

        def pieces(self, sender: int) -> Iterator[tuple[str, Tensor]]:
            return (pair for pair in super().pieces(sender) if "layers.1.self_attn.k_proj" not in pair[0])

    old = tiny_llama(4)
    push_once(pool_server, ModelSource(old), 50)
    words = r"model.layers.1.self_attn.qkv_proj.weight would get 24576 of its 32768 numbers"
    with pytest.raises(PoolError, match=words):
        push_once(pool_server, WithoutOne(tiny_llama(5)), 51)
    assert_old_weights_survived(pool_server, old, 50)


def test_a_push_in_another_dtype_or_shape_is_refused_and_named(pool_server: PoolServer) -> None:
    old = tiny_llama(4)
    push_once(pool_server, ModelSource(old), 60)
    with pytest.raises(
        PoolError, match=r"embed_tokens.weight is torch.float32 here and torch.bfloat16 in the push"
    ):
        push_once(pool_server, ModelSource(tiny_llama(5).bfloat16()), 61)
    other = tiny_llama(5)
    other.resize_token_embeddings(VOCAB_SIZE + 8)
    with pytest.raises(PoolError, match=r"embed_tokens.weight float32 \[488, 128\] cannot be loaded"):
        push_once(pool_server, ModelSource(other), 62)
    assert_old_weights_survived(pool_server, old, 60)


def test_senders_with_different_manifests_are_refused_and_named(pool_server: PoolServer) -> None:
    class Renamed(ModelSource):
        def specs(self) -> tuple[PieceSpec, ...]:
            *others, last = super().specs()
            return (*others, replace(last, name="lm_head.wait"))

    old = tiny_llama(4)
    push_once(pool_server, ModelSource(old), 70)
    new = tiny_llama(5)
    ranks = TrainerRanks(pool_server, [ModelSource(new, 2), Renamed(new, 2)])
    with pytest.raises(PoolError, match=r"ranks \[1\] hold another weight manifest .* lm_head.wait"):
        ranks.push(71)
    ranks.close()
    assert_old_weights_survived(pool_server, old, 70)


def test_a_sender_that_fails_midway_leaves_a_pool_that_can_be_pushed_to_again(
    pool_server: PoolServer,
) -> None:
    class Failing(ModelSource):
        is_broken = True

        def pieces(self, sender: int) -> Iterator[tuple[str, Tensor]]:
            for number, pair in enumerate(super().pieces(sender)):
                if sender == 1 and number == 3 and self.is_broken:
                    raise RuntimeError("out of memory while gathering")
                yield pair

    old, new = tiny_llama(4), tiny_llama(5)
    push_once(pool_server, ModelSource(old), 80)
    source = Failing(new, 2)
    # A push that waits for this limit fails: its ranks wait 120 s for each other.
    ranks = TrainerRanks(pool_server, [source, source], timeout_s=200)
    with pytest.raises(
        PoolError, match=r"push of weight version 81 failed while sending.*: out of memory while gathering"
    ):
        ranks.push(81)
    with pytest.raises(StaleWeights, match="holds weight version 80"):
        generate(pool_server, 81)
    source.is_broken = False
    ranks.push(82)
    assert largest_difference(generate(pool_server, 82), new) < TOLERANCE
    ranks.close()


def test_a_session_left_open_by_a_dead_trainer_is_cleared(pool_server: PoolServer) -> None:
    with ServerClient(pool_server.address, pool_server.token, 30) as client:
        client.request("POST", "/start_weight_update")
    model = tiny_llama(6)
    push_once(pool_server, ModelSource(model), 90)
    assert largest_difference(generate(pool_server, 90), model) < TOLERANCE


def test_a_server_that_computes_something_else_stays_paused(pool_server: PoolServer) -> None:
    model = tiny_llama(7)
    ranks = TrainerRanks(pool_server, [ModelSource(model)], num_bystanders=1)
    ranks.push(100)
    wrong = canary_of(tiny_llama(8))
    with pytest.raises(
        NoServersLeft, match=r"computes other log-probs than the trainer: mean difference \d.*while proving"
    ):
        ranks.push(102, wrong)
    with pytest.raises(StaleWeights, match="is paused"):
        generate(pool_server, 102)
    nan = replace(wrong, expected_logprobs=[float("nan")] * len(wrong.expected_logprobs))
    with pytest.raises(NoServersLeft, match="computes other log-probs"):
        ranks.push(103, nan)
    ranks.push(104)
    assert largest_difference(generate(pool_server, 104), model) < TOLERANCE
    ranks.close()


def assert_old_weights_survived(server: PoolServer, old: LlamaForCausalLM, version: int) -> None:
    with pytest.raises(StaleWeights, match="is paused"):
        generate(server, version)
    assert served_difference(server, old) < TOLERANCE
    assert largest_difference(generate(server, version), old) < TOLERANCE
