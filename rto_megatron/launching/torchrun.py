"""torchrun inside this process: each call is one fresh start of all ranks, with a rendezvous of its own."""

import logging
import os
import signal
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import typer
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.run import main as torchrun

from rto_megatron.errors import MachineError
from rto_megatron.lifecycle.stacks import ranks_of
from rto_megatron.lifecycle.start_up import begin_part
from rto_megatron.platform.network import MEETING, meet

_DEFAULTS = "PET_"  # torchrun takes PET_NNODES as the default of --nnodes, and so on for each of its options


@dataclass(frozen=True)
class RankFailure:
    """The rank whose end ended the others.

    Args:
        status: of its process; negative is the number of the signal that ended it.

    Example:
        RankFailure(rank=1, status=-9).signal_name == "SIGKILL"
    """

    rank: int
    status: int

    @property
    def signal_name(self) -> str | None:
        """None where the process ended by itself."""
        return signal.Signals(-self.status).name if self.status < 0 else None


def start_ranks(num_ranks: int, arguments: Sequence[str], meeting: Sequence[str] = ()) -> RankFailure | None:
    """Runs `rto ARGUMENTS` as `num_ranks` processes of this machine until all have ended; None: all ended well.

    `meeting` are torchrun's options for a job on several machines; without them the ranks meet on loopback, where
    torchrun's own `--standalone` would listen on every interface.

    The signals of this process are left to the caller: torchrun would turn them into an end after 30 seconds. It never
    restarts a rank itself, as its restarts meet the addresses of the dead ranks in the store that it keeps.

    torchrun's variables (PET_NNODES and the like) are removed from this process: what is not said here is its default.
    """
    for name in torchrun_defaults():
        del os.environ[name]
    # torchrun logs a failure as an error of its own, with a traceback of itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, which it would announce
    os.environ["RTO_AGENT_PID"] = str(os.getpid())
    rendezvous_handler_registry.register(MEETING, meet)
    begin_part("torchrun")
    command = [
        *(meeting or _on_loopback()),
        f"--nproc-per-node={num_ranks}",
        "--signals-to-handle=SIGQUIT",
        "--module",
        "rto_megatron.cli.main",
        *arguments,
    ]
    try:
        torchrun(command)
    except ChildFailedError as error:
        return _first_cause(error)
    return None


def torchrun_defaults() -> dict[str, str]:
    """The variables of this process that torchrun takes for its options; Kubeflow sets them in every container."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_DEFAULTS)}


def refuse_several_machines(recipe: str) -> list[str]:
    """What torchrun's variables ask of a launch on one machine: names of those that are not used.

    Raises:
        MachineError: they ask for several machines, each of which would train by itself.
    """
    found = torchrun_defaults()
    nodes = found.get("PET_NNODES", "1")
    if nodes not in ("1", "1:1"):
        raise MachineError(
            f"PET_NNODES={nodes} says that this is one of several machines of a job, as Kubeflow does, and `rto "
            f"launch` runs on one alone. Run on each: torchrun -m rto_megatron.cli.main train {recipe} (a stage "
            "that samples also needs rollout.servers and rollout.token_file of an `rto pool`); or, to use this machine "
            "alone: unset PET_NNODES"
        )
    return list(found)


def _on_loopback() -> list[str]:
    here = ["--local-addr=127.0.0.1", "--rdzv-endpoint=127.0.0.1:0"]
    return [f"--rdzv-backend={MEETING}", f"--rdzv-id={uuid.uuid4()}", *here]


def _first_cause(error: ChildFailedError) -> RankFailure:
    """The first failure, or the rank that a signal ended: the others fail with it, within one look of torchrun."""
    found = [RankFailure(rank, failure.exitcode) for rank, failure in error.failures.items()]
    rank, failure = error.get_first_failure()
    violent = [one for one in found if one.status < 0 and one.signal_name != "SIGTERM"]
    return violent[0] if violent else RankFailure(rank, failure.exitcode)


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> None:
    """Does what `start_ranks` does, for a command that has no run folder.

    Raises:
        typer.Exit: a rank failed; it has said why.
    """
    failure = start_ranks(num_ranks, arguments)
    if failure is not None:
        if failure.signal_name is not None:
            typer.echo(f"error: rank {failure.rank} was ended by {failure.signal_name}", err=True)
        # The ranks' own status does not reach here: torchrun stops them and reports the first.
        raise typer.Exit(failure.status if failure.status > 0 else 1)


def has_ranks() -> bool:
    """Whether a rank of this process runs; none does while machines meet."""
    return bool(ranks_of(psutil.Process()))


def kill_ranks() -> None:
    """Ends every rank of this process at once; what they have saved stands, as a save is whole or absent."""
    for rank in ranks_of(psutil.Process()):
        rank.kill()
