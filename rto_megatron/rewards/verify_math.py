"""math-verify as a reward function: whether a response's answer equals the right one, as mathematics."""

from math_verify import parse, verify

from rto_megatron.rewards.sample import Sample


def score(sample: Sample, answer: str) -> float:
    """1 where they are equal, else 0.

    Args:
        answer: the column with the right answer, a number or LaTeX, with or without its dollars.

    Raises:
        ValueError: the row has no such column, or math-verify reads no mathematics in it.

    Source: TRL, rewards/accuracy_rewards.py (the right answer first, then the response).
    """
    if answer not in sample.columns:
        raise ValueError(
            f"the row has no column {answer!r}, only {sorted(sample.columns)}; name the right one as `answer`"
        )
    right = str(sample.columns[answer])
    # Of a bare "1 + x" math-verify reads the number alone, and of the same in dollars all of it.
    is_marked = "$" in right or "\\boxed" in right
    wanted = (None if is_marked else parse(f"${right}$")) or parse(right)
    if not wanted:
        raise ValueError(f"math-verify reads no mathematics in column {answer!r}: {right!r}; mend the row")
    return float(verify(wanted, parse(sample.response)))
