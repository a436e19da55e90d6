"""How a sampled response ends: what is trained on and what the reward model reads if the length limit cut it.

Pure Python on token ids; one response at a time. The policies differ only for `finish_reason == "length"`:

    compat    the last token is overwritten by end-of-sequence and fully rewarded, as the released code does
    penalise  the response stays as sampled, the reward model reads it with end-of-sequence appended, and its
              score is lowered
    bootstrap the response stays as sampled and earns no score: the critic's value stands for what would follow
    mask      scored as under penalise, but no token of the response is trained on
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rto_megatron.types import Ban, EndOfSequence, FinishReason

TruncationPolicy = Literal["compat", "penalise", "bootstrap", "mask"]

# Stands in for the prompt's last token: any id that is neither end-of-sequence nor padding would do.
_PROMPT_ID = -1


@dataclass(frozen=True)
class ClosedSequence:
    """A sequence of L positions, [left padding | prompt | response | right padding], end-of-sequence set.

    Example:
        ClosedSequence(token_ids=(5, 9, 2), attention_mask=(1, 1, 1), action_mask=(0, 1, 1))
    """

    token_ids: tuple[int, ...]  # L
    attention_mask: tuple[int, ...]  # L; 1 from the first ordinary token through the end-of-sequence
    action_mask: tuple[int, ...]  # L - input_len; 1 on actions, end-of-sequence included


def close_sequence(
    token_ids: Sequence[int], input_len: int, eos: EndOfSequence, pad_id: int
) -> ClosedSequence:
    """Writes end-of-sequence behind the last ordinary token of a generated sequence and masks what follows.

    An ordinary token is neither one of `eos.ids` nor `pad_id`; one of the former that stands there is kept. Where no
    position follows the last ordinary token, it is overwritten itself.

    Args:
        token_ids: L ids, left padding and prompt in the first `input_len` positions; one of them is ordinary.
        input_len: positions before the response, at least 1.
        eos: end-of-sequence.
        pad_id: padding; may be one of `eos.ids`.

    Source: OpenRLHF 0.4.4, openrlhf/models/actor.py:process_sequences.
    """
    special = {*eos.ids, pad_id}
    ordinary = [i for i, token in enumerate(token_ids) if token not in special]
    eos_at = min(ordinary[-1] + 1, len(token_ids) - 1)
    end = token_ids[eos_at] if token_ids[eos_at] in eos.ids else eos.written
    closed = (*token_ids[:eos_at], end, *token_ids[eos_at + 1 :])
    attention_mask = tuple(int(ordinary[0] <= i <= eos_at) for i in range(len(closed)))
    # An action exists where its state's last token is ordinary; the first exists whatever ends the prompt.
    states = closed[input_len - 1 : -1]
    action_mask = tuple(int(i == 0 or token not in special) for i, token in enumerate(states))
    return ClosedSequence(closed, attention_mask, action_mask)


def close_response(
    response_ids: tuple[int, ...], finish_reason: FinishReason, eos: EndOfSequence, policy: TruncationPolicy
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Applies the truncation policy to one response.

    A response that ended is left as it is under every policy; one that a stop string ended is closed as a cut one is,
    and scored in full.

    Returns:
        The ids to train on, as many as came in, and the ids to append for the reward model: nothing, or one
        end-of-sequence. The appended token is not an action and is never trained on.
    """
    if finish_reason == "stop":
        # One that a stop string ended is over, and was not ended by the policy: the reward model reads its end.
        return response_ids, () if response_ids[-1] in eos.ids else (eos.written,)
    if policy == "compat":
        closed = close_sequence((_PROMPT_ID, *response_ids), input_len=1, eos=eos, pad_id=eos.written)
        return closed.token_ids[1:], ()
    return response_ids, (eos.written,)


def compared_ban(eos: EndOfSequence, min_tokens: int) -> Ban | None:
    """What the log-probs of policy and reference leave out, so that they are of what the pool sampled from.

    None up to 1: the released code forbids an empty response as well, and takes whole distributions all the same.

    Args:
        min_tokens: end-of-sequence is forbidden before this many tokens of a response.

    Source: the rule of transformers' MinNewTokensLengthLogitsProcessor; OpenRLHF 0.4.4, trainer/ppo_trainer.py
    (min_new_tokens=1).
    """
    return Ban(eos.ids, min_tokens) if min_tokens > 1 else None
