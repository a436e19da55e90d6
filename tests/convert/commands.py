"""`rto convert` as a user calls it, in this process."""

from pathlib import Path

from typer.testing import CliRunner

from rto_megatron.cli.main import app


def convert(*arguments: str | Path) -> str:
    """Runs `rto convert ARGUMENTS` and returns what it printed; a UserError is raised."""
    shown = CliRunner().invoke(
        app, ["convert", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert shown.exit_code == 0, shown.output
    return shown.output
