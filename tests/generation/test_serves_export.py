"""vLLM reads the Hugging Face folder that a Megatron model was exported to."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from pool_server import VOCAB_SIZE, start_pool_server, tiny_llama
from ranks import run_ranks

from rto_megatron.engine.export import export_hf
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.weight_sync.canary import canary_token_ids

pytestmark = [pytest.mark.pool, pytest.mark.slow]


def _export(layout: str, source: Path, folder: Path) -> None:
    export_hf(frozen(topology(layout), source, is_scalar=False), source, folder)


@torch.no_grad()
def test_a_server_with_an_exported_policy_computes_its_log_probs(tmp_path: Path) -> None:
    model = tiny_llama(5)
    model.save_pretrained(tmp_path / "source")
    run_ranks(LAYOUTS["tp2_pp2"][0], _export, "tp2_pp2", tmp_path / "source", tmp_path / "exported")
    token_ids = canary_token_ids(VOCAB_SIZE)
    tokens = torch.tensor([token_ids])
    expected = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    for server in start_pool_server(tmp_path, tmp_path / "exported"):
        with ServerClient(server.address, server.token, 60) as client:
            served = torch.tensor(client.prompt_logprobs(list(token_ids)))
        assert (served - expected).abs().max() < 1e-4
