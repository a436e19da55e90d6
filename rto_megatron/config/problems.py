"""What is wrong with a configuration, in words: place, value found, what is allowed, the nearest name."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from rto_megatron.config.rewards import KINDS
from rto_megatron.config.schema import STAGES


@dataclass(frozen=True)
class Origin:
    """Where a key's value comes from: a line of the recipe or an override on the command line.

    Example:
        Origin(Path("rto.yaml"), {"run.steps": 7}, frozenset()).of("run.steps")
    """

    recipe: Path
    lines: Mapping[str, int]  # dotted key -> line of the recipe
    overridden: frozenset[str]

    def of(self, key: str) -> str:
        """The place of `key`, or of its nearest parent that is written down."""
        parts = key.split(".")
        while parts:
            dotted = ".".join(parts)
            if dotted in self.overridden:
                return "command line"
            if dotted in self.lines:
                return f"{self.recipe}:{self.lines[dotted]}"
            if any(key.startswith(f"{dotted}.") for key in self.overridden):  # a section of overrides alone
                return "command line"
            parts.pop()
        return str(self.recipe)


def describe(error: ErrorDetails, stage: type[BaseModel], origin: Origin) -> str:
    """One line for one pydantic error: place, dotted key, value found, what is allowed, nearest name."""
    if error["loc"][:1] == ("rewards",) and len(error["loc"]) > 1:
        return _describe_reward(error, origin)
    names = [part for part in error["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in error["loc"])
    parent = _section(stage, names[:-1])
    place = origin.of(key)
    if error["type"] == "missing":
        return f"{place}: {key}: is missing; {_allowed(parent, names[-1])}"
    if error["type"] == "extra_forbidden":
        readers = [name for name, other in STAGES.items() if _has(other, names)]
        if readers:
            return f"{place}: {key}: found {_short(error['input'])}; only the stages {', '.join(readers)} read it"
        siblings = list(parent.model_fields)
        prefix = ".".join(names[:-1])
        hint = suggestion(names[-1], siblings, prefix) or _elsewhere(names[-1], stage)
        allowed = hint or f"; allowed here: {', '.join(siblings)}"
        return f"{place}: {key}: found {_short(error['input'])}; there is no such key{allowed}"
    return f"{place}: {key}: {_rule(error)}"


def _describe_reward(error: ErrorDetails, origin: Origin) -> str:
    """As `describe`, of an entry of the list `rewards`, whose keys depend on its kind."""
    number, *rest = error["loc"][1:]
    kind = KINDS.get(str(rest[0])) if rest else None
    entry = f"rewards.{number}"
    if error["type"].startswith("union_tag"):
        found = error.get("ctx", {}).get("tag")
        hint = suggestion(str(found), KINDS)
        return f"{origin.of(entry)}: {entry}.kind: found {found!r}; must be one of {', '.join(KINDS)}{hint}"
    key = ".".join([entry, *map(str, rest[1:])])
    place = origin.of(key)
    if kind is None:
        return f"{place}: {key}: found {_short(error['input'])}; expected a section with a key `kind`"
    if error["type"] == "missing":
        return f"{place}: {key}: is missing; {_allowed(kind, str(rest[-1]))}"
    if error["type"] == "extra_forbidden":
        allowed = (
            suggestion(str(rest[-1]), kind.model_fields, entry)
            or f"; allowed here: {', '.join(kind.model_fields)}"
        )
        return f"{place}: {key}: found {_short(error['input'])}; kind {rest[0]} has no such key{allowed}"
    return f"{place}: {key}: {_rule(error)}"


def _rule(error: ErrorDetails) -> str:
    if error["type"] == "path_type":  # pydantic names Python's class
        return f"found {_short(error['input'])}; must be a path"
    rule = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    hint = suggestion(str(error["input"]), _choices(error)) if error["type"] == "literal_error" else ""
    return f"found {_short(error['input'])}; {rule}{hint}"


def suggestion(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` for the candidate nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {prefix + '.' if prefix else ''}{near[0]}?" if near else ""


def all_keys(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a nested mapping with the values of its leaves.

    A list yields its key once per entry; an entry that is a mapping yields its own keys behind its number.
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from all_keys(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    yield from all_keys(entry, f"{prefix}{name}.{number}.")
                else:
                    yield f"{prefix}{name}", entry
        else:
            yield f"{prefix}{name}", value


def truth_values(given: object, read: object, key: str = "") -> Iterator[str]:
    """Dotted keys of a tree at which a truth value stands and a number was read: `yes` is no number of steps.

    Args:
        given: what a recipe says.
        read: what was made of it.
    """
    prefix = f"{key}." if key else ""
    if isinstance(given, bool) and not isinstance(read, bool):
        yield key
    elif isinstance(given, Mapping) and isinstance(read, Mapping):
        for name, value in given.items():
            yield from truth_values(value, read.get(name), f"{prefix}{name}")
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for number, (value, one) in enumerate(zip(given, read, strict=True)):
            yield from truth_values(value, one, f"{prefix}{number}")


def _section(stage: type[BaseModel], names: list[str]) -> type[BaseModel]:
    section = stage
    for name in names:
        field = section.model_fields.get(name)
        if (
            field is None
            or not isinstance(field.annotation, type)
            or not issubclass(field.annotation, BaseModel)
        ):
            break
        section = field.annotation
    return section


def _has(section: type[BaseModel], names: list[str]) -> bool:
    field = section.model_fields.get(names[0])
    if field is None or len(names) == 1:
        return field is not None
    kind = field.annotation
    return isinstance(kind, type) and issubclass(kind, BaseModel) and _has(kind, names[1:])


def _allowed(section: type[BaseModel], name: str) -> str:
    field = section.model_fields[name]
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        return f"a section with the keys {', '.join(field.annotation.model_fields)}"
    return (
        field.description
        or f"give a value of type {field.annotation.__name__ if field.annotation else 'any'}"
    )


def _elsewhere(name: str, stage: type[BaseModel]) -> str:
    for section_name, field in stage.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields:
            return f"; did you mean {section_name}.{name}?"
    return ""


def _choices(error: ErrorDetails) -> list[str]:
    expected = str(error.get("ctx", {}).get("expected", ""))
    return [choice.strip(" '") for choice in expected.replace(" or ", ",").split(",")]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
