"""`rto pool`: vLLM servers of the inference pool."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rto_megatron.rollout.server import ServerOptions


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(pool)


def pool(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder; only its config.json is needed.")],
    token_file: Annotated[
        Path, typer.Option(help="File with the pool's bearer token; made, readable by you only, when absent.")
    ],
    address_file: Annotated[
        Path | None,
        typer.Option(help="Receives the addresses, one a line, once all are ready; removed at the end."),
    ] = None,
    log_file: Annotated[
        Path, typer.Option(help="Receives what vLLM prints; numbered where there are several servers.")
    ] = Path("pool.log"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Of the first server, the others follow; default: free ones.")
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="The trainer's precision.dtype.")] = "bf16",
    load_weights: Annotated[
        bool,
        typer.Option(help="Read the folder's weights; otherwise the first push of a trainer brings them."),
    ] = False,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and response tokens together; default: the model's limit.")
    ] = None,
    servers: Annotated[int | None, typer.Option(min=1, help="Number of servers; default: one.")] = None,
    tensor_parallel: Annotated[
        str, typer.Option(help="GPUs of a server; one number for all, or one each, as in 1,2.")
    ] = "1",
    gpu_memory_fraction: Annotated[
        float | None, typer.Option(min=0.05, max=1.0, help="Share of each GPU's memory; default: vLLM's.")
    ] = None,
    can_sleep: Annotated[
        bool, typer.Option(help="For rollout.colocated=true: give the GPUs' memory back when told to.")
    ] = False,
) -> None:
    """Run inference servers until Ctrl-C or SIGTERM; one that ends is started again, up to five times in a row.

    The servers share the GPUs of CUDA_VISIBLE_DEVICES. Give their addresses to the trainer as rollout.servers. Pools
    on several machines work as one if all have the same token file.
    """
    from rto_megatron.rollout.server import ServerOptions
    from rto_megatron.rollout.supervisor import serve_pool

    one = ServerOptions(
        model=model,
        token_file=token_file,
        log_file=log_file,
        host=host,
        port=port,
        dtype=dtype,
        load_weights=load_weights,
        max_model_len=max_model_len,
        gpu_memory_fraction=gpu_memory_fraction,
        can_sleep=can_sleep,
    )
    serve_pool(_several(one, servers, tensor_parallel), address_file)


def _several(one: "ServerOptions", servers: int | None, tensor_parallel: str) -> "list[ServerOptions]":
    import torch

    from rto_megatron.cli.placement import place, tensor_sizes

    gpus = torch.cuda.device_count()
    num_servers = servers or (None if "," in tensor_parallel else 1)
    sizes = tensor_sizes(tensor_parallel, num_servers, gpus or None)
    log = one.log_file
    return [
        replace(
            one,
            log_file=log if len(sizes) == 1 else log.with_stem(f"{log.stem}-{index}"),
            port=None if one.port is None else one.port + index,
            tensor_parallel=size,
            visible_gpus=visible,
        )
        for index, (size, visible) in enumerate(zip(sizes, place(sizes, range(gpus)), strict=True))
    ]
