"""Text of others on the terminal: prompts, responses, sample ids and file names may hold anything."""

import re

# Control characters but tab and line break, C1 among them, and marks that change the direction of the text.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` without what a terminal would take for a command."""
    return _COMMANDS.sub("", text)
