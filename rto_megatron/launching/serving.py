"""What `rto pool` runs: servers until a signal, or one machine's part of a larger server."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rto_megatron.errors import PoolError
from rto_megatron.generation.vllm.start.server import (
    START_LIMIT_S,
    ServerOptions,
    start_server,
    stop_server,
)
from rto_megatron.generation.vllm.start.server_environment import mended
from rto_megatron.launching.supervisor import supervised
from rto_megatron.platform.open_files import raise_file_limit
from rto_megatron.platform.whole_files import write_whole

_POLL_S = 0.5


def serve_pool(
    options: Sequence[ServerOptions],
    address_file: Path | None = None,
    start_limit_s: float = START_LIMIT_S,
) -> NoReturn:
    """Runs servers until SIGTERM or SIGINT, then stops them and exits with status 0.

    Args:
        options: one entry per server.
        address_file: receives one address per line once all servers are ready; removed at the end.
        start_limit_s: for a server to be ready.

    Raises:
        PoolError: a server did not start, or all of them ended too often.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGINT, _exit_on_signal)
    # The parts of a server on other machines would wait for a leader that ended; all start again together.
    max_restarts = 5 if all(one.group is None for one in options) else 0
    with supervised(options, print, max_restarts, start_limit_s) as pool:
        try:
            if address_file is not None:
                write_whole(address_file, "".join(f"{address}\n" for address in pool.addresses))
            while pool.is_running():
                time.sleep(_POLL_S)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if address_file is not None:
                address_file.unlink(missing_ok=True)
    raise PoolError("every inference server of this pool ended too often; the reason of each is above")


def serve_part(options: ServerOptions) -> NoReturn:
    """Runs one machine's part of a larger server, one without HTTP, until SIGTERM or SIGINT.

    Raises:
        PoolError: it ended by itself, as when its leader ends.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGINT, _exit_on_signal)
    raise_file_limit()
    for line in mended(os.environ)[1]:
        print(f"warning: {line}")
    server = start_server(options)
    try:
        print(f"part {options.group} of an inference server is starting")
        server.process.wait()
    finally:
        stop_server(server)
    raise PoolError(f"this machine's part of an inference server ended; {server.why_it_ended()}")


def _exit_on_signal(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
