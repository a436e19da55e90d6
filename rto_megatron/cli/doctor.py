"""`rto doctor`: what of this machine, this environment and this recipe would stop a run, all of it at once."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rto_megatron.cli.options import Overrides
from rto_megatron.errors import UserError

if TYPE_CHECKING:
    from rto_megatron.diagnosis.finding import Finding

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}  # in the order of the table


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(doctor)


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]", help="YAML file of a stage: its models, folder and pool are looked at too."
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, for programs.")
    ] = False,
) -> None:
    """Look at packages, compiler, GPUs, ports, disk, clocks, models, data, checkpoints and pool; say how to mend them.

    Under torchrun (`torchrun --nproc-per-node N -m rto_megatron.cli.main doctor RECIPE`) every rank looks, and rank 0
    prints one table. Exit status 1 if there is a problem; a warning leaves it 0.
    """
    from rto_megatron.diagnosis.gather import gather, meet, merged

    findings = meet()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        findings += _of_this_machine()
    if recipe is not None:
        findings += _of_recipe(recipe, overrides or [])
    reports = gather(findings)
    is_lead = os.environ.get("RANK", "0") == "0"
    if not is_lead and len(reports) > 1:
        return
    joined = merged(reports)
    typer.echo(_as_json(joined)) if as_json else _show(joined)
    if any(finding.level == "problem" for finding in joined):
        raise typer.Exit(1)


def _of_this_machine() -> "list[Finding]":
    from rto_megatron.diagnosis import connections, machine, packages, variables
    from rto_megatron.diagnosis.finding import findings_of

    checks = {
        "pins": packages.check_pins,
        "advisories": packages.check_advisories,
        "kernels": packages.check_kernels,
        "compiler": machine.check_compiler,
        "GPUs": machine.check_gpus,
        "shared memory": machine.check_shared_memory,
        "clock": machine.check_clock,
        "variables": variables.check_doors,
        "starts": variables.check_starts,
        "rendezvous": connections.check_rendezvous,
        "listeners": connections.check_listeners,
    }
    return [finding for name, check in checks.items() for finding in findings_of(name, check)]


def _of_recipe(recipe: Path, overrides: Sequence[str]) -> "list[Finding]":
    from rto_megatron.config.facts import facts_of
    from rto_megatron.config.load import load_recipe
    from rto_megatron.config.plan import fewest_ranks
    from rto_megatron.config.reward_code import rewards_of
    from rto_megatron.diagnosis import connections, disk
    from rto_megatron.diagnosis.finding import Finding, findings_of
    from rto_megatron.diagnosis.recipe import check_data, check_models, check_precision
    from rto_megatron.diagnosis.reward_sources import check_rewards

    try:
        config = load_recipe(recipe, overrides)
    except UserError as error:
        why = "every command that reads the recipe ends with this message"
        return [Finding("recipe", "problem", str(error), why, f"mend {recipe}, or the key=value arguments")]
    rank, started = (int(os.environ.get(name, alone)) for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1")))
    whole = partial(disk.check_checkpoints, config.run.dir, rank, started)
    findings = findings_of("checkpoints", whole)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return findings
    # Alone, the doctor takes the smallest number of ranks that the layout allows.
    num_ranks = started if started > 1 else fewest_ranks(config.parallel)
    findings += findings_of("models", partial(check_models, config, num_ranks))
    findings += findings_of("data", partial(check_data, config))
    findings += findings_of("precision", partial(check_precision, config))
    findings += findings_of("rewards", partial(check_rewards, rewards_of(config)))
    findings += findings_of("run folder", partial(disk.check_writable, config.run.dir))
    findings += findings_of("disk", partial(disk.check_space, config))
    if (pool := facts_of(config).pool) is not None:
        findings += findings_of("pool", partial(connections.check_pool, pool))
    return findings


def _as_json(findings: "Sequence[Finding]") -> str:
    counts = Counter(finding.level for finding in findings)
    return json.dumps(
        {
            "problems": counts["problem"],
            "warnings": counts["warning"],
            "findings": list(map(asdict, findings)),
        },
        indent=1,
    )


def _show(findings: "Sequence[Finding]") -> None:
    console = Console() if Console().is_terminal else Console(width=140)
    has_ranks = any(finding.where for finding in findings)
    table = Table("", "check", *(["ranks"] if has_ranks else []), "found", show_lines=False)
    order = list(_STYLES)
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        text = Text(finding.found)
        if finding.why:
            text.append(f"\nwhy: {finding.why}\n", "dim")
            text.append(f"fix: {finding.fix}", "bold")
        where = [Text(finding.where)] if has_ranks else []
        table.add_row(Text(finding.level, _STYLES[finding.level]), finding.check, *where, text)
    console.print(table)
    counts = Counter(finding.level for finding in findings)
    console.print(f"{counts['problem']} problems, {counts['warning']} warnings", highlight=False)
