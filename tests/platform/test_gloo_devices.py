"""However many process groups megatron makes, one thread of gloo waits for their connections."""

from pathlib import Path

import pytest
from megatron.core import parallel_state
from ranks import run_ranks
from tiny_gpt import Layout, start


def _num_event_loops(interfaces: str | None) -> tuple[int, int]:
    with pytest.MonkeyPatch.context() as environment:
        if interfaces is not None:
            environment.setenv("GLOO_SOCKET_IFNAME", interfaces)
        start(Layout(tp=2))
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("gloo_tcp_loop"), len(parallel_state._global_process_group_list)


@pytest.mark.parametrize(("interfaces", "num_devices"), [(None, 1), ("lo", 1), ("lo,lo", 2)])
def test_groups_share_the_devices(interfaces: str | None, num_devices: int) -> None:
    for num_loops, num_groups in run_ranks(2, _num_event_loops, interfaces):
        assert num_groups > 10
        assert num_loops == num_devices
