"""Why a model cannot be built or trained in a layout, said before anything is built."""

from collections.abc import Iterable, Mapping

from rto_megatron.config.training import (
    FP8_MULTIPLE,
    FrozenPrecisionConfig,
    GridConfig,
    KernelsChoice,
    ParallelConfig,
)
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.shape import ModelShape


def check_layout(shape: ModelShape, grid: GridConfig, where: str, section: str = "parallel") -> list[str]:
    """Why this model cannot be cut as a grid says, one sentence each; empty when it can.

    Args:
        where: the model's key.
        section: the key of the section with the grid.
    """
    not_run = FAMILIES[shape.family].not_run
    if not_run is not None:
        return [f"{where}: no {shape.family} model can be built here: {not_run}"]
    problems = []
    counts = [(shape.num_heads, "num_attention_heads")]
    if shape.experts is None or not shape.is_uniform:  # else no layer has a network of this size
        counts.append((shape.ffn_hidden_size, "intermediate_size"))
    if shape.experts is not None and shape.experts.shared_ffn_hidden_size is not None:
        counts.append((shape.experts.shared_ffn_hidden_size, "the shared expert's intermediate size"))
    for count, name in counts:
        problems += _undivided(count, name, grid.tensor, f"{where}: {section}.tensor", _POWERS)
    problems += _key_value_heads(shape, grid.tensor, f"{where}: {section}.tensor")
    if shape.experts is not None:
        size, key = shape.experts.ffn_hidden_size, "tensor" if grid.expert_tensor is None else "expert_tensor"
        problems += _undivided(
            size, "an expert's intermediate size", grid.expert_cut, f"{where}: {section}.{key}", _POWERS
        )
        num = shape.experts.num
        problems += _undivided(
            num, "the number of experts", grid.expert, f"{where}: {section}.expert", range(1, num + 1)
        )
        if grid.expert > 1 and grid.tensor > 1 and not grid.sequence:
            problems.append(
                f"{where} has experts on different ranks ({section}.expert={grid.expert}), which over {section}.tensor="
                f"{grid.tensor} ranks needs sequence parallelism; set {section}.sequence=true"
            )
    problems += _stages(shape.num_layers, grid, where, section)
    if shape.num_heads % grid.tensor == 0:
        problems += _context(shape.num_heads // grid.tensor, grid, where, section)
    return problems


_POWERS = (1, 2, 4, 8, 16, 32)


def _stages(layers: int, grid: GridConfig, where: str, section: str) -> list[str]:
    """Whether the layers of a model can be shared by the stages of a grid, and by the chunks of each."""
    pipeline, virtual, stages = grid.pipeline, grid.virtual, grid.stages
    chunks = pipeline * virtual
    product = f"{where}: {section}.pipeline x {section}.virtual = {pipeline} x {virtual} = {chunks}"
    if stages is not None and layers < chunks:
        key, most = ("pipeline", layers) if layers < pipeline else ("virtual", layers // pipeline)
        return [
            f"{product} chunks have a layer each at least, and num_hidden_layers={layers}; set {section}.{key} to "
            f"{most} at most"
        ]
    if isinstance(stages, tuple):
        if sum(stages) == layers:
            return []
        return [
            f"{where}: {section}.stages={list(stages)} has {sum(stages)} layers, and num_hidden_layers={layers}; it "
            f"can be {_nearest(stages, layers)}, or auto"
        ]
    if stages == "auto" or layers % chunks == 0:
        return []
    auto = f", or set {section}.stages=auto" if layers >= chunks else ""
    if layers % pipeline:
        return [
            problem + auto
            for problem in _undivided(
                layers, "num_hidden_layers", pipeline, f"{where}: {section}.pipeline", range(1, layers + 1)
            )
        ]
    each = layers // pipeline
    allowed = [number for number in range(1, each + 1) if each % number == 0]
    return [
        f"{product} does not divide num_hidden_layers={layers}; {section}.virtual can be one of {allowed}{auto}"
    ]


def _nearest(stages: tuple[int, ...], layers: int) -> list[int]:
    """The stages with layers added where there are fewest, or taken where there are most, until all are shared out."""
    found = list(stages)
    while sum(found) != layers:
        step = 1 if sum(found) < layers else -1
        found[found.index(min(found) if step > 0 else max(found))] += step
    return found


def _undivided(count: int, name: str, parts: int, key: str, choices: Iterable[int]) -> list[str]:
    if count % parts == 0:
        return []
    allowed = [number for number in choices if count % number == 0]
    return [f"{key}={parts} does not divide {name}={count}; it can be one of {allowed}"]


def check_kernels(shapes: Mapping[str, ModelShape], kernels: KernelsChoice) -> list[str]:
    """Why models cannot have the layers that a recipe asks for, one sentence each.

    Args:
        shapes: role -> shape.
    """
    if kernels != "transformer_engine":
        return []
    return [
        f"models.{role}: {shape.family} models have layers of their own ({', '.join(parts)}), in whose place "
        "TransformerEngine's cannot be; set precision.kernels=auto or torch"
        for role, shape in shapes.items()
        if (parts := own_layer_parts(shape))
    ]


def check_fp8(
    shapes: Mapping[str, ModelShape], precision: FrozenPrecisionConfig, parallel: ParallelConfig
) -> list[str]:
    """Why layers of models cannot be products in 8 bits, one sentence each.

    Args:
        shapes: role -> shape.
    """
    if not precision.fp8:
        return []
    problems = [
        f"models.{role}: the experts of a mixture get rows of any length, and products in 8 bits need multiples of "
        f"{FP8_MULTIPLE}; set precision.fp8=false"
        for role, shape in shapes.items()
        if shape.experts is not None
    ]
    for role, shape in shapes.items():
        tensor = parallel.grid_of(role).tensor
        sizes = {
            "hidden_size": (shape.hidden_size, 1),
            "intermediate_size": (shape.ffn_hidden_size, tensor),
            "num_attention_heads x head_dim": (shape.num_heads * shape.head_dim, tensor),
            "num_key_value_heads x head_dim": (
                shape.num_kv_heads * shape.head_dim,
                min(tensor, shape.num_kv_heads),
            ),
        }
        problems += [
            f"models.{role}: {name}={size} over {parts} tensor ranks are no multiple of {FP8_MULTIPLE}, which products "
            f"in 8 bits need; lower {parallel.key_of(role)}.tensor, or set precision.fp8=false"
            for name, (size, parts) in sizes.items()
            if size % (parts * FP8_MULTIPLE)
        ]
    return problems


def own_layer_parts(shape: ModelShape) -> list[str]:
    """What of a model needs modules of this package or of the family, so that no other layers can stand for them."""
    parts = [name for name in shape.own_parts if name in _PARTS_OF_LAYERS]
    rotation = {"windowed_theta": shape.rotation.windowed_theta, "longrope": shape.rotation.longrope}
    parts += [name for name, value in rotation.items() if value is not None]
    return parts if FAMILIES[shape.family].layer_spec is None else [*parts, "layer_spec"]


_PARTS_OF_LAYERS = ("norms", "has_shifted_norms", "has_whole_qk_norm", "residual_scale", "score_softcap")


def _key_value_heads(shape: ModelShape, tensor: int, key: str) -> list[str]:
    """Whole heads lie on every rank, or one head on several, which hold equal parts of the rows of q, k and v."""
    heads, groups = shape.num_heads, shape.num_kv_heads
    rows = (heads + 2 * groups) * shape.head_dim

    def fits(size: int) -> bool:
        may_share = not shape.has_whole_qk_norm and size % groups == 0
        return groups % size == 0 or (may_share and rows % size == 0)

    if fits(tensor):
        return []
    allowed = [size for size in _POWERS if heads % size == 0 and fits(size)]
    reason = f"does not divide num_key_value_heads={groups} and is no multiple of it"
    if tensor % groups == 0 and shape.has_whole_qk_norm:
        reason = f"is above num_key_value_heads={groups}, over all of which {shape.family} has one norm"
    elif tensor % groups == 0:
        reason = f"is above num_key_value_heads={groups}, and does not divide the {rows} rows of q, k and v"
    return [f"{key}={tensor} {reason}; it can be one of {allowed}"]


def idle_expert_keys(shapes: Mapping[str, ModelShape], parallel: ParallelConfig) -> list[str]:
    """Where layouts spread or cut experts, and no model has any, one sentence each.

    Args:
        shapes: role -> shape of all models that the stage loads.
    """
    problems = []
    for section in dict.fromkeys(parallel.key_of(role) for role in shapes):
        roles = [role for role in shapes if parallel.key_of(role) == section]
        grid = parallel.grid_of(roles[0])
        if any(shapes[role].experts is not None for role in roles):
            continue
        keys = {"expert": None if grid.expert == 1 else grid.expert, "expert_tensor": grid.expert_tensor}
        problems += [
            f"{section}.{key}={value} has no effect: no model of this layout ({', '.join(roles)}) has experts; "
            "remove it"
            for key, value in keys.items()
            if value is not None
        ]
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


def check_sampled_ids(vocab_sizes: Mapping[str, int]) -> list[str]:
    """Why models cannot read every id that the policy may sample, one sentence each.

    Args:
        vocab_sizes: configuration key -> rows of the embedding.
    """
    sampled = vocab_sizes["models.policy"]
    return [
        f"{where} has vocab_size={size} and models.policy, whose samples it reads, {sampled}: it has no row for ids "
        f"from {size} on; resize its embedding to {sampled} rows (transformers' resize_token_embeddings)"
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
        if grid.tensor > 1 and grid.expert == 1 and not grid.sequence:
            problems.append(
                f"models.{role} has experts, which Megatron trains over {section}.tensor={grid.tensor} ranks only with "
                f"sequence parallelism; set {section}.sequence=true"
            )
    if moe_aux_loss_coef and not mixtures:
        problems.append(
            f"models.moe_aux_loss_coef={moe_aux_loss_coef} has no effect: no trained model has experts; remove it"
        )
    return problems
