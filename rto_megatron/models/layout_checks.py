"""Why a model cannot be built or trained in a layout, said before anything is built."""

from collections.abc import Mapping

from rto_megatron.config.training import GridConfig, ParallelConfig
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.shape import ModelShape


def check_layout(shape: ModelShape, grid: GridConfig, where: str, section: str = "parallel") -> list[str]:
    """Why this model cannot be cut in `tensor` x `pipeline` pieces, or its rows over `context` ranks.

    One sentence each; empty when they can.

    Args:
        where: the model's key.
        section: the key of the section that says `grid`.
    """
    tensor, pipeline = grid.tensor, grid.pipeline
    not_run = FAMILIES[shape.family].not_run
    if not_run is not None:
        return [f"{where}: no {shape.family} model can be built here: {not_run}"]
    problems = []
    counts = [
        (shape.num_heads, "num_attention_heads"),
        (shape.num_kv_heads, "num_key_value_heads"),
        (shape.ffn_hidden_size, "intermediate_size"),
    ]
    if shape.experts is not None:
        counts.append((shape.experts.ffn_hidden_size, "an expert's intermediate size"))
        if shape.experts.shared_ffn_hidden_size is not None:
            counts.append((shape.experts.shared_ffn_hidden_size, "the shared expert's intermediate size"))
    for count, name in counts:
        if count % tensor:
            allowed = [t for t in (1, 2, 4, 8, 16, 32) if count % t == 0]
            problems.append(
                f"{where}: {section}.tensor={tensor} does not divide {name}={count}; it can be one of {allowed}"
            )
    if shape.num_layers % pipeline:
        allowed = [p for p in range(1, shape.num_layers + 1) if shape.num_layers % p == 0]
        problems.append(
            f"{where}: {section}.pipeline={pipeline} does not divide num_hidden_layers={shape.num_layers}; "
            f"it can be one of {allowed}"
        )
    if shape.num_heads % tensor == 0:
        problems += _context(shape.num_heads // tensor, grid, where, section)
    return problems


def _context(heads: int, grid: GridConfig, where: str, section: str) -> list[str]:
    if grid.context_scheme != "ulysses" or heads % grid.context == 0:
        return []
    allowed = [c for c in range(1, heads + 1) if heads % c == 0]
    return [
        f"{where}: {section}.context={grid.context} does not divide the {heads} attention heads of a tensor rank "
        f"(num_attention_heads={heads * grid.tensor} / {section}.tensor={grid.tensor}), which ulysses shares "
        f"out; it can be one of {allowed}, or set {section}.context_scheme=gather"
    ]


def check_sampled_ids(vocab_sizes: Mapping[str, int], policy: str) -> list[str]:
    """Why models cannot read every id that a policy may sample, one sentence each.

    Args:
        vocab_sizes: configuration key -> rows of the embedding.
        policy: the key of the model that samples.
    """
    sampled = vocab_sizes[policy]
    return [
        f"{where} has vocab_size={size} and {policy}, whose samples it reads, {sampled}: it has no row for ids from "
        f"{size} on; resize its embedding to {sampled} rows (transformers' resize_token_embeddings)"
        for where, size in vocab_sizes.items()
        if size < sampled
    ]


def check_experts(
    trained: Mapping[str, ModelShape], parallel: ParallelConfig, moe_aux_loss_coef: float
) -> list[str]:
    """Why mixtures of experts cannot be trained as configured, one sentence each.

    Args:
        trained: role -> shape of the models that have an optimizer.
    """
    mixtures = [role for role, shape in trained.items() if shape.experts is not None]
    problems = []
    for role in mixtures:
        grid, section = parallel.grid_of(role), parallel.key_of(role)
        if grid.tensor > 1 and not grid.sequence:
            problems.append(
                f"models.{role} has experts, which Megatron trains over {section}.tensor={grid.tensor} ranks only with "
                f"sequence parallelism; set {section}.sequence=true"
            )
    if moe_aux_loss_coef and not mixtures:
        problems.append(
            f"models.moe_aux_loss_coef={moe_aux_loss_coef} has no effect: no trained model has experts; remove it"
        )
    return problems
