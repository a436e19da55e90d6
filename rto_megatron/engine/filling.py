"""Micro-batches of padding alone, for passes that need a certain number of them.

Replicas whose experts exchange tokens run equally many: the exchange waits for every rank, so one that is done with its
own goes on. The stages of an interleaved pipeline take micro-batches in groups of as many as there are stages. Padding
gives no loss and no gradient, counts in no metric, and is not seen by the load-balancing loss.
"""

from collections.abc import Sequence

import torch

from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import TokenBatch


def num_filling(num_batches: int, shape: ModelShape, topology: Topology) -> int:
    """How many a replica lacks; every rank of the replicas that exchange tokens must call it."""
    total = num_batches
    if shape.experts is not None and topology.is_exchanging:
        total = topology.most(total)
    if topology.virtual_size > 1:
        total = -(-total // topology.pipeline_size) * topology.pipeline_size
    return total - num_batches


def padding_batch(topology: Topology) -> TokenBatch:
    """The shortest micro-batch: no sequence, rows as a layout wants them."""
    length = topology.row_multiple
    tokens_T = torch.zeros(length, dtype=torch.int64, device=topology.device.torch_device)
    return TokenBatch(tokens_T, tokens_T, (0, length), 1, (), 0, asked_N=tokens_T[:0])


def filled(batches: Sequence[TokenBatch], shape: ModelShape, topology: Topology) -> list[TokenBatch]:
    """The batches with what fills up their number; see `num_filling`."""
    return [*batches, *[padding_batch(topology)] * num_filling(len(batches), shape, topology)]
