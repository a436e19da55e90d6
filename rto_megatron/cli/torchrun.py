"""torchrun, with its report of a failed rank in one sentence."""

import logging
import os
import signal
from collections.abc import Sequence

import typer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> None:
    """Run `rto ARGUMENTS` as `num_ranks` processes of this machine and wait.

    Raises:
        typer.Exit: a rank failed or this process was told to stop; the rank has said why.
    """
    # torchrun logs a failure as an error of its own, with a traceback of itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, which it would announce
    command = [
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        "--module",
        "rto_megatron.cli.main",
        *arguments,
    ]
    try:
        torchrun(command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            typer.echo(f"error: rank {rank} was ended by {name}{_likely_cause(name)}", err=True)
        # The ranks' own status does not reach here: torchrun stops them and reports the first.
        raise typer.Exit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as stopped:
        raise typer.Exit(128 + int(stopped.sigval)) from None


def _likely_cause(name: str) -> str:
    return "; the machine may be out of memory" if name == "SIGKILL" else ""
