"""What the largest training forward of a micro-batch keeps, and what its backward pass adds, in bytes on a rank.

Of a layer, as Korthikanti et al. 2022 count it, without dropout and without the attention matrix, which is not stored:
its input, the output of each norm and the sum between attention and feed-forward network, cut over tensor ranks with
sequence parallelism alone; and cut in any case q, k and v before and after their rotation, what attention gives, and
the two halves, the gate and the product of the feed-forward network. A gradient in each width comes beside them.

With recomputation the layers' inputs are kept and one layer's inside exists at a time; without it all of all layers,
of as many micro-batches as the pipeline's fullest stage has at once (`PipelineCut.in_flight`). What reads a language
model's log-probs (`models/head_memory.py`) comes before the first layer is derived, so the greater of both counts.
"""

from collections.abc import Collection, Mapping

from rto_megatron.config.plan import StagePlan
from rto_megatron.config.training import GridConfig
from rto_megatron.models.head_memory import capped_bytes, head_bytes
from rto_megatron.models.pipeline_cut import pipeline_cut
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.shapes import FoundShape


def activation_bytes(
    plan: StagePlan, shapes: Mapping[str, FoundShape], names: Collection[str] | None = None
) -> int:
    """Activations of the largest micro-batch in training, in bytes; 0 without training.

    By number that is one of the longest sequences; by tokens one that is full, or a longer sequence alone.

    Args:
        names: of the roles that the rank holds; None: all.
    """
    training = plan.facts.training
    if training is None:
        return 0
    length, _ = plan.facts.longest_sequence
    longest, batch = length * (2 if plan.facts.reads_pairs else 1), training.batch
    tokens = longest * batch.micro if batch.micro is not None else max(longest, batch.tokens or 0)
    number = 2 if training.precision.dtype == "bf16" else 4
    peak = 0
    for role in plan.roles:
        if not role.is_trained or role.name not in shapes or role.name not in (names or shapes):
            continue
        shape, grid = shapes[role.name].shape, plan.config.parallel.grid_of(role.name)
        own = -(-tokens // grid.context)
        stages = (grid.pipeline, grid.virtual, grid.stages)
        held = pipeline_cut(shape, role.has_value_head, *stages).in_flight()
        entry = number * own * shape.hidden_size // (grid.tensor if grid.sequence else 1)
        kept = number * _kept_inside(shape, grid, own, tokens)
        derived = number * _derived(shape, grid, own)
        if shape.score_softcap is not None:
            heads = -(-shape.num_heads // grid.tensor)
            derived += capped_bytes(length, length, heads, number)
        columns = -(-shape.vocab_size // grid.tensor)
        is_capped = shape.logit_softcap is not None
        head = 0 if role.has_value_head else head_bytes(own, shape.hidden_size, columns, number, is_capped)
        if training.precision.recompute:
            layers, inside = entry * held, kept + derived
        else:
            layers, inside = (entry + kept) * held, derived
        peak = max(peak, entry + layers + max(inside, head))  # of the first stage the embeddings too
    return peak


def _kept_inside(shape: ModelShape, grid: GridConfig, own: int, tokens: int) -> int:
    """How many numbers a layer keeps for its backward pass, beside its input.

    Args:
        own, tokens: of a context rank, and of the whole row.
    """
    hidden, groups = shape.hidden_size, shape.num_kv_heads
    whole = (shape.num_norms + 1) * hidden // (grid.tensor if grid.sequence else 1)
    heads = (3 * shape.num_heads + 3 * groups) * shape.head_dim // grid.tensor
    if grid.tensor > groups:  # a head's ranks hold q, k and v of all of them
        heads += (shape.num_heads + 2 * groups) * shape.head_dim
    kept = own * (whole + heads + 4 * _width_inside(shape) // grid.tensor)
    if grid.context > 1 and grid.context_scheme == "gather":
        kept += 2 * tokens * max(groups // grid.tensor, 1) * shape.head_dim
    return kept


def _derived(shape: ModelShape, grid: GridConfig, own: int) -> int:
    """How many numbers a layer's backward pass has at once: gradients around a norm, and of the feed-forward network.

    With sequence parallelism the input of a product and its gradient are gathered.
    """
    return own * (3 * shape.hidden_size + 2 * _width_inside(shape) // grid.tensor)


def _width_inside(shape: ModelShape) -> int:
    """Numbers of a token inside the feed-forward network, of its experts together."""
    experts = shape.experts
    if experts is None:
        return shape.ffn_hidden_size
    chosen = experts.per_token * experts.ffn_hidden_size + (experts.shared_ffn_hidden_size or 0)
    return max(chosen, shape.ffn_hidden_size if len(experts.layers) < shape.num_layers else 0)
