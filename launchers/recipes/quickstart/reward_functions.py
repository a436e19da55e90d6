"""Two rewards without a model for grpo_function.yaml: they run in a process of their own, once per replica."""

from rto_megatron.rewards.sample import Sample


def distinct(sample: Sample) -> float:
    """The share of a response's tokens that it has not had before."""
    return len(set(sample.response_ids)) / len(sample.response_ids)


def repeats(sample: Sample) -> list[float]:
    """-1 on every token that repeats the one before it."""
    before = (None, *sample.response_ids)
    return [-float(token == last) for token, last in zip(sample.response_ids, before, strict=False)]
