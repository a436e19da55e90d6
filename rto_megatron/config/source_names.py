"""What `data.train` and its kin name: local files, folders, patterns of files, data sets of the hub, and mixtures."""

import re
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, Field

from rto_megatron.section import Section

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".csv.gz")
_WORD = r"[\w.-]+"
_SPLIT = r"\w+(?:\[-?\d*%?:-?\d*%?\](?:\(\w+\))?)?"
_HUB = re.compile(
    rf"(?P<name>{_WORD}(?:/{_WORD})?)(?::(?P<config>{_WORD}))?:(?P<split>{_SPLIT}(?:\+{_SPLIT})*)"
)
_ENTRY = "a path, or {source: a path, weight: how often a pass over all reads its rows}"


class HubSet(NamedTuple):
    """A data set of the hub; its split is what datasets.load_dataset takes, so it may be a slice or a sum.

    Example:
        HubSet("openai/gsm8k", config="main", split="train[:10%]")
    """

    name: str
    config: str | None
    split: str


def hub_set(source: str) -> HubSet | None:
    """What `owner/name:split` and `owner/name:config:split` name; None: the source is no such name."""
    found = _HUB.fullmatch(source)
    if found is None or found["name"].endswith(SUFFIXES):
        return None
    return HubSet(found["name"], found["config"], found["split"])


def is_pattern(source: str) -> bool:
    """Whether a source that is no existing path stands for the files that match it."""
    return any(sign in source for sign in "*?[") and hub_set(source) is None


def absolute(source: str) -> str:
    """A source that does not depend on the working directory; names of the hub stay as they are."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() or is_pattern(source) else source


class MixturePart(Section):
    """One of the sources of a mixture.

    Example:
        {source: code.jsonl, weight: 0.5}
    """

    source: str = Field(min_length=1)
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="how often a pass over the mixture reads each row; 0.5: half of them, the next pass the others",
    )


def parts_of(sources: "str | tuple[MixturePart, ...]") -> tuple[MixturePart, ...]:
    """The parts of a mixture; a name alone is one of a single part."""
    return (MixturePart(source=sources),) if isinstance(sources, str) else sources


def shown(sources: "str | tuple[MixturePart, ...]") -> str:
    """All names, for messages."""
    return ", ".join(part.source for part in parts_of(sources))


def _checked(given: object) -> object:
    """Lists of names and of sections, as parts; what is no such list is refused in one sentence."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list | tuple):
        raise ValueError(f"expected a path, a name of the hub, or a list of them, each {_ENTRY}")
    if not given:
        raise ValueError("the list names no source; add one")
    entries = [_entry(number, entry) for number, entry in enumerate(given)]
    names = [entry.source for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{', '.join(twice)}: named twice; name it once, with a weight to read it more often"
        )
    return tuple(entries)


def _entry(number: int, entry: object) -> MixturePart:
    if isinstance(entry, MixturePart):
        return entry
    keys = {"source": entry} if isinstance(entry, str) else entry
    if not isinstance(keys, dict) or not isinstance(keys.get("source"), str) or not keys["source"]:
        raise ValueError(f"entry {number} is {entry!r:.60}, expected {_ENTRY}")
    if unknown := sorted(map(str, keys.keys() - MixturePart.model_fields.keys())):
        raise ValueError(f"entry {number} has the keys {', '.join(unknown)}, expected {_ENTRY}")
    weight = keys.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 100:
        raise ValueError(
            f"entry {number} has the weight {weight!r:.60}, expected a number above 0, at most 100"
        )
    return MixturePart(source=keys["source"], weight=weight)


def _unweighted(sources: object) -> object:
    """Held-out rows are read once each: a mean over them would otherwise depend on weights."""
    if isinstance(sources, tuple) and any(part.weight != 1 for part in sources):
        raise ValueError("held-out rows are read once each; remove the weights")
    return sources


def _read_once(given: object) -> object:
    return _unweighted(_checked(given))


Sources = Annotated[str | tuple[MixturePart, ...], BeforeValidator(_checked), Field(min_length=1)]
HeldOutSources = Annotated[str | tuple[MixturePart, ...], BeforeValidator(_read_once), Field(min_length=1)]
