"""The true reward of the synthetic task, where a stage knows it."""

from collections.abc import Sequence
from pathlib import Path

from rto_megatron.data.tokenizer import tokenizer_fingerprint
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.errors import DataError
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Metrics, Rollout


def known_reward(key: str, path: Path | None, setup: Setup) -> TrueReward | None:
    """The table that the configuration names, in the ids of the policy's tokenizer; None: it names none.

    Args:
        key: of the recipe, for errors.

    Raises:
        DataError: it is missing, damaged or of another tokenizer.
    """
    if path is None:
        return None
    table = TrueReward.load(path)
    folder = setup.sources["policy"].hf_folder
    if tokenizer_fingerprint(folder) != table.tokenizer_fingerprint:
        raise DataError(
            f"{key}: {path} was written for another tokenizer than the one in {folder}; name the table of the task "
            f"that the policy was trained on"
        )
    return table


def true_return(rollouts: Sequence[Rollout], table: TrueReward | None) -> Metrics:
    """Sum of the true token rewards, mean over this rank's responses; nothing without a table."""
    if table is None:
        return {}
    returns = [table.returns(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    return {"task/true_return": (sum(returns), float(len(returns)))}
