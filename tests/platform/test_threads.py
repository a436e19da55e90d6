"""Whether threads of several processes spin while they wait."""

import pytest

from rto_megatron.platform.threads import sleep_while_waiting


def test_threads_sleep_where_they_are_more_than_cores() -> None:
    environment = {"OMP_NUM_THREADS": "2"}
    said = sleep_while_waiting(3, 4, environment)
    assert environment == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    assert said is not None and said.startswith("3 processes x 2 threads share 4 cores")


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},  # one thread waits for none
        {},
        {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"},
    ],
)
def test_a_single_thread_and_the_users_choice_stay(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert sleep_while_waiting(8, 4, environment) is None
    assert environment == before


def test_threads_with_a_core_each_spin() -> None:
    environment = {"OMP_NUM_THREADS": "2"}
    assert sleep_while_waiting(2, 4, environment) is None
    assert environment == {"OMP_NUM_THREADS": "2"}
