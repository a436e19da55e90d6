"""The optional language-model loss beside the policy's (InstructGPT's "ptx"): micro-batches of pretraining text."""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_megatron.algorithms.policy_losses import Loss
from rto_megatron.config import schema
from rto_megatron.data.batches import Batches, BatchesState
from rto_megatron.data.packing import supervised_microbatches
from rto_megatron.errors import DataError
from rto_megatron.trainer.feed import feed, go_on
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Demonstration, LossOutput, Minibatch, SupervisedMicrobatch

MixedLoss = Callable[[Tensor, Minibatch | SupervisedMicrobatch], LossOutput]


class Pretraining:
    """Gives every optimizer step as many texts as it has responses; without texts it adds nothing.

    Source: OpenRLHF 0.4.4, trainer/ppo_trainer.py:training_step_actor (both gradients before one optimizer step).

    Example:
        texts = Pretraining(config, setup).microbatches()
    """

    def __init__(self, config: schema.ReinforcementStage, setup: Setup) -> None:
        self._setup = setup
        self._coef = config.algorithm.ptx_coef
        self._texts: Batches[Demonstration] | None = None
        if config.data.pretrain is not None:
            loaded = setup.prepared.texts(config.data.pretrain)
            setup.admit(loaded)
            num_texts = sum(portion.per_pass for portion in loaded.portions)
            if num_texts < config.batch.train:
                raise DataError(
                    f"data.pretrain: {loaded.report.source} has {num_texts} texts, and an optimizer step takes "
                    f"as many as responses, batch.train={config.batch.train}; name more texts"
                )
            self._texts = feed(loaded, config.batch.train, config.run.seed, setup.topology, setup.cost)

    def microbatches(self) -> tuple[list[SupervisedMicrobatch], list[list[str]]]:
        """The texts of one optimizer step with their ids; all ranks must call it. The weights hold the factor."""
        if self._texts is None:
            return [], []
        topology, layout = self._setup.topology, self._setup.layout
        texts = self._texts.next_batch()
        own = torch.tensor(float(sum(len(t.response_ids) for t in texts)), device=layout.device)
        microbatches = supervised_microbatches(texts, float(topology.dp_sum(own)) / self._coef, layout)
        return microbatches, [[texts[number].id for number in group] for group in layout.groups_of(texts)]

    def state(self) -> BatchesState | None:
        """What a checkpoint keeps."""
        return None if self._texts is None else self._texts.state()

    def restore(self, state: BatchesState | None) -> None:
        """Continues where `state` was taken."""
        if self._texts is not None and state is not None:
            go_on(self._texts, state, "data.pretrain", self._setup.topology)


def beside(policy_loss: Loss) -> MixedLoss:
    """`policy_loss` on responses, the language-model loss on texts; of several rows the first are log-probs."""

    def loss(outputs: Tensor, micro: Minibatch | SupervisedMicrobatch) -> LossOutput:
        if isinstance(micro, Minibatch):
            return policy_loss(outputs, micro)
        logp_T = outputs if outputs.dim() == 1 else outputs[0]
        weighted = -(micro.weight_T * logp_T).sum()
        return LossOutput(weighted, {"loss/ptx_avg": (weighted, micro.weight_T.sum())})

    return loss
