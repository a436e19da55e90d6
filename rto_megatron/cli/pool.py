"""`rto pool`: vLLM servers of the inference pool."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from rto_megatron.config.training import Fp32Part
    from rto_megatron.generation.vllm.start.server import NodeGroup, ServerOptions

_Port = Annotated[
    int | None, typer.Option(help="Of the first server, the others follow; default: free ones.")
]
_Interface = Annotated[
    str | None, typer.Option(metavar="NAME", help="Listen on this network interface, in place of --host.")
]
_Nodes = Annotated[int, typer.Option(min=1, help="Machines of one server that is larger than a machine.")]
_NodeRank = Annotated[
    int, typer.Option(min=0, help="This machine's place among --nodes; 0 answers requests.")
]
_Leader = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="On the machine of rank 0, where the workers of --nodes meet."),
]
_MaxModelLen = Annotated[
    int | None, typer.Option(help="Prompt and response tokens together; default: the model's limit.")
]
_ReadyWithin = Annotated[
    float,
    typer.Option(min=1, metavar="SECONDS", help="For a server to start, which loads weights and compiles."),
]
_CanSleep = Annotated[
    bool, typer.Option(help="For rollout.colocated=true: give the GPUs' memory back when told to.")
]


_AddressFile = Annotated[
    Path | None,
    typer.Option(help="Receives the addresses, one a line, once all are ready; removed at the end."),
]
_Fp32Head = Annotated[
    bool, typer.Option("--fp32-head", help="The trainer's precision.fp32_parts names head.")
]
_Fp32Residual = Annotated[
    bool, typer.Option("--fp32-residual", help="The trainer's precision.fp32_parts names residual.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(pool)


def pool(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder; only its config.json is needed.")],
    token_file: Annotated[
        Path, typer.Option(help="File with the pool's bearer token; made, readable by you only, when absent.")
    ],
    address_file: _AddressFile = None,
    log_file: Annotated[
        Path, typer.Option(help="Receives what vLLM prints; numbered where there are several servers.")
    ] = Path("pool.log"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: _Port = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="The trainer's precision.dtype.")] = "bf16",
    fp32_head: _Fp32Head = False,
    fp32_residual: _Fp32Residual = False,
    load_weights: Annotated[
        bool,
        typer.Option(help="Read the folder's weights; otherwise the first push of a trainer brings them."),
    ] = False,
    max_model_len: _MaxModelLen = None,
    servers: Annotated[int | None, typer.Option(min=1, help="Number of servers; default: one.")] = None,
    tensor_parallel: Annotated[
        str, typer.Option(help="GPUs of a server; one number for all, or one each, as in 1,2.")
    ] = "1",
    gpu_memory_fraction: Annotated[
        float | None, typer.Option(min=0.05, max=1.0, help="Share of each GPU's memory; default: vLLM's.")
    ] = None,
    can_sleep: _CanSleep = False,
    ready_within: _ReadyWithin = 1800,
    interface: _Interface = None,
    nodes: _Nodes = 1,
    node_rank: _NodeRank = 0,
    leader: _Leader = None,
) -> None:
    """Run inference servers until Ctrl-C or SIGTERM; one that ends is started again, up to five times in a row.

    The servers share the GPUs of CUDA_VISIBLE_DEVICES. Give their addresses to the trainer as rollout.servers. Pools
    on several machines work as one if all have the same token file.
    """
    from rto_megatron.config.addresses import without_localhost
    from rto_megatron.generation.vllm.start.server import ServerOptions
    from rto_megatron.launching.serving import serve_part, serve_pool

    one = ServerOptions(
        model=model,
        token_file=token_file,
        log_file=log_file,
        host=_address(interface) or without_localhost(host),
        port=port,
        dtype=dtype,
        fp32_parts=_parts(fp32_head, fp32_residual),
        load_weights=load_weights,
        max_model_len=max_model_len,
        gpu_memory_fraction=gpu_memory_fraction,
        can_sleep=can_sleep,
        group=_group(nodes, node_rank, leader),
    )
    if node_rank > 0:
        serve_part(_several(one, servers, tensor_parallel)[0])
    serve_pool(_several(one, servers, tensor_parallel), address_file, start_limit_s=ready_within)


def _parts(has_head: bool, has_residual: bool) -> "list[Fp32Part]":
    parts: list[tuple[Fp32Part, bool]] = [("head", has_head), ("residual", has_residual)]
    return [part for part, is_fp32 in parts if is_fp32]


def _address(interface: str | None) -> str | None:
    from rto_megatron.platform.network import interface_address

    return None if interface is None else interface_address(interface)


def _group(nodes: int, node_rank: int, leader: str | None) -> "NodeGroup | None":
    from rto_megatron.config.addresses import without_localhost
    from rto_megatron.generation.vllm.start.server import NodeGroup

    if nodes == 1 and (leader is not None or node_rank > 0):
        raise RecipeError(
            "--leader and --node-rank belong to a server on several machines; name their number in --nodes"
        )
    if nodes == 1:
        return None
    if leader is None or node_rank >= nodes:
        raise RecipeError(
            f"--nodes {nodes} --node-rank {node_rank} --leader {leader}: a server on several machines needs --leader "
            "HOST:PORT and ranks below --nodes"
        )
    return NodeGroup(nodes, node_rank, without_localhost(leader))


def _several(one: "ServerOptions", servers: int | None, tensor_parallel: str) -> "list[ServerOptions]":
    import torch

    from rto_megatron.planning.placement import place, tensor_sizes

    if one.group is not None:
        return [replace(one, tensor_parallel=tensor_sizes(tensor_parallel, 1, None)[0])]

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
