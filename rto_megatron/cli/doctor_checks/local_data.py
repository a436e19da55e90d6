"""The recipe's data files: readable, in the layout that the stage reads, and with what bad rows."""

from rto_megatron.cli.doctor_checks.finding import Finding
from rto_megatron.cli.local_data import look_at
from rto_megatron.config.schema import Stage


def check_data(config: Stage) -> list[Finding]:
    """Reads the first rows of every local file."""
    why, fix = "the stage would end with this message", "do as it says"
    return [
        Finding("data", "problem", f"{looked.key}: {looked.found}", why, fix)
        if looked.is_problem
        else Finding("data", "ok", f"{looked.key}: {looked.found}")
        for looked in look_at(config)
    ]
