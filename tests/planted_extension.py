"""A worker extension for tests: plants one of `plants.PLANTS` in every load while a file asks for it.

Named to a server by `ServerOptions.worker_extension`; the file is written by `pool_server.PoolServer.planted`.
"""

import json
import os
from pathlib import Path

from plants import PLANT_FILE_VARIABLE, PLANTS
from safetensors.torch import load_file

from rto_megatron.generation.vllm.worker.plugin import RtoWeightTransferEngine, RtoWorkerExtension
from rto_megatron.generation.vllm.worker.receiver import Staged

_load = RtoWeightTransferEngine._load


class PlantedExtension(RtoWorkerExtension):
    """Being named makes the worker import this module."""


def _load_with_plant(engine: RtoWeightTransferEngine, staged: Staged) -> str | None:
    asked_for = Path(os.environ[PLANT_FILE_VARIABLE])
    if not asked_for.exists():
        return _load(engine, staged)
    plant = json.loads(asked_for.read_text())
    if plant["rank"] not in (None, engine.parallel_config.rank):
        return _load(engine, staged)
    with PLANTS[plant["kind"]](engine.model, load_file(plant["old"])):
        return _load(engine, staged)


RtoWeightTransferEngine._load = _load_with_plant
