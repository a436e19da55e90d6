"""Examples against the tokens that a micro-batch may have: what does not fit is told of, or refused."""

from collections.abc import Sequence

from rto_megatron.data.cut import Layout
from rto_megatron.data.grouping import Extent, least_lengths, lengths_of
from rto_megatron.errors import RecipeError
from rto_megatron.types import Example, Metrics, Rollout, TokenBatch


def over_budget(examples: Sequence[Example], source: str, layout: Layout) -> str | None:
    """A warning where examples are longer than `batch.tokens` and will be alone in their micro-batches.

    Raises:
        RecipeError: a prompt alone is.
    """
    budget = layout.tokens
    if budget is None or not examples:
        return None
    # One walk for both, as examples in files are made when they are asked for.
    extents = [(Extent.of(least_lengths(one)), Extent.of(lengths_of(one))) for one in examples]
    least = max(layout.size(extent) for extent, _ in extents)
    if least > budget:
        raise RecipeError(
            f"batch.tokens={budget} is below the longest prompt of {source}: with a single token of an answer it takes "
            f"{least} tokens of a micro-batch; set batch.tokens to {least} at least, or lower data.max_prompt_tokens"
        )
    warning = _beyond([layout.size(extent) for _, extent in extents], budget)
    return None if warning is None else f"of the examples of {source} {warning}"


def beyond_budget(examples: Sequence[Example | Rollout], layout: Layout) -> str | None:
    """A warning where any are longer than a micro-batch may be."""
    budget = layout.tokens
    if budget is None:
        return None
    return _beyond([layout.size(Extent.of(lengths_of(example))) for example in examples], budget)


def budget_fill(batches: Sequence[TokenBatch], layout: Layout) -> Metrics:
    """How full micro-batches are, as a sum for the logs: their tokens without padding, over those they may have."""
    if layout.tokens is None:
        return {}
    tokens = sum(sum(batch.lengths) for batch in batches)
    return {"memory/budget_fill_fraction": (float(tokens), float(layout.tokens * len(batches)))}


def _beyond(sizes: Sequence[int], budget: int) -> str | None:
    longer = [size for size in sizes if size > budget]
    if not longer:
        return None
    return (
        f"{len(longer)} of {len(sizes)} take more than batch.tokens={budget}, up to {max(longer)}; each of them is "
        "alone in a micro-batch, which needs that much more memory"
    )
