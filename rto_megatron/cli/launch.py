"""`rto launch`: all processes of one stage on this machine, its ranks and, where it samples, its pool."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.errors import UserError

if TYPE_CHECKING:
    from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
    from rto_megatron.rollout.server import Server, ServerOptions


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(launch)


def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trainer processes; default: all GPUs that the pool leaves, or tensor x pipeline."
        ),
    ] = None,
    pool_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the pool, one server each; default: half of them.")
    ] = None,
) -> None:
    """Run one stage on this machine: start a pool if it samples and names none, start its ranks, stop all.

    The ranks start as by `torchrun --standalone --nproc-per-node N -m rto_megatron.cli.main train RECIPE`.
    """
    import torch

    from rto_megatron.cli.torchrun import run_ranks
    from rto_megatron.config.load import load_recipe
    from rto_megatron.config.schema import EvaluateStage, ReinforcementStage

    config = load_recipe(recipe, overrides or [])
    gpus = torch.cuda.device_count()
    arguments = ["train", str(recipe), *(overrides or [])]
    num_pool_gpus = 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the pool's servers inherit it
    with ExitStack() as stack:
        if isinstance(config, ReinforcementStage | EvaluateStage) and not config.rollout.servers:
            num_pool_gpus = pool_gpus or gpus // 2
            token_file = config.rollout.token_file or config.run.dir / "pool" / "token"
            servers = stack.enter_context(_local_pool(config, token_file, gpus, num_pool_gpus))
            addresses = ",".join(server.address for server in servers)
            arguments += [f"rollout.servers=[{addresses}]", f"rollout.token_file={token_file}"]
        model_ranks = config.parallel.tensor * config.parallel.pipeline
        num_ranks = ranks or max(1, (gpus - num_pool_gpus) // model_ranks) * model_ranks
        run_ranks(num_ranks, arguments)


@contextmanager
def _local_pool(
    config: "ReinforcementStage | EvaluateStage", token_file: Path, gpus: int, num_pool_gpus: int
) -> "Iterator[list[Server]]":
    """Servers for the stage: one per pool GPU, the last GPUs of the machine, or one on the CPU."""
    from rto_megatron.rollout.server import stop_server, wait_until_ready

    if gpus and not 0 < num_pool_gpus < gpus:
        raise UserError(f"this machine has {gpus} GPUs; the trainer and the pool need at least one each")
    servers: list[Server] = []
    try:
        for index in range(num_pool_gpus or 1):
            device = gpus - num_pool_gpus + index if gpus else None
            servers.append(_start_on(device, _options(config, token_file, index)))
        for server in servers:
            wait_until_ready(server, progress=typer.echo)
        yield servers
    finally:
        for server in servers:
            stop_server(server)


def _options(config: "ReinforcementStage | EvaluateStage", token_file: Path, index: int) -> "ServerOptions":
    from rto_megatron.cli.shapes import hugging_face_folder
    from rto_megatron.rollout.server import ServerOptions

    return ServerOptions(
        model=hugging_face_folder(config.models.policy),
        token_file=token_file,
        log_file=config.run.dir / "pool" / f"server-{index}.log",
        dtype=config.precision.dtype,
        max_model_len=max(64, config.data.max_prompt_tokens + config.sampling.max_response_tokens),
    )


def _start_on(device: int | None, options: "ServerOptions") -> "Server":
    from rto_megatron.rollout.server import start_server

    if device is None:
        return start_server(options)
    # A server sees the devices that its environment names, and inherits the environment of this process.
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = before.split(",")[device] if before else str(device)
    try:
        return start_server(options)
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
