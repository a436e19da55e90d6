"""`rto launch`: all processes of one stage on this machine, its ranks and, where it samples, its pool."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rto_megatron.cli.options import Overrides, Recipe
from rto_megatron.cli.placement import place, tensor_sizes
from rto_megatron.errors import UserError

if TYPE_CHECKING:
    from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
    from rto_megatron.rollout.server import ServerOptions


Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Trainer processes; default: all GPUs that the pool leaves, or tensor x pipeline."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(launch)


def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = None,
    pool_gpus: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of the pool; default: half of them, or what its servers take."),
    ] = None,
    pool_servers: Annotated[
        int | None,
        typer.Option(min=1, help="Servers of the pool; default: as many as its GPUs hold, one on a CPU."),
    ] = None,
    pool_tensor: Annotated[
        str,
        typer.Option(help="Tensor-parallel size of the pool's servers; one for all, or one each, as in 1,2."),
    ] = "1",
) -> None:
    """Run one stage on this machine: start a pool if it samples and names none, start its ranks, stop all.

    The ranks start as by `torchrun --standalone --nproc-per-node N -m rto_megatron.cli.main train RECIPE`. A server
    of the pool that ends is started again, up to five times in a row, and serves from the next weight push on. With
    rollout.colocated=true the pool lives on the ranks' own GPUs.
    """
    import torch

    from rto_megatron.cli.colocated import put_to_sleep, shared_sizes
    from rto_megatron.cli.torchrun import run_ranks
    from rto_megatron.config.load import load_recipe
    from rto_megatron.config.schema import EvaluateStage, ReinforcementStage
    from rto_megatron.rollout.supervisor import supervised

    config = load_recipe(recipe, overrides or [])
    gpus = torch.cuda.device_count()
    arguments = ["train", str(recipe), *(overrides or [])]
    num_pool_gpus = 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the pool's servers inherit it
    with ExitStack() as stack:
        if isinstance(config, ReinforcementStage | EvaluateStage) and not config.rollout.servers:
            token_file = config.rollout.token_file or config.run.dir / "pool" / "token"
            if config.rollout.colocated:
                sizes = shared_sizes(config, gpus, ranks, pool_gpus, pool_servers, pool_tensor)
                first_gpu = 0
            else:
                sizes = _sizes(gpus, pool_gpus, pool_servers, pool_tensor)
                num_pool_gpus = sum(sizes) if gpus else 0
                first_gpu = gpus - num_pool_gpus
            devices = range(first_gpu, first_gpu + sum(sizes)) if gpus else range(0)
            options = _pool_options(config, token_file, sizes, devices)
            pool = stack.enter_context(supervised(options, typer.echo))
            if config.rollout.colocated:
                put_to_sleep(pool.addresses, token_file)
            arguments += [
                f"rollout.servers=[{','.join(pool.addresses)}]",
                f"rollout.token_file={token_file}",
            ]
        model_ranks = config.parallel.tensor * config.parallel.pipeline
        num_ranks = ranks or max(1, (gpus - num_pool_gpus) // model_ranks) * model_ranks
        run_ranks(num_ranks, arguments)


def _sizes(gpus: int, pool_gpus: int | None, pool_servers: int | None, pool_tensor: str) -> list[int]:
    """Tensor-parallel size of each server of the pool."""
    if not gpus:
        return tensor_sizes(pool_tensor, pool_servers, None)
    is_counted = pool_servers is not None or "," in pool_tensor
    sizes = tensor_sizes(pool_tensor, pool_servers, pool_gpus or (None if is_counted else max(1, gpus // 2)))
    if not 0 < sum(sizes) < gpus:
        raise UserError(
            f"this machine has {gpus} GPUs, and the pool's servers would take {sum(sizes)}; the trainer and the pool "
            "need at least one each"
        )
    return sizes


def _pool_options(
    config: "ReinforcementStage | EvaluateStage", token_file: Path, sizes: list[int], devices: range
) -> "list[ServerOptions]":
    from rto_megatron.cli.shapes import hugging_face_folder
    from rto_megatron.rollout.server import ServerOptions

    return [
        ServerOptions(
            model=hugging_face_folder(config.models.policy),
            token_file=token_file,
            log_file=config.run.dir / "pool" / f"server-{index}.log",
            dtype=config.precision.dtype,
            max_model_len=max(64, config.data.max_prompt_tokens + config.sampling.max_response_tokens),
            tensor_parallel=size,
            gpu_memory_fraction=config.rollout.gpu_memory_fraction,
            can_sleep=config.rollout.colocated,
            visible_gpus=visible,
        )
        for index, (size, visible) in enumerate(zip(sizes, place(sizes, devices), strict=True))
    ]
