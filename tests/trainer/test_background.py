"""The thread that a call waits in: what it raises is carried, and a process does not wait for it."""

import subprocess
import sys
from concurrent.futures import Future

import pytest

from rto_megatron.trainer.background import Background


def test_a_process_does_not_wait_for_what_is_in_flight() -> None:
    code = (
        "import threading; from rto_megatron.trainer.background import Background; begun = threading.Event()\n"
        "def never(): begun.set(); threading.Event().wait()\n"
        "Background('pool').submit(never); assert begun.wait(20); raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 7


def test_a_future_carries_what_its_call_raises_and_the_next_is_made() -> None:
    background = Background("pool")
    failing: Future[int] = background.submit(lambda: 1 // 0)
    assert background.submit(lambda: 5).result(20) == 5
    with pytest.raises(ZeroDivisionError):
        failing.result(20)
    background.close()
