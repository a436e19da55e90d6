"""Forward and backward passes of one model over any TP x PP x DP layout: the only user of Megatron's schedules."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import zip_longest
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rto_megatron.engine.exchange import SUMS, add, everywhere, rows_everywhere
from rto_megatron.engine.filling import filled
from rto_megatron.engine.finite import refuse_together
from rto_megatron.engine.optimizer import one_or_all, set_learning_rate, state_tensors
from rto_megatron.engine.presence import require_present
from rto_megatron.engine.readings import (
    OUTPUTS,
    Reading,
    asked_states,
    in_the_batch,
    output_weight,
    read_entropies,
    read_outputs,
    whole_logits,
)
from rto_megatron.engine.router_health import own_report, router_metrics, watched_routers
from rto_megatron.models.build import forward
from rto_megatron.models.chunks import ModelChunks
from rto_megatron.models.model_flops import forward_flops, head_flops
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology
from rto_megatron.sums import Sums, detached, read_sums
from rto_megatron.types import (
    JudgedMicrobatch,
    LossOutput,
    Metrics,
    Minibatch,
    PairMicrobatch,
    SupervisedMicrobatch,
    TokenBatch,
    ValueScale,
)

type _Seen = list[tuple[Sums, Tensor]]  # of each micro-batch: what is logged, its loss; on the device
_TRAINING_FORWARDS = 3  # what a forward with its backward costs

type Microbatch = SupervisedMicrobatch | PairMicrobatch | JudgedMicrobatch | Minibatch
type Loss[M: Microbatch] = Callable[[Tensor, M], LossOutput]


@dataclass(frozen=True)
class FrozenModel:
    """A model without gradients: the reference, the DPO model, the reward model, the average of a policy.

    Example:
        logprobs = reference.token_outputs(batches)
    """

    name: str
    shape: ModelShape
    has_scalar_head: bool
    scale: ValueScale
    module: ModelChunks
    topology: Topology
    has_fp32_head: bool = False  # its logits are not rounded to `dtype`

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.module.config.params_dtype
        return dtype

    def token_outputs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Log-probs of the targets, or values with a scalar head, of every position; no gradients.

        Args:
            batches: equal on all ranks of a replica, which must all call this. One or more; none only of a mixture
                whose replicas exchange tokens, which call this together.

        Returns:
            one float32 [T] per batch, in nats or reward units, on every rank of the replica.
        """
        return self.begin_outputs(batches)()

    def begin_outputs(
        self, batches: Sequence[TokenBatch], reading: Reading[TokenBatch] = OUTPUTS
    ) -> Callable[[], list[Tensor]]:
        """Computes what `token_outputs` gives, where only ranks that hold the model meet: models of other ranks may do
        the same meanwhile.

        Args:
            reading: what is told of each batch.

        Returns:
            what all ranks call then, and what gives the outputs, [T] or [rows of the reading, T] of each batch.
        """
        return _begin_outputs(self, batches, reading)

    def raw_outputs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Logits over the whole vocabulary, or values as the head gives them, of every position; no gradients.

        Returns:
            one float32 [T, vocabulary] or [T, 1] per batch on the last pipeline stage, empty tensors on the others.
        """

        def read(index: int, raw: Tensor) -> Tensor:
            found = raw.flatten(0, 1).float() if self.has_scalar_head else whole_logits(self, raw)
            return in_the_batch(found, batches[index])

        found = _forward_only(self, batches, read)
        return found if self.topology.is_last_stage else [torch.empty(0) for _ in batches]

    def hidden_states(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """The states before the output projection of the positions asked for, in the model's dtype; no gradients.

        Returns:
            one [N, hidden size] per batch on the last pipeline stage, empty tensors on the others.
        """
        found = _forward_only(
            self, batches, lambda index, raw: asked_states(raw, batches[index], self.topology)
        )
        if self.topology.is_last_stage:
            return found
        return [torch.empty(0, device=b.tokens_T.device) for b in batches]


@dataclass(frozen=True)
class TrainedModel:
    """A model with an optimizer: the policy, the critic, and the models of the offline stages.

    Example:
        policy.gradients(microbatches, loss, names)
        policy.apply(lr=1e-6)
    """

    name: str
    shape: ModelShape
    has_scalar_head: bool
    scale: ValueScale
    module: ModelChunks
    wrapped: Sequence[DistributedDataParallel]  # the chunks, with their gradients
    optimizer: MegatronOptimizer
    topology: Topology
    has_fp32_head: bool = False  # see `FrozenModel`

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.module.config.params_dtype
        return dtype

    def token_outputs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Computes what `FrozenModel.token_outputs` does, with the weights of this moment."""
        return self.begin_outputs(batches)()

    def begin_outputs(
        self, batches: Sequence[TokenBatch], reading: Reading[TokenBatch] = OUTPUTS
    ) -> Callable[[], list[Tensor]]:
        """See `FrozenModel.begin_outputs`."""
        return _begin_outputs(self, batches, reading)

    def outputs[M: Microbatch](self, microbatches: Sequence[M], reading: Reading[M]) -> list[Tensor]:
        """What a loss would see of each micro-batch, without gradients, on every rank of the replica."""
        rows, batches = reading.num_rows, [m.batch for m in microbatches]
        found = _forward_only(
            self, batches, lambda index, raw: reading.read(self, microbatches[index], raw).flatten()
        )
        return rows_everywhere(found if self.topology.is_last_stage else None, batches, rows, self.topology)

    def gradients[M: Microbatch](
        self,
        microbatches: Sequence[M],
        loss: Loss[M],
        names: Sequence[Sequence[str]],
        reading: Reading[M] | None = None,
    ) -> Metrics:
        """Does what `accumulate` and what it returns do."""
        return self.accumulate(microbatches, loss, names, reading)()

    def accumulate[M: Microbatch](
        self,
        microbatches: Sequence[M],
        loss: Loss[M],
        names: Sequence[Sequence[str]],
        reading: Reading[M] | None = None,
    ) -> Callable[[], Metrics]:
        """Accumulates and reduces the gradients of sum(loss) over all micro-batches of all replicas.

        Only ranks that hold the model meet here, so models of other ranks may do the same meanwhile.

        Args:
            microbatches: this replica's part of the global batch; the weights inside already hold its denominator.
            loss: (token outputs [T], micro-batch) -> LossOutput.
            names: ids of the samples of each micro-batch, to be named when the loss is not finite.
            reading: what the loss sees; None: log-probs of the targets, or values with a scalar head.

        Returns:
            what all ranks call then. It gives this replica's sums and counts, on every rank of the replica; with a
            layout of the model's own those of all replicas. It raises PoisonedError on every rank, when a loss or
            gradient of any rank is NaN or infinite; nothing was stepped.
        """
        batches = [m.batch for m in microbatches]
        _require_rows(self, batches)
        require_present(self.gradient_buffers(), f"gradients of {self.name}")
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        passes = filled(batches, self.shape, self.topology)
        # The schedule divides by the number of micro-batches and the reduction by the number of replicas.
        factor = len(passes) * self.topology.data_size
        with watched_routers(self.module, len(batches), len(passes)):
            outputs = _schedule(self, passes)(
                forward_step_func=partial(_training_step, self, loss, reading or TOKENS, factor),
                data_iterator=one_or_all([iter(zip_longest(passes, microbatches)) for _ in self.wrapped]),
                model=one_or_all(self.wrapped),
                forward_only=False,
            )
        _count(self, batches, _TRAINING_FORWARDS)
        # Another model's pass may come before this one is settled, and the tracker of balances is one for all.
        return partial(self._settled, outputs, own_report(self.module, self.shape, len(batches)), names)

    def _settled(self, outputs: _Seen, report: Tensor, names: Sequence[Sequence[str]]) -> Metrics:
        own = reduce(add, read_sums([sums for sums, _ in outputs or []]), SUMS())
        is_balanced = bool(self.module.config.moe_aux_loss_coeff)
        health = router_metrics(self.name, self.shape, report, is_balanced, self.topology)
        metrics = {**everywhere(own, self.topology), **health}
        self._refuse_nonfinite(outputs, names)
        return metrics

    def apply(self, lr: float) -> Metrics:
        """Steps the optimizer with the gradients of the last `gradients`; all ranks must call it.

        Returns:
            the gradient norm before clipping, where the optimizer takes it.
        """
        require_present(state_tensors(self.optimizer), f"the optimizer's numbers of {self.name}")
        set_learning_rate(self.optimizer, lr)
        _, gradient_norm, _ = self.optimizer.step()
        own = {} if gradient_norm is None else {f"{self.name}/grad_norm": (float(gradient_norm), 1.0)}
        return self.topology.heard(own, SUMS)

    def gradient_buffers(self) -> list[Tensor]:
        """The memory of all gradients, of experts too."""
        buffers = [[*chunk.buffers, *chunk.expert_parallel_buffers] for chunk in self.wrapped]
        return [buffer.grad_data for of_chunk in buffers for buffer in of_chunk]

    def _refuse_nonfinite(self, outputs: _Seen, names: Sequence[Sequence[str]]) -> None:
        losses = [loss for _, loss in outputs or []]
        are_finite = torch.stack(losses).isfinite().tolist() if losses else []
        # Passes of padding alone come last, and have no names.
        bad = [name for ok, group in zip(are_finite, names, strict=False) if not ok for name in group]
        # A NaN loss makes gradients NaN on ranks that did not see it: ask for losses first, they name the sample.
        refuse_together({f"the loss of {self.name} is NaN or infinite": bad} if bad else {}, self.topology)
        gradients = [p.main_grad for chunk in self.wrapped for p in chunk.parameters()]
        is_finite = bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
        samples = [name for group in names for name in group]
        found = {} if is_finite else {f"a gradient of {self.name} is NaN or infinite": samples}
        refuse_together(found, self.topology)


type Model = FrozenModel | TrainedModel


ENTROPIES: Reading[Microbatch] = Reading(2, lambda model, micro, raw: read_entropies(model, micro.batch, raw))
TOKENS: Reading[Microbatch] = Reading(1, lambda model, micro, raw: read_outputs(model, micro.batch, raw))


def _begin_outputs(
    model: Model, batches: Sequence[TokenBatch], reading: Reading[TokenBatch]
) -> Callable[[], list[Tensor]]:
    found = _forward_only(
        model, batches, lambda index, raw: reading.read(model, batches[index], raw).flatten()
    )
    own = found if model.topology.is_last_stage else None
    return partial(rows_everywhere, own, batches, reading.num_rows, model.topology)


def _forward_only(
    model: Model, batches: Sequence[TokenBatch], read: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """`read(index of the batch, raw output)` of every batch on the last stage; nothing on the others."""

    def step(
        iterator: Iterator[tuple[int, TokenBatch]], chunk: GPTModel
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        index, batch = next(iterator)
        is_asked = index < len(batches)
        output = forward(chunk, batch, model.topology)
        return output, lambda raw, non_loss_data=True: read(index, raw) if is_asked else raw

    _require_rows(model, batches)
    passes = filled(batches, model.shape, model.topology)
    if not passes:
        return []
    model.module.eval()
    with torch.no_grad():
        outputs: list[Tensor] = _schedule(model, passes)(
            forward_step_func=step,
            data_iterator=one_or_all([iter(enumerate(passes)) for _ in model.module.chunks]),
            model=one_or_all(model.module.chunks),
            forward_only=True,
            collect_non_loss_data=True,
        )
    model.module.train()
    _count(model, batches, 1)
    return outputs[: len(batches)]


def _schedule(model: Model, batches: Sequence[TokenBatch]) -> Callable[..., list[Any]]:
    """Megatron's schedule over the model's own groups, to be called with the rest."""
    topology, groups = model.topology, model.topology.groups
    virtual = topology.virtual_size if topology.virtual_size > 1 else None
    return partial(
        get_forward_backward_func(pp_size=topology.pipeline_size, vp_size=virtual),
        num_microbatches=len(batches),
        seq_length=max(b.tokens_T.numel() // b.num_rows for b in batches),
        micro_batch_size=1,
        pg_collection=groups,
        p2p_communicator=P2PCommunicator(groups.pp, model.module.config),
    )


def _count(model: Model, batches: Sequence[TokenBatch], num_forwards: int) -> None:
    """Notes what a pass needs by the model's mathematics, without padding, a prompt that sequences share once."""
    lengths = [length for batch in batches for length in batch.lengths]
    repeated = [length for batch in batches if batch.shared is not None for length in batch.shared.repeated]
    flops = forward_flops(model.shape, model.has_scalar_head, lengths)
    flops -= forward_flops(model.shape, model.has_scalar_head, repeated)
    if not model.has_scalar_head:  # which is applied where log-probs are asked for
        num_unasked = sum(lengths) - sum(repeated) - sum(len(batch.asked_N) for batch in batches)
        flops -= head_flops(model.shape, num_unasked)
    model.topology.work.add(num_forwards * flops / model.topology.replica_ranks)


def _require_rows(model: Model, batches: Sequence[TokenBatch]) -> None:
    """Several tensor ranks would read an id beyond the embedding as zeros, and go on.

    A model whose weights wait in host memory would read anything.
    """
    require_present(model.module.parameters(), f"weights of {model.name}")
    largest, num_rows = max((batch.largest_id for batch in batches), default=0), model.shape.vocab_size
    if largest >= num_rows:
        raise ValueError(
            f"{model.name} has no row for id {largest}, expected ids below its vocab_size of {num_rows}; the data, the "
            "pool and the model need one tokenizer"
        )


def _training_step[M: Microbatch](
    model: TrainedModel,
    loss: Loss[M],
    reading: Reading[M],
    factor: int,
    iterator: Iterator[tuple[TokenBatch, M | None]],
    chunk: GPTModel,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, tuple[Sums, Tensor]]]]:
    batch, microbatch = next(iterator)

    def loss_of(raw: Tensor) -> tuple[Tensor, tuple[Sums, Tensor]]:
        if microbatch is None:  # of padding alone: the backward of its exchange is what others wait for
            nothing = raw.float().sum() * 0
            if not model.has_scalar_head:  # gradients that go off early wait for that of every weight
                nothing = nothing + output_weight(model.module.last)[0, 0].float() * 0
            return nothing, ({}, nothing.detach())
        output = loss(reading.read(model, microbatch, raw), microbatch)
        return output.loss * factor, (detached(output.sums), output.loss.detach())

    return forward(chunk, batch, model.topology), loss_of


def training_hooks(config: TransformerConfig) -> None:
    """Tells Megatron's schedule to reduce gradients of replicated and tied weights after the last micro-batch."""
    config.finalize_model_grads_func = finalize_model_grads
