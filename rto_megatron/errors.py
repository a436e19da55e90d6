"""Errors that a user can cause and mend; the command line prints them without a traceback."""


class UserError(ValueError):
    """Says what was found, what was expected and what to do."""
