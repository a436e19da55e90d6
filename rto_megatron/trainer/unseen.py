"""Prompts that no step trains on, and the responses to them with what measured each: one JSON object a line."""

import json
from collections.abc import Mapping, Sequence
from itertools import batched, zip_longest
from pathlib import Path

from rto_megatron.config import schema
from rto_megatron.config.rewards import reads_columns
from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.errors import DataError
from rto_megatron.lifecycle.start_up import begin_part
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Prompt, Rewards, Rollout

UNSEEN = "eval/"  # before the ids of held-out prompts of a run that trains on others


def load_unseen(config: schema.Rewarded, setup: Setup) -> tuple[Prompt, ...]:
    """The prompts of `data.eval` for all replicas, with the columns that rewards read; all ranks must call it.

    Raises:
        DataError: on every rank; there are fewer than replicas.
    """
    begin_part("data")
    data, columns = config.data, reads_columns(config.rewards)
    assert data.eval is not None
    loaded = setup.prepared.prompts(data.eval, data.eval_samples, columns)
    setup.admit(loaded)
    if len(loaded.items) < setup.topology.data_size:
        raise DataError(
            f"data.eval: {len(loaded.items)} prompts cannot be shared by {setup.topology.data_size} replicas; raise "
            "data.eval_samples, name more prompts, or start fewer ranks"
        )
    return tuple(loaded.items)


def numbers_of(rewards: Rewards) -> dict[str, list[float]]:
    """`score`, and `reward/NAME` of every source, of each response."""
    given = {f"reward/{name}": given_B.tolist() for name, given_B in rewards.given.items()}
    return {"score": rewards.score_B.tolist(), **given}


def keep_rows(
    path: Path,
    drawn: Sequence[Rollout],
    numbers: Mapping[str, Sequence[float]],
    num_samples: int,
    setup: Setup,
) -> None:
    """Writes the responses of all replicas in the order of the prompts; all ranks must call it.

    Args:
        drawn: of this replica, which has every n-th prompt.
        numbers: name -> one of each response.
        num_samples: responses to each prompt.
    """
    own: list[dict[str, str | float]] = [
        {
            "prompt_id": rollout.prompt_id.removeprefix(UNSEEN),
            "prompt": setup.decode(rollout.prompt_ids),
            # As a text that others may train on: what ended it is written again by whoever reads it.
            "response": str(setup.tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)),
            "finish_reason": rollout.finish_reason,
            **{name: values[place] for name, values in numbers.items()},
        }
        for place, rollout in enumerate(drawn)
    ]
    groups = [list(group) for group in batched(own, num_samples)]
    shares = setup.topology.gather(groups, list[list[dict[str, str | float]]])
    if setup.topology.is_lead:
        make_run_folder(path.parent)
        dealt = [group for turn in zip_longest(*shares, fillvalue=[]) for group in turn]
        rows = [row for group in dealt for row in group]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
