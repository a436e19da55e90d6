"""Parts of the trainer in host memory between its turns and the pool's."""

from dataclasses import replace

from rto_megatron.engine.offload import HostMemory
from rto_megatron.trainer.connected_pool import ConnectedPool, Push


def parking(pool: ConnectedPool, memory: HostMemory) -> ConnectedPool:
    """The same pool, around whose pushes parts of the trainer come and go."""
    return replace(pool, push=ParkingPush(pool.push, memory))


class ParkingPush:
    """Another push, for which the policy is brought back from host memory, and after which what can waits there.

    Example:
        ParkingPush(push, memory)(3)
    """

    def __init__(self, push: Push, memory: HostMemory) -> None:
        self._push = push
        self._memory = memory

    def __call__(self, version: int) -> dict[str, float]:
        """See `PolicyPush.__call__`."""
        self._memory.enter("push")
        measured = self._push(version)
        self._memory.enter("sample")
        return measured

    def close(self) -> None:
        """See `PolicyPush.close`."""
        self._push.close()
