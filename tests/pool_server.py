"""One vLLM server for a whole test session: a tiny random Llama with dummy weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.generation.vllm.start.server import (
    ServerOptions,
    start_server,
    stop_server,
    wait_until_ready,
)

VOCAB_SIZE = 480  # no multiple of 64: vLLM pads its vocabulary


@dataclass(frozen=True)
class PoolServer:
    """Address, token and the Hugging Face folder whose architecture the server has; its weights are
    dummies."""

    address: str
    token: str
    token_file: Path
    model: Path


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """A random fp32 Llama of the server's architecture, in evaluation mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.08,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def pool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServer]:
    """Starts in 30-80 s on a small CPU machine; tests that use it carry the mark `pool`."""
    yield from start_pool_server(tmp_path_factory.mktemp("pool"), tiny_llama(0).config)


def start_pool_server(folder: Path, model: PreTrainedConfig | Path) -> Iterator[PoolServer]:
    """Yields a server, and stops it: of a configuration with random weights, or of a folder with its own."""
    if isinstance(model, PreTrainedConfig):
        model.save_pretrained(folder / "model")
    options = ServerOptions(
        model=model if isinstance(model, Path) else folder / "model",
        token_file=folder / "token",
        log_file=folder / "server.log",
        dtype="fp32",
        max_model_len=256,
        load_weights=isinstance(model, Path),
    )
    server = start_server(options)
    try:
        wait_until_ready(server, timeout_s=300)
        yield PoolServer(server.address, read_token(options.token_file), options.token_file, options.model)
    finally:
        stop_server(server)
