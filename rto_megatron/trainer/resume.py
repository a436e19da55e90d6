"""What a run may change between its attempts, and what it may not."""

from pathlib import Path

from rto_megatron.config import schema
from rto_megatron.errors import UserError
from rto_megatron.parallel.collectives import Json

# Where and how a run is computed, watched and stored, not what it computes. `run.steps` is the exception: it may
# grow, and the learning-rate schedule of the steps still to do follows the new length.
_FREE = (
    "run.dir",
    "run.steps",
    "run.collective_timeout_s",
    "run.save_every",
    "run.keep_checkpoints",
    "run.max_skipped_updates",
    "run.async_save",
    "run.resume_from_older",
    "run.eval_every",
    "run.samples_every",
    "parallel",
    "precision.recompute",
    "batch.micro",
    "batch.packed",
    "data.eval",
    "data.eval_samples",
    "data.true_reward",
    "models.allow_unverified_reference",
    "rollout",
)


# Mappings whose entries a recipe names: they are compared as a whole, so that one that came or went is seen.
_WHOLE = ("data.template",)


def fixed_keys(config: schema.Stage) -> dict[str, Json]:
    """Dotted key -> value of everything that every attempt of a run must share."""
    return {
        key: value for key, value in _flat(config.model_dump(mode="json"), "").items() if not _is_free(key)
    }


def _flat(tree: dict[str, Json], prefix: str) -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) and key not in _WHOLE else {key: value}
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def require_same(saved: Json, wanted: dict[str, Json], run_dir: Path) -> None:
    """Refuses to go on with a run under another configuration; keys that only one side knows are not compared.

    Args:
        saved: `fixed_keys` of the attempt that wrote the checkpoint.
        wanted: `fixed_keys` of this one.

    Raises:
        UserError: lists every key with both values.
    """
    before = saved if isinstance(saved, dict) else {}
    changes = [
        f"  {key}: {before[key]!r} in the checkpoint, {value!r} in the configuration"
        for key, value in wanted.items()
        if key in before and before[key] != value
    ]
    if changes:
        raise UserError(
            f"{run_dir} holds a checkpoint of a run that was configured differently:\n"
            + "\n".join(changes)
            + "\nset these keys back to resume it, or name another run.dir to start a new run"
        )
