"""Whether the responses of a micro-batch to one prompt share what a model computes of it."""

from typing import Literal

from rto_megatron.config.facts import facts_of
from rto_megatron.config.schema import EvaluateStage, Stage


def has_shared_prompts(config: Stage) -> bool:
    """Whether a stage reads several responses to one prompt as a rule."""
    facts = facts_of(config)
    if isinstance(config, EvaluateStage):
        return config.evaluate.num_samples > 1
    return facts.reads_pairs or (facts.online is not None and facts.online.algorithm.samples_per_prompt > 1)


def why_prompts_repeat(config: Stage, kernels: Literal["torch", "transformer_engine", "auto"]) -> str | None:
    """What has every response computed with a prompt of its own; None: a prompt is computed once.

    Args:
        kernels: what computes the layers; `auto` where that is not known yet.
    """
    if not config.batch.share_prompts:
        return "batch.share_prompts=false"
    if not config.batch.packed:
        return "batch.packed=false, rows of one sequence each"
    if config.parallel.context > 1:
        return f"parallel.context={config.parallel.context} cuts rows anywhere"
    if kernels == "transformer_engine" and config.precision.dtype != "fp32":
        return "TransformerEngine's attention has no keys of several sequences"
    if config.models.moe_aux_loss_coef:
        return (
            "models.moe_aux_loss_coef weighs how often experts are chosen, prompts of all responses counted"
        )
    return None
