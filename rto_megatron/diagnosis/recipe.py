"""The recipe's models, data and precision: models fit each other and read the same tokens; files can be read."""

from rto_megatron.config.kl_gap import drowned_coefficients
from rto_megatron.config.schema import Stage
from rto_megatron.diagnosis.finding import Finding
from rto_megatron.planning.local_data import look_at
from rto_megatron.platform.cpu_products import multiplies_bf16, slow_dtype
from rto_megatron.platform.device import prepare

_SPARE = (
    "a text that spells such a token ends the stage before its first step",
    "resize the embedding, or leave it where no text spells them",
)


def check_models(config: Stage, world_size: int) -> list[Finding]:
    """What a stage checks before its first step, without building a model.

    Raises:
        UserError: names every model that is missing.
    """
    prepare(config.precision)  # megatron.core, imported below, must find its patches in place
    from rto_megatron.data.tokenizer import load_tokenizer
    from rto_megatron.engine.source import find_sources
    from rto_megatron.planning.token_ids import spare_token_warnings
    from rto_megatron.trainer.setup import setup_problems

    sources = find_sources(config)
    why, fix = "the stage would end with this message", "do as it says"
    problems = [
        Finding("models", "problem", text, why, fix) for text in setup_problems(config, sources, world_size)
    ]
    fits = f"{', '.join(sources)}: here, with equal tokenizers; layout, batches and lengths fit {world_size} ranks"
    if problems:
        return problems
    spare = spare_token_warnings(load_tokenizer(sources["policy"].hf_folder), sources)
    return [Finding("models", "ok", fits), *(Finding("models", "warning", text, *_SPARE) for text in spare)]


def check_data(config: Stage) -> list[Finding]:
    """Reads the first rows of every local file."""
    why, fix = "the stage would end with this message", "do as it says"
    return [
        Finding("data", "problem", f"{looked.key}: {looked.found}", why, fix)
        if looked.is_problem
        else Finding("data", "ok", f"{looked.key}: {looked.found}")
        for looked in look_at(config)
    ]


def check_precision(config: Stage) -> list[Finding]:
    """Whether KL coefficients stand out from what the recipe's dtype rounds away, and a CPU multiplies in it."""
    import torch

    why, fix = "KL estimates of such a run are noise, and can be negative", "do as it says"
    found = [Finding("precision", "warning", text, why, fix) for text in drowned_coefficients(config)]
    slow = None if torch.cuda.is_available() else slow_dtype(config.precision.dtype, multiplies_bf16())
    if slow is not None:
        found.append(Finding("precision", "warning", slow, "a step of hours in place of minutes", fix))
    return found
