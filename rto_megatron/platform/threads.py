"""How the threads of processes that share cores wait for each other."""

from collections.abc import MutableMapping

_POLICY, _THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"


def sleep_while_waiting(
    num_processes: int, num_cores: int, environment: MutableMapping[str, str]
) -> str | None:
    """Makes OpenMP's threads sleep where they wait, if there are more of them than cores.

    A thread that spins keeps the core that the thread it waits for needs. A choice of the user's stands.

    Args:
        num_processes: that will be started, each with OMP_NUM_THREADS threads.
        num_cores: which they may use.
        environment: of the processes; changed.

    Returns:
        What was chosen and why, for the user; None: nothing was.
    """
    num_threads = int(environment.get(_THREADS, "1"))
    if num_threads == 1 or num_processes * num_threads <= num_cores or _POLICY in environment:
        return None
    environment[_POLICY] = "PASSIVE"
    return (
        f"{num_processes} processes x {num_threads} threads share {num_cores} cores: threads sleep while they wait "
        f"({_POLICY}=PASSIVE)"
    )
