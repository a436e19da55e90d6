"""Ranks that are started beside their pool and wait for it where they need it first.

A launcher that starts both names a file to its ranks, removes it once every server is ready, and ends the ranks if one
does not start. So a rank needs no limit of its own, and no rank waits inside a collective, which has one.
"""

import os
import time
from pathlib import Path

from rto_megatron.lifecycle.start_up import begin_part

# Names to the ranks of a launch the file that is there while its pool starts.
STARTING_VARIABLE = "RTO_POOL_STARTING"
_POLL_S = 0.05


def await_pool() -> None:
    """Waits for the pool of this rank's launch; returns at once where the launch has none that is starting."""
    named = os.environ.get(STARTING_VARIABLE)
    begin_part("pool")
    while named is not None and Path(named).exists():
        time.sleep(_POLL_S)
