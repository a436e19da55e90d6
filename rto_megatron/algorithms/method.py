"""What a registered algorithm says about itself: its configuration, what it reads, and how it is built."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from rto_megatron.algorithms import reinforcement
from rto_megatron.section import Section
from rto_megatron.types import JudgedMicrobatch, LossOutput, PairMicrobatch, SupervisedMicrobatch

# Ids of the tokens whose text holds one of the strings.
Vocabulary = Callable[[Iterable[str]], frozenset[int]]


class OfflineAlgorithm[M: SupervisedMicrobatch | PairMicrobatch | JudgedMicrobatch](Protocol):
    """A loss on a fixed data set.

    Example:
        loss = algorithm.loss(logp_T, microbatch)
    """

    def loss(self, outputs: Tensor, micro: M) -> LossOutput:
        """The weighted loss of one micro-batch from the model's outputs, which `OfflineMethod.outputs` names."""
        ...


@dataclass(frozen=True)
class OfflineMethod[M: SupervisedMicrobatch | PairMicrobatch | JudgedMicrobatch]:
    """A method on a fixed data set.

    Example:
        OfflineMethod(config=config, build=build, examples="pairs", reference="required")
    """

    config: type[Section]
    build: Callable[..., OfflineAlgorithm[M]]  # of a `config`
    examples: Literal["demonstrations", "pairs", "judgements"]
    # logprobs [T] of the targets; values [T] of a scalar head; divergence [3, T], see `tdpo`
    outputs: Literal["logprobs", "values", "divergence"] = "logprobs"
    reference: Literal["none", "optional", "required"] = "none"  # optional: the policy's start stands in


@dataclass(frozen=True)
class OnlineMethod:
    """A method on responses that the policy samples itself.

    Example:
        OnlineMethod(config=config, build=build, has_critic=False)
    """

    config: type[reinforcement.Config]
    build: Callable[..., reinforcement.PolicyOptimization]  # of a `config` and a `Vocabulary`
    has_critic: bool = True
    has_dpo: bool = False  # reads a DPO model, unless `beta_dpo` is 0
    has_ratio: bool = True  # the policy's loss compares it with the distribution that was sampled from


Method = (
    OfflineMethod[SupervisedMicrobatch]
    | OfflineMethod[PairMicrobatch]
    | OfflineMethod[JudgedMicrobatch]
    | OnlineMethod
)
