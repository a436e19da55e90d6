"""What a job on several machines runs as its steps: `rto node`, `rto address` and `rto after-attempt`."""

from pathlib import Path
from typing import Annotated

import typer

from rto_megatron.cli.options import Interface, Overrides, Recipe

Meeting = Annotated[
    str,
    typer.Option(metavar="ADDRESS:PORT", help="Where the machines meet: on one of them, on its interface."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(node)
    app.command()(address)
    app.command(hidden=True)(after_attempt)


def node(
    recipe: Recipe,
    meeting: Meeting,
    meeting_id: Annotated[
        str, typer.Option(help="Of this attempt; the same on all machines, never used again.")
    ],
    interface: Interface,
    nodes: Annotated[int, typer.Option(min=1, help="Machines with trainer ranks.")],
    ranks: Annotated[int, typer.Option(min=1, help="Trainer ranks of this machine.")],
    overrides: Overrides = None,
) -> None:
    """Run this machine's ranks of a stage through torchrun, and wait; the jobs that `rto slurm` writes call it.

    The pool is not started here: name it with rollout.servers and rollout.token_file. A failed rank ends the attempt
    on all machines; the next one needs another --meeting-id. SIGTERM is passed on as `rto train` takes it.
    """
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

    from rto_megatron.config.load import load_recipe
    from rto_megatron.launching.attempts import listening, out_of_memory_kills, silent_end
    from rto_megatron.launching.torchrun import start_ranks
    from rto_megatron.lifecycle.ending import finished_steps
    from rto_megatron.lifecycle.run_lock import require_no_other
    from rto_megatron.lifecycle.start_up import begin_launch
    from rto_megatron.lifecycle.status import ExitReason, Status, attempt_number, note_status
    from rto_megatron.lifecycle.stopping import Preempted
    from rto_megatron.platform.network import MEETING, interface_address

    begin_launch()
    run_dir = load_recipe(recipe, overrides or []).run.dir
    require_no_other(run_dir)
    here = [f"--nnodes={nodes}", f"--local-addr={interface_address(interface)}"]
    there = [f"--rdzv-backend={MEETING}", f"--rdzv-endpoint={meeting}", f"--rdzv-id={meeting_id}"]
    kills = out_of_memory_kills()
    try:
        with listening(run_dir):
            failure = start_ranks(ranks, ["train", str(recipe), *(overrides or [])], [*here, *there])
    except RendezvousConnectionError:
        typer.echo(f"error: the machine of the meeting point {meeting} has ended its part", err=True)
        raise typer.Exit(1) from None
    except RendezvousTimeoutError as error:
        typer.echo(
            f"error: not all {nodes} machines came to the meeting point {meeting} ({error}); look at the others",
            err=True,
        )
        raise typer.Exit(1) from None
    except Preempted as told:
        note_status(
            run_dir, Status(ExitReason.PREEMPTED, finished_steps(run_dir), str(told), attempt_number())
        )
        raise
    if failure is not None:
        if failure.status != 1:  # the status of a rank that has told why
            require_no_other(run_dir)  # of two that began together one was refused
            status = silent_end(run_dir, failure, attempt_number(), kills)
            typer.echo(f"error: {status.message}", err=True)
            note_status(run_dir, status)
        raise typer.Exit(1)


def address(interface: Interface) -> None:
    """Print this machine's IPv4 address on a network interface."""
    from rto_megatron.platform.network import interface_address

    typer.echo(interface_address(interface))


def after_attempt(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder.", show_default=False)],
    attempt: Annotated[
        int, typer.Option(min=1, help="Number of the attempt that has ended; 1 is the first.")
    ],
    restarts: Annotated[
        int, typer.Option(min=0, help="Fresh starts after a crash, in a row without a new checkpoint.")
    ],
    time_is_up: Annotated[
        bool, typer.Option("--time-is-up", help="The scheduler told the job to stop, not a person.")
    ] = False,
) -> None:
    """Print what follows an attempt of a job, as one line WORD STATUS TEXT; the jobs that `rto slurm` writes obey it.

    AGAIN: start the next attempt. REQUEUE: give the job back to the queue. END: end the job with exit status STATUS.
    TEXT says how the attempt ended, for the log. `rto launch` decides alike. Run it once for each attempt, after all
    its ranks are gone: it completes run_status.json, and counts the attempts in RUN_DIR/attempts.json.
    """
    from rto_megatron.launching.attempts import decide_in_job
    from rto_megatron.lifecycle.run_lock import require_no_other

    require_no_other(run_dir)
    decision = decide_in_job(run_dir, attempt, restarts, time_is_up)
    status = decision.status
    ended = f"the trainer ended: {status.reason} after step {status.step} {status.message}"
    if decision.is_out_of_restarts:
        ended += f"; no restart is left ({restarts} in a row without a new checkpoint)"
    typer.echo(f"{decision.next} {status.reason.exit_code} {' '.join(ended.split())}")
