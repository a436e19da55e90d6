"""The rows of a source that cannot be used: alike ones are told once, with the places of all."""

import re
from dataclasses import dataclass, field

_SHOWN = 20  # reasons, and places of one reason


@dataclass
class BadRows:
    """Grows while a source is read.

    Example:
        bad = BadRows()
        bad.add("pairs.jsonl:7", "column 'chosen' is missing")
    """

    number: int = 0
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> `where` of each row

    def add(self, where: str, message: str) -> None:
        """One row more; `message` may begin with its place."""
        self.number += 1
        self.places.setdefault(message.removeprefix(f"{where}: "), []).append(where)

    def told(self, limit: int = _SHOWN) -> list[str]:
        """A line a reason, `limit` at most, and one on how many rows are not in them."""
        lines = [_line(reason, places) for reason, places in list(self.places.items())[:limit]]
        others = sum(len(places) for places in list(self.places.values())[limit:])
        return [*lines, f"and {others} more rows"] if others else lines


def _line(reason: str, places: list[str]) -> str:
    line = f"{places[0]}: {reason}"
    if len(places) == 1:
        return line
    # A place ends in its number, see `Row`; of another file it is named whole.
    file = _file(places[0])
    others = [place.removeprefix(file) if _file(place) == file else place for place in places[1 : _SHOWN + 1]]
    more = len(places) - 1 - len(others)
    return f"{line}; alike: {', '.join(others)}" + (f" and {more} more" if more else "")


def _file(place: str) -> str:
    return re.sub(r"\d+$", "", place)
