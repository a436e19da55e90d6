"""From lists of sequences to micro-batches, and between the [B, R] response grid and flat positions [T].

Legend
    B  responses of this rank          R  response positions        T  positions of one micro-batch
    S  sequences of one micro-batch    P  pairs of one micro-batch  N  response tokens of one micro-batch
    G  pairs of this rank's share of the global batch

A field of a response token sits at the position that predicts it: a sequence that starts at position o
with prompt length p and response length n owns positions o + p - 1 .. o + p + n - 2. The gradient of a
step does not depend on how sequences are split into micro-batches, because every denominator is a global
total that is passed in.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rto_megatron.algorithms.losses import sequence_sums
from rto_megatron.data.cut import CutSequences, Layout
from rto_megatron.data.sharing import shared_row
from rto_megatron.platform.copies import copied_to
from rto_megatron.types import (
    WHOLE,
    Ban,
    BannedTargets,
    Demonstration,
    Distribution,
    JudgedMicrobatch,
    JudgedResponse,
    Minibatch,
    PairMicrobatch,
    PreferencePair,
    Rollout,
    SupervisedMicrobatch,
    TokenBatch,
    TrainingRows,
)

PADDING_ID = 0


def token_batch(
    sequences: Sequence[tuple[Sequence[int], int]],
    packed: bool,
    multiple_of: int,
    device: torch.device,
    shares_prompts: bool = False,
) -> TokenBatch:
    """Lay out sequences as one micro-batch.

    Args:
        sequences: (token ids, prompt length in tokens) of each sequence; 1 <= prompt length <= number of
        ids. packed: one row without padding between sequences, else one right-padded row per sequence.
        multiple_of: row lengths are rounded up to it; when packed, by one trailing padding segment.
        device: where the tensors go.
        shares_prompts: models compute equal prompts of a packed row once.
    """
    if not sequences:
        raise ValueError("a micro-batch needs at least one sequence")
    if not all(1 <= prompt_len <= len(ids) for ids, prompt_len in sequences):
        raise ValueError("a sequence without a prompt, or shorter than its prompt, is in a micro-batch")
    lengths = [len(ids) for ids, _ in sequences]
    if packed:
        cu_seqlens = [0, *accumulate(lengths)]
        num_rows, num_padding = 1, -cu_seqlens[-1] % multiple_of
        flat = [*chain.from_iterable(ids for ids, _ in sequences), *([PADDING_ID] * num_padding)]
        if num_padding:
            cu_seqlens.append(len(flat))
    else:
        num_rows = len(sequences)
        width = max(lengths) + -max(lengths) % multiple_of
        cu_seqlens = [row * width for row in range(num_rows + 1)]
        flat = [token for ids, _ in sequences for token in (*ids, *([PADDING_ID] * (width - len(ids))))]
    last_positions = [start + length - 1 for start, length in zip(cu_seqlens, lengths, strict=False)]
    tokens_T = torch.tensor(flat, dtype=torch.int64)
    targets_T = tokens_T.roll(-1)
    targets_T[[end - 1 for end in cu_seqlens[1:]]] = 0  # before padding it is PADDING_ID, 0 as well
    asked = [
        torch.arange(start + prompt_len - 1, last)
        for start, last, (_, prompt_len) in zip(cu_seqlens, last_positions, sequences, strict=False)
    ]
    return TokenBatch(
        copied_to(tokens_T, device),
        copied_to(targets_T, device),
        tuple(cu_seqlens),
        num_rows,
        tuple(last_positions),
        max(flat),
        copied_to(torch.cat(asked), device),
        shared=shared_row(sequences, len(flat), multiple_of, PADDING_ID, device) if shares_prompts else None,
    )


def _laid_out(sequences: Sequence[tuple[Sequence[int], int]], layout: Layout) -> TokenBatch:
    return token_batch(
        sequences, layout.packed, layout.multiple_of, layout.device, layout.packed and layout.shares_prompts
    )


def _grid_index(
    batch: TokenBatch, prompt_lens: Sequence[int], response_lens: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and position of every response token, each int64 [N]."""
    device = batch.tokens_T.device
    assert len(prompt_lens) == len(response_lens) == len(batch.last_positions)
    # On the host, where the numbers are: on a GPU the length of what they make would have to be waited for.
    count_S = torch.tensor(response_lens, dtype=torch.int64)
    start_S = torch.tensor([o + p - 1 for o, p in zip(batch.cu_seqlens, prompt_lens, strict=False)])
    row_N = torch.repeat_interleave(torch.arange(len(count_S)), count_S)
    column_N = torch.arange(len(row_N)) - (count_S.cumsum(0) - count_S)[row_N]
    position_N = start_S[row_N] + column_N
    return copied_to(row_N, device), copied_to(column_N, device), copied_to(position_N, device)


def scatter_to_positions(
    grid_BR: Tensor, batch: TokenBatch, prompt_lens: Sequence[int], response_lens: Sequence[int]
) -> Tensor:
    """Put values of response tokens at the positions that predict them; zero elsewhere.

    Args:
        grid_BR: [S, R], row s belongs to sequence s of `batch`; columns past response_lens[s] are
        ignored. prompt_lens, response_lens: tokens, one entry per real sequence of `batch`.

    Returns:
        [T], dtype of the grid, on the device of `batch`.
    """
    row_N, column_N, position_N = _grid_index(batch, prompt_lens, response_lens)
    grid_BR = grid_BR.to(batch.tokens_T.device)
    values_T = grid_BR.new_zeros(batch.tokens_T.shape)
    values_T[position_N] = grid_BR[row_N, column_N]
    return values_T


def gather_to_grid(
    values_T: Tensor,
    batch: TokenBatch,
    prompt_lens: Sequence[int],
    response_lens: Sequence[int],
    num_columns: int,
) -> Tensor:
    """Inverse of `scatter_to_positions`: [S, num_columns], zero past each response's end, differentiable."""
    row_N, column_N, position_N = _grid_index(batch, prompt_lens, response_lens)
    grid_SR = values_T.new_zeros(len(response_lens), num_columns)
    return grid_SR.index_put((row_N, column_N), values_T[position_N])


def _response_mask(sequences: Sequence[tuple[Sequence[int], int]], batch: TokenBatch) -> Tensor:
    prompt_lens = [prompt_len for _, prompt_len in sequences]
    response_lens = [len(ids) - prompt_len for ids, prompt_len in sequences]
    position_N = _grid_index(batch, prompt_lens, response_lens)[2]
    mask_T = torch.zeros(batch.tokens_T.shape, dtype=torch.float32, device=batch.tokens_T.device)
    mask_T[position_N] = 1.0
    return mask_T


def _sequences(
    answered: Sequence[Rollout] | Sequence[Demonstration] | Sequence[JudgedResponse],
) -> list[tuple[tuple[int, ...], int]]:
    """(Token ids, prompt length) of prompts with their responses."""
    return [(one.prompt_ids + one.response_ids, len(one.prompt_ids)) for one in answered]


def _lengths(rollouts: Sequence[Rollout]) -> tuple[list[int], list[int]]:
    """Tokens of prompts, and of responses."""
    return [len(one.prompt_ids) for one in rollouts], [len(one.response_ids) for one in rollouts]


def supervised_microbatches(
    demonstrations: Sequence[Demonstration], num_target_tokens: float, layout: Layout
) -> list[SupervisedMicrobatch]:
    """Micro-batches of a supervised step.

    Args:
        demonstrations: this rank's share of the global batch.
        num_target_tokens: what the loss is divided by: learnt tokens of the global batch, all ranks.
        layout: micro-batch size and packing.
    """
    microbatches = []
    for numbers in layout.groups_of(demonstrations):
        group = [demonstrations[number] for number in numbers]
        sequences = _sequences(group)
        batch = _laid_out(sequences, layout)
        mask_T = _response_mask(sequences, batch)
        for start, demo in zip(batch.cu_seqlens, group, strict=False):
            predicts_first = start + len(demo.prompt_ids) - 1
            for first, end in demo.skipped:
                mask_T[predicts_first + first : predicts_first + end] = 0.0
        weight_T = mask_T / num_target_tokens
        microbatches.append(SupervisedMicrobatch(batch, weight_T))
    return microbatches


def pair_microbatches(
    pairs: Sequence[PreferencePair], logp_ref_G2: Tensor, num_pairs: int, layout: Layout
) -> list[PairMicrobatch]:
    """Micro-batches of a preference step; both answers of a pair stay in one micro-batch.

    Args:
        pairs: this rank's share of the global batch, G pairs.
        logp_ref_G2: [G, 2], float32, nats: summed reference log-probs of the chosen and of the rejected
            answer; zeros for a method without a reference.
        num_pairs: pairs of the global batch, all ranks.
        layout: micro-batch size in pairs, and packing.
    """
    assert logp_ref_G2.shape == (len(pairs), 2)
    microbatches = []
    for numbers in layout.groups_of(pairs):
        group = [pairs[number] for number in numbers]
        answers = [*(pair.chosen_ids for pair in group), *(pair.rejected_ids for pair in group)]
        prompts = [pair.prompt_ids for pair in (*group, *group)]
        sequences = [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]
        batch = _laid_out(sequences, layout)
        margin_P = torch.tensor([pair.margin for pair in group], dtype=torch.float32, device=layout.device)
        microbatches.append(
            PairMicrobatch(
                batch=batch,
                mask_T=_response_mask(sequences, batch),
                weight_P=torch.full_like(margin_P, 1.0 / num_pairs),
                margin_P=margin_P,
                logp_ref_S=logp_ref_G2[numbers].T.reshape(-1).to(layout.device),
            )
        )
    return microbatches


def judged_microbatches(
    answers: Sequence[JudgedResponse], logp_ref_G: Tensor, baseline: Tensor, num_answers: int, layout: Layout
) -> list[JudgedMicrobatch]:
    """Micro-batches of a step on answers with verdicts.

    Args:
        answers: this rank's share of the global batch, G answers.
        logp_ref_G: [G], float32, nats: summed reference log-probs of each answer.
        baseline: scalar, nats: the KL estimate of the global batch.
        num_answers: answers of the global batch, all ranks.
        layout: micro-batch size in answers, and packing.
    """
    assert logp_ref_G.shape == (len(answers),)
    microbatches = []
    for numbers in layout.groups_of(answers):
        group = [answers[number] for number in numbers]
        sequences = _sequences(group)
        batch = _laid_out(sequences, layout)
        logp_ref_S = logp_ref_G[numbers].to(layout.device)
        microbatches.append(
            JudgedMicrobatch(
                batch=batch,
                mask_T=_response_mask(sequences, batch),
                weight_S=torch.full_like(logp_ref_S, 1.0 / num_answers),
                is_desirable_S=torch.tensor([a.is_desirable for a in group], device=layout.device),
                logp_ref_S=logp_ref_S,
                baseline=baseline,
            )
        )
    return microbatches


def response_sums(
    values: Sequence[Tensor], cut: CutSequences, sequences: Sequence[tuple[Sequence[int], int]]
) -> Tensor:
    """Sum of per-position outputs over each response, [number of sequences], differentiable.

    Args:
        values: one [T] tensor per batch.
        cut: `sequences` as batches.
        sequences: (token ids, prompt length in tokens).
    """
    sums = []
    for values_T, batch, numbers in zip(values, cut.batches, cut.groups, strict=True):
        mask_T = _response_mask([sequences[number] for number in numbers], batch)
        sums.append(sequence_sums(values_T, mask_T, batch))
    return cut.in_order(sums)


def sequence_batches(sequences: Sequence[tuple[Sequence[int], int]], layout: Layout) -> CutSequences:
    """Token batches of (token ids, prompt length)."""
    prompts = [tuple(ids[:prompt_len]) for ids, prompt_len in sequences]
    groups = layout.groups([(len(ids),) for ids, _ in sequences], prompts)
    batches = [_laid_out([sequences[number] for number in numbers], layout) for numbers in groups]
    return CutSequences(batches, groups)


def rollout_batches(rollouts: Sequence[Rollout], layout: Layout, drawn: Distribution = WHOLE) -> CutSequences:
    """Token batches of prompts with their responses, for the forwards that score rollouts.

    Args:
        drawn: what log-probs are of.
    """
    cut = sequence_batches(_sequences(rollouts), layout)
    batches = [
        _drawn_batch(batch, [rollouts[number] for number in numbers], drawn)
        for batch, numbers in zip(cut.batches, cut.groups, strict=True)
    ]
    return replace(cut, batches=batches)


def _drawn_batch(batch: TokenBatch, rollouts: Sequence[Rollout], drawn: Distribution) -> TokenBatch:
    heated = replace(batch, temperature=drawn.temperature)
    return heated if drawn.ban is None else _with_ban(heated, rollouts, drawn.ban)


def _with_ban(batch: TokenBatch, rollouts: Sequence[Rollout], ban: Ban) -> TokenBatch:
    """A token of `ban.ids` that stands among the first of a response was written there, not sampled: it keeps the whole
    vocabulary."""
    _, column_N, position_N = _grid_index(batch, *_lengths(rollouts))
    is_banned_T = torch.zeros_like(batch.tokens_T, dtype=torch.bool)
    is_banned_T[position_N[column_N < ban.num_tokens]] = True
    is_banned_T &= ~torch.isin(batch.targets_T, batch.targets_T.new_tensor(ban.ids))
    return replace(batch, banned=BannedTargets(ban.ids, is_banned_T))


def rollout_grid(values: Sequence[Tensor], cut: CutSequences, rollouts: Sequence[Rollout]) -> Tensor:
    """Collect per-position outputs of `rollout_batches` into one grid.

    Args:
        values: one [T] tensor per batch.
        cut: what `rollout_batches(rollouts, ...)` gave.
        rollouts: all B rollouts of this rank.

    Returns:
        [B, R], R the longest response of `rollouts`, zero past each response's end.
    """
    num_columns = max(len(rollout.response_ids) for rollout in rollouts)
    rows = []
    for values_T, batch, numbers in zip(values, cut.batches, cut.groups, strict=True):
        lengths = _lengths([rollouts[number] for number in numbers])
        rows.append(gather_to_grid(values_T, batch, *lengths, num_columns))
    return cut.in_order(rows)


def response_mask(rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """1 on response tokens, 0 past each response's end: [B, R], float32."""
    length_B = torch.tensor([len(rollout.response_ids) for rollout in rollouts], device=device)
    return (torch.arange(int(length_B.max()), device=device) < length_B[:, None]).float()


def padded_rows(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Rows of one number per response token as a grid, 0 behind their ends: [B, R], float32."""
    rows_B = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return pad_sequence(rows_B, batch_first=True).to(device)


def minibatches(
    experience: TrainingRows, weights_BR: Tensor, rows: Sequence[int], layout: Layout
) -> list[Minibatch]:
    """Micro-batches of one optimizer step of a PPO update.

    Args:
        experience: all B rollouts of this rank, or of all replicas.
        weights_BR: [B, R]; summed over `rows`, over all ranks, they give 1.
        rows: which rollouts this step uses, in order; indices into B.
        layout: micro-batch size and packing.
    """
    steps = []
    for numbers in layout.groups_of([experience.rollouts[row] for row in rows]):
        group = [rows[number] for number in numbers]
        rollouts = [experience.rollouts[row] for row in group]
        batch = _drawn_batch(_laid_out(_sequences(rollouts), layout), rollouts, experience.drawn)
        fields_BR = (
            weights_BR,
            experience.logp_old_BR,
            experience.logp_ref_BR,
            experience.pool_importance_BR,
            experience.advantages_BR,
            experience.values_BR,
            experience.returns_BR,
        )
        lengths = _lengths(rollouts)
        positioned = (scatter_to_positions(field_BR[group], batch, *lengths) for field_BR in fields_BR)
        steps.append(Minibatch(batch, *positioned))
    return steps
