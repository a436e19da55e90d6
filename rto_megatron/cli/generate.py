"""`rto generate`: a model's answers to AlpacaEval or Arena-Hard."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from rto_megatron.generation.contract import RolloutEngine

_NAME = re.compile(r"[\w.-]+")


_Model = Annotated[
    Path,
    typer.Argument(
        help="Run folder, checkpoint, or Hugging Face folder of the model that answers.", show_default=False
    ),
]
_Prompts = Annotated[
    Path,
    typer.Option(
        help="Questions: AlpacaEval's .json, or Arena-Hard's question.jsonl of v0.1 or v2.0; columns tell which.",
        show_default=False,
    ),
]
_Out = Annotated[
    Path,
    typer.Option(
        help="Folder of the answers; the same command goes on where it was stopped.", show_default=False
    ),
]
_Name = Annotated[
    str | None, typer.Option(help="The model's name in the files; default: the name of its folder.")
]
_Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="Default: 0.7 for AlpacaEval, greedy for Arena-Hard, as the paper."),
]
_CountTokens = Annotated[
    Literal["cl100k_base", "o200k_base", "model"] | None,
    typer.Option(
        help="Who counts tokens for Arena-Hard's style control: tiktoken's vocabulary (default: the official one) "
        "or the model's own tokenizer."
    ),
]
_Servers = Annotated[
    list[str] | None,
    typer.Option("--server", metavar="URL", help="A server of a running pool; may be given several times."),
]
_NumServers = Annotated[
    int | None,
    typer.Option(
        "--pool-servers", min=1, help="Servers that are started here; default: as many as the GPUs hold."
    ),
]
_Tensor = Annotated[
    str,
    typer.Option("--pool-tensor", help="GPUs of a server; one number for all, or one each, as in 1,2."),
]


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(generate)


def generate(
    model: _Model,
    prompts: _Prompts,
    out: _Out,
    name: _Name = None,
    temperature: _Temperature = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: 4096, as the paper.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Every question's seed follows from it and the question's place.")
    ] = 0,
    count_tokens: _CountTokens = None,
    servers: _Servers = None,
    token_file: Annotated[
        Path | None, typer.Option(help="The running pool's token; needed with --server.")
    ] = None,
    num_servers: _NumServers = None,
    tensor_parallel: _Tensor = "1",
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="In which the started servers compute.")
    ] = "bf16",
) -> None:
    """Answer the questions of a benchmark as the paper does, and write the files that its judges read.

    AlpacaEval: OUT/model_outputs.json; Arena-Hard: OUT/model_answer/NAME.jsonl. A pool is started unless --server names
    a running one, of whose model only the tokenizer is then read here. Next: rto judge.
    """
    from rto_megatron.benchmarks.generate import GenerationChoices
    from rto_megatron.benchmarks.generate import generate as answer
    from rto_megatron.benchmarks.served_model import served_model
    from rto_megatron.cli.convert import bar
    from rto_megatron.generation.vllm.gate import read_token
    from rto_megatron.lifecycle.run_lock import held

    chosen = name or model.resolve().name
    if not _NAME.fullmatch(chosen):
        raise RecipeError(
            f"--name {chosen!r}: it becomes a file's name; use letters, digits, dots and dashes"
        )
    if bool(servers) != (token_file is not None):
        raise RecipeError(
            "--server and --token-file belong together: a running pool answers only to its token"
        )
    if servers and token_file is not None:
        _refuse_of_started(num_servers, tensor_parallel, dtype)
        read_token(token_file)  # before an export that takes minutes
    with held(out):
        served = served_model(model, out / "export", bar)

        def open_pool(longest: int) -> "AbstractContextManager[tuple[RolloutEngine, int]]":
            if servers and token_file is not None:
                return _running(servers, token_file)
            return _started(served.folder, out, longest, dtype, num_servers, tensor_parallel)

        choices = GenerationChoices(chosen, temperature, max_tokens, seed, count_tokens)
        path = answer(served.folder, served.weights, prompts, out, choices, open_pool)
    typer.echo(f"{path}: the answers of {chosen}")


def _refuse_of_started(num_servers: int | None, tensor_parallel: str, dtype: str) -> None:
    given = {"--pool-servers": num_servers is not None, "--pool-tensor": tensor_parallel != "1"}
    unread = [name for name, is_given in {**given, "--dtype": dtype != "bf16"}.items() if is_given]
    if unread:
        raise RecipeError(
            f"{', '.join(unread)}: without effect on the running pool that --server names; remove what is of servers "
            "that are started here, or --server and --token-file"
        )


def _running(servers: list[str], token_file: Path) -> "AbstractContextManager[tuple[RolloutEngine, int]]":
    from rto_megatron.config.addresses import without_localhost
    from rto_megatron.launching.answering_pool import running_pool

    pool = running_pool([without_localhost(one) for one in servers], token_file)
    typer.echo(f"asking a running pool, which holds weights of version {pool.version}")
    return nullcontext((pool.engine, pool.version))


@contextmanager
def _started(
    folder: Path,
    out: Path,
    longest: int,
    dtype: Literal["fp32", "bf16"],
    num_servers: int | None,
    tensor_parallel: str,
) -> "Iterator[tuple[RolloutEngine, int]]":
    from rto_megatron.generation.vllm.start.server import ServerOptions
    from rto_megatron.launching.answering_pool import started_pool

    work = out / "pool"
    options = ServerOptions(
        folder,
        work / "token",
        work / "server.log",
        dtype=dtype,
        load_weights=True,
        max_model_len=max(64, longest),
    )
    with started_pool(options, num_servers, tensor_parallel) as pool:
        yield pool.engine, pool.version
