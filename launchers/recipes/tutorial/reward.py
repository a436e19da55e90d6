"""What a good invitation is, as a program: the reward of docs/tutorial.md."""

from rto_megatron.rewards.sample import Sample


def score(sample: Sample) -> float:
    """1 for the name of who is invited, 1 for a please, and 0.1 less for every word over eight."""
    has_name = str(sample.columns["name"]) in sample.response
    is_polite = "please" in sample.response
    return has_name + is_polite - 0.1 * max(0, len(sample.response.split()) - 8)
