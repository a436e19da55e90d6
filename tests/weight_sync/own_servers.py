"""vLLM servers of a test's own beside the session's, whose token and model they have: to be spoilt and killed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from plants import PLANT_FILE_VARIABLE
from pool_server import PoolServer

from rto_megatron.generation.vllm.start.server import (
    ServerOptions,
    start_server,
    stop_server,
    wait_until_ready,
)


@dataclass(frozen=True)
class OwnServer:
    """One server, its processes, and the file that spoils its loads (planted_extension.py)."""

    pool: PoolServer
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


@contextmanager
def own_server(session: PoolServer, folder: Path, tensor_parallel: int) -> Iterator[OwnServer]:
    """A server with so many tensor ranks.

    Args:
        session: whose token and model it has.
    """
    options = ServerOptions(
        model=session.model,
        token_file=session.token_file,
        log_file=folder / "server.log",
        dtype="fp32",
        max_model_len=256,
        tensor_parallel=tensor_parallel,
        worker_extension="planted_extension.PlantedExtension",
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent))
        environment.setenv(PLANT_FILE_VARIABLE, str(folder / "plant.json"))
        server = start_server(options)
    try:
        wait_until_ready(server, timeout_s=600)
        yield OwnServer(
            PoolServer(server.address, session.token, session.token_file, session.model),
            psutil.Process(server.process.pid),
            server.log_file,
            folder / "plant.json",
        )
    finally:
        stop_server(server)
