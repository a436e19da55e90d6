"""What a loss or a score sees of a model's raw output: log-probs, entropies or values at positions, no logits.

A language model puts out the states that its output projection reads. Of these the positions whose log-probs are asked
for are taken, and the projection is applied to a chunk of them at a time (`models/output_head.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from rto_megatron.models.head_memory import CHUNK_POSITIONS
from rto_megatron.models.logit_shaping import LogitShaping
from rto_megatron.models.output_head import OutputProjection, Targets
from rto_megatron.models.token_divergence import token_divergence
from rto_megatron.models.token_entropy import token_entropies
from rto_megatron.models.token_logprobs import token_logprobs
from rto_megatron.parallel.context import own_part, whole_rows
from rto_megatron.parallel.topology import Topology
from rto_megatron.types import BannedTargets, DivergenceMicrobatch, TokenBatch

if TYPE_CHECKING:  # models are made of readings
    from rto_megatron.engine.megatron import FrozenModel, Model


@dataclass(frozen=True)
class Reading[M]:
    """What a loss sees of a model's raw output: `num_rows` float32 numbers for every position.

    Example:
        Reading(num_rows=1, read=read)
    """

    num_rows: int
    read: Callable[["Model", M, Tensor], Tensor]  # (model, micro-batch, raw output) -> [T], or [num_rows, T]


def read_outputs(model: "Model", batch: TokenBatch, raw: Tensor) -> Tensor:
    """Log-probs of the targets asked for, 0 elsewhere; or a scalar head's values of all positions, scaled: [T]."""
    if model.has_scalar_head:
        values_T = in_the_batch(whole_rows(raw.flatten()[None].float(), model.topology)[0], batch)
        return (values_T - model.scale.mean) / model.scale.std
    return _logprobs(model, batch, raw, [_asked(batch, model.topology)])[0]


def read_drawn_and_whole(model: "Model", batch: TokenBatch, raw: Tensor) -> Tensor:
    """Rows [2, T]: log-probs of the targets as `read_outputs` gives them, and of the whole distribution, unheated."""
    drawn = _asked(batch, model.topology)
    return _logprobs(model, batch, raw, [drawn, Targets(drawn.targets_N)])


def _logprobs(model: "Model", batch: TokenBatch, raw: Tensor, asked: Sequence[Targets]) -> Tensor:
    """A row for each distribution [k, T], of the same states."""
    states_Nh = asked_states(raw, batch, model.topology)
    rows = [token_logprobs(states_Nh, _output_projection(model), one, CHUNK_POSITIONS) for one in asked]
    return _at_positions(torch.stack(rows), batch, model.topology)


def read_entropies(model: "Model", batch: TokenBatch, raw: Tensor) -> Tensor:
    """Log-probs of the targets asked for, and entropies there, 0 elsewhere: [2, T]."""
    outputs_2N = token_entropies(
        asked_states(raw, batch, model.topology),
        _output_projection(model),
        _asked(batch, model.topology),
        CHUNK_POSITIONS,
    )
    return _at_positions(outputs_2N, batch, model.topology)


def read_divergences(
    model: "Model", micro: DivergenceMicrobatch, raw: Tensor, reference: "FrozenModel"
) -> Tensor:
    """Rows: log-prob of the target, the reference's, KL(reference || policy), [3, T] in nats; 0 where none is asked."""
    batch = micro.batch
    outputs_3N = token_divergence(
        asked_states(raw, batch, model.topology),
        _output_projection(model),
        (micro.reference_hidden_NH, _output_projection(reference)),
        batch.targets_T[_own_positions(batch, model.topology)],
        CHUNK_POSITIONS,
    )
    return _at_positions(outputs_3N, batch, model.topology)


def whole_logits(model: "Model", raw: Tensor) -> Tensor:
    """Logits of all positions over the whole vocabulary, on every tensor rank, to compare models with: [T, V]."""
    projection = _output_projection(model)
    own_Tv = projection.shaping.logits(_states(raw, model.topology), projection.weight_vh)
    shards = model.topology.gather_tensor_shards(own_Tv.T.contiguous())
    return torch.cat(shards)[: model.shape.vocab_size].T


def _output_projection(model: "Model") -> OutputProjection:
    """Of a language model, on the last pipeline stage."""
    weight_vh, shaping = output_weight(model.module.last), LogitShaping.of(model.shape, model.has_fp32_head)
    return OutputProjection(weight_vh, model.shape.vocab_size, model.topology.tensor_group(), shaping)


def asked_states(raw: Tensor, batch: TokenBatch, topology: Topology) -> Tensor:
    """The final states of this context rank's positions that are asked for, equal on all tensor ranks: [N, h]."""
    states_th = _states(raw, topology)
    own_N = _own_positions(batch, topology)
    if batch.shared is not None:
        return states_th.index_select(0, batch.shared.read_T[own_N])
    return states_th.index_select(0, own_N - _first(batch, topology))


def in_the_batch(values: Tensor, batch: TokenBatch) -> Tensor:
    """What was computed once where sequences share it, [K, ...], at every position of the micro-batch, [T, ...]."""
    return values if batch.shared is None else values.index_select(0, batch.shared.read_T)


def output_weight(last: GPTModel) -> Tensor:
    """This tensor rank's rows of the output projection [v, h]; of the last stage's last chunk."""
    if last.share_embeddings_and_output_weights:
        tied: Tensor = last.shared_embedding_or_output_weight()
        return tied
    weight: Tensor = last.output_layer.weight
    return weight


def _states(raw: Tensor, topology: Topology) -> Tensor:
    """[s, b, h], under sequence parallelism this tensor rank's part of it -> [T, h].

    Each tensor rank derives its columns' part of the states' gradient: backward adds them up.
    """
    group = topology.tensor_group()
    if topology.sequence_parallel:
        whole: Tensor = gather_from_sequence_parallel_region(raw, group=group)
    else:
        whole = copy_to_tensor_model_parallel_region(raw, group=group)
    return whole.transpose(0, 1).flatten(0, 1)


def _first(batch: TokenBatch, topology: Topology) -> int:
    first: int = own_part(len(batch.tokens_T), topology).start
    return first


def _own_positions(batch: TokenBatch, topology: Topology) -> Tensor:
    """Of the positions asked for those on this context rank, counted in the whole row."""
    if topology.context_size == 1:
        return batch.asked_N
    own = own_part(len(batch.tokens_T), topology)
    return batch.asked_N[(batch.asked_N >= own.start) & (batch.asked_N < own.stop)]


def _asked(batch: TokenBatch, topology: Topology) -> Targets:
    own_N, banned = _own_positions(batch, topology), batch.banned
    if banned is not None:
        banned = BannedTargets(banned.ids, banned.is_banned_T[own_N])
    return Targets(batch.targets_T[own_N], banned, batch.temperature)


def _at_positions(values_kN: Tensor, batch: TokenBatch, topology: Topology) -> Tensor:
    zeros_kt = values_kN.new_zeros(len(values_kN), len(batch.tokens_T) // topology.context_size)
    own_N = _own_positions(batch, topology) - _first(batch, topology)
    return whole_rows(zeros_kt.index_copy(1, own_N, values_kN), topology)


OUTPUTS: Reading[TokenBatch] = Reading(1, read_outputs)
DRAWN_AND_WHOLE: Reading[TokenBatch] = Reading(2, read_drawn_and_whole)
