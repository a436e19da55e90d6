"""Rollouts in a file: those drawn ahead of the step that a checkpoint stands at."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rto_megatron.errors import DataError
from rto_megatron.types import Rollout


def rollout_lines(rollouts: Iterable[Rollout]) -> str:
    """A line of JSON for each rollout; numbers come back from it bit for bit."""
    return "".join(json.dumps(asdict(rollout)) + "\n" for rollout in rollouts)


def load_rollouts(path: Path) -> list[Rollout]:
    """Reads a file of `rollout_lines`.

    Raises:
        DataError: a line is no rollout.
    """
    rollouts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            rollouts.append(
                Rollout(
                    prompt_id=row["prompt_id"],
                    prompt_ids=tuple(row["prompt_ids"]),
                    response_ids=tuple(row["response_ids"]),
                    sampled_logprobs=tuple(row["sampled_logprobs"]),
                    finish_reason=row["finish_reason"],
                    weight_version=row["weight_version"],
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is not a recorded rollout ({error}); record it again"
            ) from error
    return rollouts
