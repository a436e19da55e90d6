"""`rto pool`: one vLLM server of the inference pool."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(pool)


def pool(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder; only its config.json is needed.")],
    token_file: Annotated[
        Path, typer.Option(help="File with the pool's bearer token; made, readable by you only, when absent.")
    ],
    address_file: Annotated[
        Path | None, typer.Option(help="Receives the server's address once it is ready; removed at the end.")
    ] = None,
    log_file: Annotated[Path, typer.Option(help="Receives what vLLM prints.")] = Path("pool.log"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: a free one.")] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="The trainer's precision.dtype.")] = "bf16",
    load_weights: Annotated[
        bool,
        typer.Option(help="Read the folder's weights; otherwise the first push of a trainer brings them."),
    ] = False,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and response tokens together; default: the model's limit.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs of this server.")] = 1,
    gpu_memory_fraction: Annotated[
        float | None, typer.Option(min=0.05, max=1.0, help="Share of each GPU's memory; default: vLLM's.")
    ] = None,
) -> None:
    """Run one inference server until Ctrl-C or SIGTERM.

    Start one per set of GPUs (CUDA_VISIBLE_DEVICES chooses them), all with the same token file, and give the
    addresses to the trainer as rollout.servers.
    """
    from rto_megatron.rollout.server import ServerOptions, serve_pool

    options = ServerOptions(
        model=model,
        token_file=token_file,
        log_file=log_file,
        host=host,
        port=port,
        dtype=dtype,
        load_weights=load_weights,
        max_model_len=max_model_len,
        tensor_parallel=tensor_parallel,
        gpu_memory_fraction=gpu_memory_fraction,
    )
    serve_pool([options], address_file)
