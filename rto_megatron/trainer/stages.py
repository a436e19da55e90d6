"""Runs a stage on this rank. The one place that prepares the device before anything of Megatron is imported."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rto_megatron.config import schema
from rto_megatron.config.load import load_recipe
from rto_megatron.platform.device import Device, prepare

if TYPE_CHECKING:
    from rto_megatron.parallel.topology import Topology


def run_stage(config: schema.Stage) -> None:
    """Trains or evaluates what the configuration says, as one of the ranks that the launcher started.

    Raises:
        UserError: on every rank, for anything that a user can mend.
    """
    topology = _join(prepare(), config)
    try:
        if isinstance(config, schema.EvaluateStage):
            from rto_megatron.trainer.evaluate import evaluate

            evaluate(config, topology)
        elif isinstance(config, schema.PpoStage):
            from rto_megatron.trainer.rto import train_rto

            train_rto(config, topology)
        else:
            from rto_megatron.trainer.offline import train_offline

            train_offline(config, topology)
    finally:
        _leave()


def export_run(run_dir: Path, folder: Path) -> None:
    """Writes the last checkpoint of a run as a Hugging Face folder, on one rank.

    Raises:
        UserError: no checkpoint there.
    """
    config = load_recipe(run_dir / "config.yaml")
    topology = _join_layout(prepare(), schema.ParallelConfig(), seed=0)
    try:
        from rto_megatron.engine.export import export_hf
        from rto_megatron.engine.roles import build_frozen
        from rto_megatron.engine.source import find_source

        is_scalar = isinstance(config, schema.RewardModelStage)
        source = find_source(run_dir, is_scalar, is_random=False, key="RUN_DIR")
        model = build_frozen("export", source, is_scalar, config.precision, topology)
        export_hf(model, source.hf_folder, folder)
    finally:
        _leave()


def _join(device: Device, config: schema.Stage) -> "Topology":
    return _join_layout(device, config.parallel, config.run.seed)


def _join_layout(device: Device, parallel: schema.ParallelConfig, seed: int) -> "Topology":
    from rto_megatron.parallel.topology import Topology

    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(key, value)
    return Topology.init(device, parallel.tensor, parallel.pipeline, parallel.sequence, seed)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
