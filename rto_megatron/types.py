"""Data that flows between the stages: each stage returns a new frozen type.

Legend of tensor names
    B  responses on this data-parallel rank      R  response positions, right-padded
    T  token positions of one micro-batch        S  sequences of one micro-batch      P  preference pairs (S = 2 P)
Unless said otherwise tensors are float32 and live on the device of the rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from rto_megatron.shared_row import SharedRow
from rto_megatron.sums import Sums, to_metrics

FinishReason = Literal["stop", "length"]
type Columns = Mapping[str, object]  # of a row of the data, as JSON has them
Metrics = Mapping[str, tuple[float, float]]  # name -> (sum, count): added over ranks, divided once at the end


@dataclass(frozen=True)
class EndOfSequence:
    """The tokens that end a sequence.

    Example:
        EndOfSequence(ids=(2, 32000), written=2)
    """

    ids: tuple[int, ...]  # any of them ends one, `written` among them
    written: int  # the tokenizer's: what is written where one has to be


@dataclass(frozen=True)
class Ban:
    """Tokens that the pool could not sample as one of the first of a response.

    Example:
        Ban(ids=(2,), num_tokens=16)
    """

    ids: tuple[int, ...]
    num_tokens: int  # of the response, from its first


@dataclass(frozen=True)
class Distribution:
    """What log-probs are of: softmax(logits / temperature), less the banned tokens.

    Example:
        Distribution(temperature=0.8, ban=Ban((2,), 16))
    """

    temperature: float = 1.0
    ban: Ban | None = None  # None: nothing is left out


WHOLE = Distribution()  # the model's own, as it is trained on texts


@dataclass(frozen=True)
class Prompt:
    """One prompt, already tokenized with the chat template and its generation header.

    Example:
        Prompt(id="p7", token_ids=(1, 529, 3))
    """

    id: str
    token_ids: tuple[int, ...]
    # What else its row of the data says, for rewards that read it; empty where none does.
    columns: Columns = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Rollout:
    """One sampled response; `response_ids` ends with the end-of-sequence token when `finish_reason` is "stop".

    Example:
        Rollout("p7", (1, 529), (88, 2), (-1.25, -0.5), "stop", weight_version=12)
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampled_logprobs: tuple[float, ...]  # nats, by the engine that sampled, one per response token
    finish_reason: FinishReason
    weight_version: int  # the policy version that sampled it


@dataclass(frozen=True)
class Demonstration:
    """One supervised example: the loss is taken on `response_ids`, but for the stretches of `skipped`.

    Example:
        Demonstration("d3", prompt_ids=(1, 529), response_ids=(88, 2))
    """

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    # (first, behind the last) of `response_ids`, ascending: what others say between the turns that are learnt.
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def num_learnt(self) -> int:
        """Tokens that the loss is taken on."""
        return len(self.response_ids) - sum(end - first for first, end in self.skipped)


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; both end with the end-of-sequence token.

    Example:
        PreferencePair("q1", (1, 529), chosen_ids=(88, 2), rejected_ids=(91, 90, 2), margin=1.0)
    """

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin: float


@dataclass(frozen=True)
class JudgedResponse:
    """One answer with a verdict: the examples of KTO.

    Example:
        JudgedResponse("k4", (1, 529), (88, 2), is_desirable=True, unrelated_ids=(64, 2))
    """

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    is_desirable: bool
    unrelated_ids: tuple[int, ...]  # an answer to another prompt, for the estimate of the KL baseline


# What a data set holds, as loaders give it.
type Example = Prompt | Demonstration | PreferencePair | JudgedResponse


@dataclass(frozen=True)
class TrainerSample:
    """What the trainer's policy says of some responses, where the pool speaks for it in all others.

    Example:
        TrainerSample(logp_BR, is_asked_B=tensor([True, False]))
    """

    logp_BR: Tensor  # zeros in rows that were not asked
    is_asked_B: Tensor  # bool


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts with every model's opinion of them: the input of credit assignment.

    Example:
        mask_BR = tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])  # responses of three and of two tokens
    """

    rollouts: tuple[Rollout, ...]
    mask_BR: Tensor  # 1 on response tokens that are actions, end-of-sequence included; 0 on padding
    sampled_BR: Tensor  # 1 on actions that the pool sampled from what `logp_old_BR` is of; 0 on others, as written ones
    logp_pool_BR: Tensor  # policy, by the pool when it sampled; means nothing where `sampled_BR` is 0
    logp_old_BR: Tensor  # policy, at rollout time; by the pool where `by_trainer` is there
    logp_ref_BR: Tensor  # reference
    dpo_logratio_BR: Tensor  # log pi_dpo - log pi_dpo_reference; zeros where the algorithm has no DPO reward
    values_BR: Tensor  # critic, of the state before each action; zeros without a critic
    bootstrap_B: Tensor  # critic, of the state behind a cut response; zeros where nothing is bootstrapped
    score_B: Tensor  # sum of all sources that pay responses; alone, a reward model normalised by its checkpoint's mean
    drawn: Distribution = WHOLE  # what the log-probs of policy and reference are of
    source_BR: Tensor | None = None  # sum of all sources that pay tokens; None where there is none
    scores_by_source: Mapping[str, Tensor] = field(default_factory=dict)  # [B] as given, tokens' added
    paid_by_source: Mapping[str, Tensor] = field(default_factory=dict)  # [B] what of it enters the reward
    by_trainer: TrainerSample | None = None  # None: `logp_old_BR` is the trainer's


@dataclass(frozen=True)
class TokenRewards:
    """The reward of every token, its terms kept apart for logs and reports (nats or reward units).

    Example:
        TokenRewards(tensor([[0.0, 1.3]]), tensor([[0.02, -0.05]]), tensor([[0.0, -0.01]]), tensor(1))
    """

    score_BR: Tensor  # reward model's score, on the last token
    dpo_BR: Tensor  # beta_1 log(pi_dpo / pi_ref), wherever the method pays it
    kl_BR: Tensor  # - beta_2 log(pi / pi_ref)
    num_clipped: Tensor  # scalar: tokens whose DPO reward the clip changed
    source_BR: Tensor | None = None  # sources that pay tokens; None where there is none

    def total_BR(self) -> Tensor:  # noqa: N802 -- named like the tensors
        """Sum of the terms, in the order of the released code, shape [B, R]."""
        total_BR = self.score_BR + self.kl_BR + self.dpo_BR
        return total_BR if self.source_BR is None else total_BR + self.source_BR

    def dense_BR(self) -> Tensor:  # noqa: N802 -- named like the tensors
        """What tokens are paid for themselves: the DPO reward and that of sources, shape [B, R]."""
        return self.dpo_BR if self.source_BR is None else self.dpo_BR + self.source_BR


@dataclass(frozen=True)
class Rewards:
    """What all sources of rewards said of responses, added by weight.

    Example:
        Rewards(tensor([0.5]), None, {"exact": tensor([1.0])}, {"exact": tensor([0.5])})
    """

    score_B: Tensor
    source_BR: Tensor | None  # None: no source pays tokens
    given: Mapping[str, Tensor]  # by source, [B], a response's tokens added; empty: they are not told apart
    paid: Mapping[str, Tensor]  # the same after normalisation, clip and weight


@dataclass(frozen=True)
class TrainingRows:
    """Rollouts with credit assigned to every token: what the policy and value updates read.

    Example:
        advantages_BR = tensor([[0.7, -0.7, 0.0]])  # whitened over two tokens; the third is padding
    """

    rollouts: tuple[Rollout, ...]
    mask_BR: Tensor
    logp_old_BR: Tensor
    logp_ref_BR: Tensor
    pool_importance_BR: Tensor  # weight of a token's policy loss, see `pool_importance`; 1 where it is off
    values_BR: Tensor
    advantages_BR: Tensor  # as the policy's loss takes them: whitened, or relative to a group
    returns_BR: Tensor
    drawn: Distribution  # what log-probs compared with `logp_old_BR` and `logp_ref_BR` are of


@dataclass(frozen=True)
class Experience(TrainingRows):
    """What credit assignment makes of the rollouts of a replica.

    Example:
        experience.rewards.total_BR()
    """

    rewards: TokenRewards


@dataclass(frozen=True)
class BannedTargets:
    """Positions whose log-probs are of the vocabulary without some tokens.

    Example:
        BannedTargets(ids=(2,), is_banned_T=tensor([True, True, False]))
    """

    ids: tuple[int, ...]
    is_banned_T: Tensor  # bool; false where the target is one of them


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of one micro-batch as a model reads them.

    Packed: `num_rows` is 1 and sequence s occupies positions cu_seqlens[s]..cu_seqlens[s+1]. Padded: `num_rows` rows of
    equal length, one sequence each, right-padded; cu_seqlens are the multiples of that length. Position t predicts
    `targets_T[t]`, the token at t + 1 of the same sequence (0 at its last position).

    Example:
        # Sequences of 3 and 2 tokens, of which the last 2 and the last one are the response.
        TokenBatch(tensor([5, 6, 7, 8, 9]), tensor([6, 7, 0, 9, 0]), (0, 3, 5), 1, (2, 4), 9, tensor([0, 1, 3]))
    """

    tokens_T: Tensor  # int64
    targets_T: Tensor  # int64
    cu_seqlens: tuple[int, ...]  # S + 1 offsets up to T; the last segment may be padding
    num_rows: int
    last_positions: tuple[int, ...]  # index into T of each real sequence's last token, S entries
    largest_id: int  # of all tokens
    asked_N: Tensor  # int64, ascending: positions of response targets; a language model is read there alone
    banned: BannedTargets | None = None  # None: log-probs are of the whole vocabulary
    temperature: float = 1.0  # by which logits are divided before their softmax
    shared: SharedRow | None = None  # how a model computes it; None: as it is

    @property
    def lengths(self) -> list[int]:
        """Tokens of each real sequence."""
        return [last + 1 - start for start, last in zip(self.cu_seqlens, self.last_positions, strict=False)]


@dataclass(frozen=True)
class SupervisedMicrobatch:
    """`weight_T` is 1 / (all target tokens of the global batch) on response targets and 0 elsewhere.

    Example:
        weight_T = tensor([0.0, 0.25, 0.25, 0.0])  # two of the four response tokens of the global batch
    """

    batch: TokenBatch
    weight_T: Tensor


@dataclass(frozen=True)
class PairMicrobatch:
    """P pairs: the first P sequences of `batch` are the chosen answers, the next P the rejected ones.

    Example:
        weight_P = tensor([0.5])  # one of the two pairs of the global batch
    """

    batch: TokenBatch
    mask_T: Tensor  # 1 on positions whose target is a response token
    weight_P: Tensor  # 1 / (all pairs of the global batch)
    margin_P: Tensor
    logp_ref_S: Tensor  # summed reference log-probs of the response; zeros where the method has no reference


@dataclass(frozen=True)
class DivergenceMicrobatch(PairMicrobatch):
    """Pairs on which the policy is compared with the reference's whole distribution.

    Example:
        microbatch.reference_hidden_NH.shape
    """

    # The reference's final states where `batch` asks; empty but on the last stage.
    reference_hidden_NH: Tensor


@dataclass(frozen=True)
class JudgedMicrobatch:
    """S answers with verdicts.

    Example:
        is_desirable_S = tensor([True, False])
    """

    batch: TokenBatch
    mask_T: Tensor  # 1 on positions whose target is a response token
    weight_S: Tensor  # 1 / (all answers of the global batch)
    is_desirable_S: Tensor  # bool
    logp_ref_S: Tensor  # summed reference log-probs of the response
    baseline: Tensor  # scalar, nats: the global batch's KL estimate, at least 0; no gradient flows into it


@dataclass(frozen=True)
class Minibatch:
    """One micro-batch of a PPO update; every *_T field sits at the position that predicts the action.

    Example:
        weight_T = tensor([0.0, 0.25, 0.25, 0.0])  # one of two responses, which has two tokens
    """

    batch: TokenBatch
    weight_T: Tensor  # the weights of all micro-batches of all ranks sum to 1
    logp_old_T: Tensor
    logp_ref_T: Tensor
    pool_importance_T: Tensor
    advantages_T: Tensor
    values_old_T: Tensor
    returns_T: Tensor


@dataclass(frozen=True)
class LossOutput:
    """A weighted sum (scalar with gradient) and sums for the logs.

    Example:
        LossOutput(tensor(0.7), {"loss": (tensor(0.7), tensor(1.0))})
    """

    loss: Tensor
    sums: Sums = field(default_factory=dict)

    @property
    def metrics(self) -> Metrics:
        """The sums as numbers; the host waits for the device."""
        return to_metrics(self.sums)


@dataclass(frozen=True)
class ValueScale:
    """Mean and standard deviation of a reward model's scores; every value and score is (raw - mean) / std.

    Example:
        ValueScale(mean=-1.5, std=3.0)
    """

    mean: float = 0.0
    std: float = 1.0
