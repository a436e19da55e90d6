"""Prompts of the rule-following task: a subject to write about, and three rules that the row holds for the reward."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from rto_megatron.errors import DataError
from rto_megatron.experiments.language.rules import FORBIDDEN, asked, with_rule, without_rule, words_rule
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.rewards.sample import Json

SYSTEM = "You write one short sentence."
_REQUESTS = (
    "Write about {}.", "Tell me something about {}.", "Describe {}.", "Say what you like about {}.",
    "Give me a thought on {}.", "Tell a friend about {}.",
)  # fmt: skip
_SUBJECTS = (
    "rivers", "mountains", "the sea", "forests", "the desert", "rain", "snow", "summer", "winter", "the moon",
    "stars", "dogs", "cats", "horses", "birds", "bees", "fish", "whales", "elephants", "gardens", "apples",
    "bread", "cheese", "coffee", "tea", "soup", "rice", "cooking", "markets", "farms", "villages", "cities",
    "trains", "ships", "bridges", "bicycles", "planes", "roads", "maps", "travel", "music", "painting",
    "theatre", "films", "books", "poems", "letters", "languages", "schools", "teachers", "doctors", "friends",
    "families", "grandparents", "children", "games", "chess", "football", "running", "swimming", "sleep",
    "dreams", "clocks", "mirrors", "windows", "candles", "fire", "ice", "gold", "glass", "stones", "paper",
    "numbers", "computers", "telephones", "radio", "history", "museums", "castles", "islands", "volcanoes",
    "storms", "clouds", "rainbows", "flowers", "trees", "roses", "mushrooms", "honey", "salt", "shoes", "hats",
    "coats", "kitchens", "chairs", "silence", "laughter", "courage", "patience", "luck",
)  # fmt: skip
_WORDS = (
    "water", "people", "old", "small", "always", "light", "home", "slowly", "green", "world", "morning", "quiet",
    "hand", "strong", "under", "many", "time", "alone", "warm", "deep",
)  # fmt: skip
_LEAST = (6, 8, 10)
_ROOM = (6, 10)  # between the least and the most words


def write_prompts(folder: Path, train: int, test: int, seed: int) -> tuple[Path, Path]:
    """Writes prompts_train.jsonl and prompts_test.jsonl; returns their paths. No prompt stands in both, or twice.

    Raises:
        DataError: there are fewer different prompts than asked for, or the folder holds others than these.
    """
    rows = list(_rows(train + test, seed))
    paths = folder / "prompts_train.jsonl", folder / "prompts_test.jsonl"
    texts = ["".join(json.dumps(row) + "\n" for row in own) for own in (rows[:train], rows[train:])]
    for path, text in zip(paths, texts, strict=True):
        if path.exists() and path.read_bytes() != text.encode():
            raise DataError(f"{path} holds other prompts; name another folder, or remove it first")
    for path, text in zip(paths, texts, strict=True):
        write_whole(path, text)
    return paths


def _rows(count: int, seed: int) -> Iterator[dict[str, Json]]:
    most = len(_REQUESTS) * len(_SUBJECTS) * len(_LEAST) * len(_ROOM) * len(FORBIDDEN) * len(_WORDS)
    if count > most:
        raise DataError(f"{count} prompts were asked for, and there are {most} different ones; ask for fewer")
    draw, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        least = draw.choice(_LEAST)
        rules = [
            words_rule(least, least + draw.choice(_ROOM)),
            without_rule(draw.choice(FORBIDDEN)),
            with_rule(draw.choice(_WORDS)),
        ]
        request = draw.choice(_REQUESTS).format(draw.choice(_SUBJECTS))
        first, second, third = (asked(rule) for rule in rules)
        text = f"{request} {first.capitalize()}, {second}, and {third}."
        if text in seen:
            continue
        seen.add(text)
        messages: list[Json] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        yield {"prompt_id": f"rules-{seed}-{len(seen)}", "prompt": messages, "rules": list[Json](rules)}
