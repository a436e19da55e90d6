"""Counts what the models of a rank compute, for its speed."""


class Work:
    """Adds up model FLOPs; every rank of a replica counts its even share of those of the replica.

    Example:
        work.add(2.0e12)
        work.take() == 2.0e12
    """

    def __init__(self) -> None:
        self._flops = 0.0

    def add(self, flops: float) -> None:
        """Counts what a pass needs by the model's mathematics."""
        self._flops += flops

    def take(self) -> float:
        """What was added since the last call."""
        flops, self._flops = self._flops, 0.0
        return flops
