"""A push into a model with tied embeddings and biases, which vLLM's reload treats apart: its own server."""

from collections.abc import Iterator

import pytest
import torch
from pool_server import VOCAB_SIZE, PoolServer, start_pool_server
from trainer_ranks import ModelSource, TrainerRanks
from transformers import Qwen2Config, Qwen2ForCausalLM

from rto_megatron.errors import UserError
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.weight_sync.canary import canary_token_ids
from rto_megatron.weight_sync.manifest import PieceSpec

pytestmark = [pytest.mark.pool, pytest.mark.slow]


def tiny_qwen(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        architectures=["Qwen2ForCausalLM"],
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def tied_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServer]:
    yield from start_pool_server(tmp_path_factory.mktemp("tied"), tiny_qwen(0).config)


def served_difference(server: PoolServer, model: Qwen2ForCausalLM) -> float:
    token_ids = canary_token_ids(VOCAB_SIZE)
    with torch.no_grad():
        logp = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    expected = logp.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    with ServerClient(server.address, server.token, 30) as client:
        client.request("POST", "/resume")
        return (expected - torch.tensor(client.prompt_logprobs(list(token_ids)))).abs().max().item()


def test_both_ends_of_tied_embeddings_follow_every_push(tied_server: PoolServer) -> None:
    source = ModelSource(tiny_qwen(1))
    assert not any("lm_head" in spec.name for spec in source.specs())
    ranks = TrainerRanks(tied_server, [source])
    ranks.push(1)
    assert served_difference(tied_server, source.model) < 1e-4
    source.model = tiny_qwen(2)
    ranks.push(2)
    assert served_difference(tied_server, source.model) < 1e-4
    ranks.close()


def test_a_push_without_one_bias_is_refused_and_named(tied_server: PoolServer) -> None:
    class WithoutOne(ModelSource):
        def specs(self) -> tuple[PieceSpec, ...]:
            return tuple(
                spec for spec in super().specs() if "layers.1.self_attn.q_proj.bias" not in spec.name
            )

    old = tiny_qwen(3)
    for source, version in ((ModelSource(old), 3), (WithoutOne(tiny_qwen(4)), 4)):
        ranks = TrainerRanks(tied_server, [source])
        try:
            ranks.push(version)
        except UserError as error:
            assert version == 4 and "qkv_proj.bias would get 128 of its 256 numbers" in str(error)
        finally:
            ranks.close()
    assert served_difference(tied_server, old) < 1e-4
