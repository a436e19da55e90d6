"""The `rto` command. Sub-commands import what they need when they run, so that `--help` answers at once."""

import os
import stat
import sys
import time

import typer
from rich.console import Console

from rto_megatron.cli import (
    check,
    convert,
    data,
    doctor,
    experiment,
    generate,
    judge,
    launch,
    node,
    plan,
    pool,
    quantize,
    report,
    resume_check,
    rollouts,
    score,
    simulate,
    slurm,
    train,
    view,
)
from rto_megatron.errors import UserError
from rto_megatron.reporting.progress import plain

_LEAD_RANK_SPEAKS_FIRST_S = 10.0

app = typer.Typer(
    name="rto",
    help="Reinforced Token Optimization: SFT, reward model, DPO, PPO and RTO on Megatron-core and vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for group in (
    launch,
    slurm,
    node,
    train,
    check,
    doctor,
    data,
    plan,
    pool,
    report,
    rollouts,
    view,
    generate,
    judge,
    score,
    simulate,
    resume_check,
    experiment,
    quantize,
):
    group.register(app)
app.add_typer(convert.app)


def main() -> None:
    """Run one command; a UserError becomes a message and its reason's status, a bug is shown whole."""
    # Of what this process and its children write, nothing can be changed by every user, whatever the shell's mask is.
    os.umask(os.umask(stat.S_IWOTH) | stat.S_IWOTH)
    from rto_megatron.lifecycle.status import ExitReason

    try:
        app()
    except UserError as error:
        _report(error)
        sys.exit(ExitReason(error.reason).exit_code)


def _report(error: UserError) -> None:
    rank = int(os.environ.get("RANK", "0"))
    where = ""
    if rank > 0:
        # An error of every rank is told once, by rank 0, whose end makes torchrun stop the others within
        # this time.
        time.sleep(_LEAD_RANK_SPEAKS_FIRST_S)
        where = f" on rank {rank}"
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error{where}:[/] ", end="")
    console.print(plain(str(error)), markup=False)


if __name__ == "__main__":
    main()
