"""One vLLM server for a whole test session: a tiny random Llama with dummy weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from plants import PLANT_FILE_VARIABLE
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
    """One server, and the Hugging Face folder whose architecture it has; its weights are dummies.

    `plant_file` spoils its loads while it is there (planted_extension.py).
    """

    address: str
    token: str
    token_file: Path
    model: Path
    process: psutil.Process
    log_file: Path
    plant_file: Path

    @contextmanager
    def planted(self, kind: str, rank: int | None, old: Path) -> Iterator[None]:
        """Spoils every load of all workers, or of one, meanwhile.

        Args:
            kind: of `plants.PLANTS`.
            rank: the tensor rank, None for all.
            old: safetensors file of the weights before the push.
        """
        self.plant_file.write_text(json.dumps({"kind": kind, "rank": rank, "old": str(old)}))
        try:
            yield
        finally:
            self.plant_file.unlink()

    def engine(self) -> psutil.Process:
        """The process that computes, or leads those that do."""
        (engine,) = (one for one in self.process.children() if "EngineCore" in one.name())
        return engine


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


def start_pool_server(
    folder: Path,
    model: PreTrainedConfig | Path,
    token_file: Path | None = None,
    tensor_parallel: int = 1,
    is_loaded: bool = True,
) -> Iterator[PoolServer]:
    """Yields a server, and stops it.

    Args:
        model: a configuration, which gets random weights, or a folder.
        token_file: another server's; None makes one.
        is_loaded: whether it begins with the folder's weights.
    """
    is_folder = isinstance(model, Path)
    if not is_folder:
        model.save_pretrained(folder / "model")
    options = ServerOptions(
        model=model if is_folder else folder / "model",
        token_file=token_file or folder / "token",
        log_file=folder / "server.log",
        dtype="fp32",
        max_model_len=256,
        load_weights=is_folder and is_loaded,
        tensor_parallel=tensor_parallel,
        worker_extension="planted_extension.PlantedExtension",
    )
    plant_file = folder / "plant.json"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent))
        environment.setenv(PLANT_FILE_VARIABLE, str(plant_file))
        server = start_server(options)
    try:
        wait_until_ready(server, timeout_s=600)
        yield PoolServer(
            server.address,
            read_token(options.token_file),
            options.token_file,
            options.model,
            psutil.Process(server.process.pid),
            options.log_file,
            plant_file,
        )
    finally:
        stop_server(server)
