"""reasoning-gym as a reward function, and as a writer of prompts: rows hold the task's entry, by which it is scored."""

import json
from collections.abc import Iterator

import reasoning_gym
from reasoning_gym.utils import extract_answer

from rto_megatron.errors import RecipeError
from rto_megatron.rewards.sample import Json, Sample

COLUMN = "reasoning_gym"  # {"task": name, "entry": what the task generated}


def score(sample: Sample, answer_tag: str | None) -> float:
    """What the task's own verifier gives the answer, 0 to 1; 0 without an answer.

    Args:
        answer_tag: the answer stands in <TAG>...</TAG>; None: it is the whole response.

    Raises:
        ValueError: the row is none of `rows`.
    """
    row = sample.columns.get(COLUMN)
    entry = row.get("entry") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(entry, dict):
        raise ValueError(
            f"the row has no column {COLUMN!r} with a task and its entry, only {sorted(sample.columns)}; write prompts "
            "with `rto reasoning-gym`"
        )
    return _verified(str(row["task"]), entry, answer_of(sample.response, answer_tag))


def answer_of(response: str, answer_tag: str | None) -> str | None:
    """The answer in a response; None: there is no such tag."""
    if answer_tag is None:
        return response.strip()
    found: str | None = extract_answer(response, tag_name=answer_tag)
    return found


def rows(task: str, size: int, seed: int, options: dict[str, Json]) -> Iterator[dict[str, Json]]:
    """Prompts of a task, as data.train takes them.

    Args:
        options: of the task, as reasoning-gym names them.

    Raises:
        RecipeError: there is no such task or option, or its entries cannot be kept as JSON.
    """
    if task not in reasoning_gym.factory.DATASETS:
        raise RecipeError(
            f"reasoning-gym has no task {task!r}; it has {', '.join(reasoning_gym.factory.DATASETS)}"
        )
    try:
        entries = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"task {task} of reasoning-gym does not take these options: {error}") from error
    for number, entry in enumerate(entries):
        try:
            kept = json.loads(json.dumps(entry))
        except TypeError as error:
            raise RecipeError(
                f"task {task}: its entries cannot be kept as JSON ({error}); take another task"
            ) from error
        answer = kept["answer"]
        if answer is not None and _verified(task, kept, answer) != _verified(task, entry, answer):
            raise RecipeError(
                f"task {task}: its verifier does not know its entries again as JSON; take another task"
            )
        yield {
            "prompt_id": f"{task}-{seed}-{number}",
            "prompt": entry["question"],
            "answer": answer,
            "response": answer,  # what SFT learns
            COLUMN: {"task": task, "entry": kept},
        }


def _verified(task: str, entry: dict[str, Json], answer: str | None) -> float:
    verify = reasoning_gym.get_score_answer_fn(task)
    return float(verify(answer=answer, entry=entry))
