"""A packed row in which a prompt stands once, before all the responses to it that are in the row."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SharedRow:
    """What a model computes of a micro-batch whose sequences share prompts: K positions of the T that it has.

    A sequence adds its tokens to the row, or those behind its prompt where a sequence before it has the same one. The
    last sequence may be padding.

    Example:
        # Of 5 6 7 and 5 6 8 9 the first two tokens are the prompt.
        SharedRow(
            tokens_K=tensor([5, 6, 7, 8, 9]), places_K=tensor([0, 1, 2, 2, 3]), read_T=tensor([0, 1, 2, 0, 1, 3, 4]),
            added=(0, 3, 5), runs=(2, 1, 2), order=(0, 1, 0, 2), seen=(0, 3, 7), repeated=(2,),
        )
    """

    tokens_K: Tensor  # int64
    places_K: Tensor  # int64, of each token in its sequence, from 0
    read_T: Tensor  # int64: which of the K positions computes a position of the micro-batch; 0 at padding
    added: tuple[int, ...]  # offsets of what each sequence adds to the row; the last one is K
    runs: tuple[int, ...]  # lengths of the runs of tokens that the row is made of
    order: tuple[int, ...]  # which runs make up the sequences, one sequence behind the other
    seen: tuple[int, ...]  # offsets of the sequences in that
    repeated: tuple[int, ...]  # lengths of the prompts that are in the micro-batch and not computed again
