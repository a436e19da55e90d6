"""Errors that a user can cause and mend; the command line prints them without a traceback."""


class UserError(ValueError):
    """Says what was found, what was expected and what to do.

    `reason` is how a run that ends with it is classed (`lifecycle/status.py`); subclasses name their own.

    Example:
        UserError("run.steps=0; expected 1 or more")
    """

    reason: str = "CONFIG"


_SHOWN = 20


def refuse_if(problems: list[str], heading: str) -> None:
    """Does nothing without problems.

    Raises:
        UserError: the heading and the first twenty problems, one a line.
    """
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise UserError("\n  ".join([f"{heading}:", *problems[:_SHOWN], *more]))
