"""Responses to held-out prompts, with what measured them: one JSON object a line, for people who read them."""

import json
from collections.abc import Mapping, Sequence
from itertools import batched, zip_longest
from pathlib import Path

from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Rewards, Rollout

UNSEEN = "eval/"  # before the ids of held-out prompts of a run that trains on others


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
            "response": setup.decode(rollout.response_ids),
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
