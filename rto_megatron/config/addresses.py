"""Addresses of this machine in numbers: some machines know `localhost` as ::1 alone, where nothing of ours listens."""

import re


def without_localhost(address: str) -> str:
    """An address, or a host alone, with 127.0.0.1 in place of `localhost`."""
    return re.sub(r"^((?:https?://)?)localhost(?=[:/]|$)", r"\g<1>127.0.0.1", address)
