"""Overrides of the command line, `a.b=value`: text is taken as it is written, everything else is YAML.

Whether a value is text, the type of its key says: names, paths and choices are text, and so are `vars`. In text `#`,
`:`, quotes and brackets mean themselves, for a shell has read the quotes already. A bare `null` is none, and `${a.b}`
is the value of another key, as in a recipe; a `$` before anything else is a dollar, and `\\${` is a plain `${`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigIndexError
from pydantic import BaseModel

from rto_megatron.errors import RecipeError

VARIABLES = "vars"
_BATCH = "batch"
_RIVALS = ("micro", "tokens")  # of the section: a recipe sets one
_LISTS = ("data.train", "data.eval", "data.pretrain")  # text, or a list of texts and sections
_OPENING = r"(\\*)\$\{"
_NAMES_A_KEY = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True)
class Override:
    """One `key=value`, not yet read.

    Example:
        Override(key="optimizer.lr", value="1e-6")
    """

    key: str
    value: str


def split(override: str) -> Override:
    """Cuts at the first `=`.

    Raises:
        RecipeError: there is none, or no dotted key before it.
    """
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(
            f"{override!r}: an override is written key=value with a dotted key, as in optimizer.lr=1e-6"
        )
    return Override(key, value)


def as_override(key: str, value: Path | str) -> str:
    """The override that gives `key`, one of text, exactly this value, whatever characters it holds."""
    return f"{key}={escaped(str(value))}"


def escaped(text: str) -> str:
    """`text` so that a recipe or an override reads it back: no `${` in it names a key."""
    return re.sub(_OPENING, lambda found: found[1] * 2 + r"\${", text)


def interpolations(text: str) -> list[str]:
    """What stands in every `${...}` of a value that is no escaped one."""
    return [found[2] for found in re.finditer(_OPENING + r"([^}]*)\}", text) if len(found[1]) % 2 == 0]


def merged(recipe: DictConfig, overrides: Sequence[Override], text: frozenset[str]) -> DictConfig:
    """The recipe with its overrides, not yet resolved.

    Args:
        text: the keys whose values are text, beside the variables.

    Raises:
        OmegaConfBaseException, YAMLError: a value cannot be read, or a key of a value is asked for a part.
        RecipeError: an override names an entry that a list does not have.
    """
    tree = recipe.copy()
    for one in overrides:
        read = _read(one, text)
        try:
            tree.merge_with(read)
        except TypeError:
            # A list and a section do not merge: the override is of one entry of a list, or of the other kind.
            _put(tree, one.key, OmegaConf.select(read, one.key))
    return tree


def _put(tree: DictConfig, key: str, value: object) -> None:
    """Makes `value` what stands at `key`, of which a part may be the number of a list's entry."""
    try:
        OmegaConf.update(tree, key, value, merge=False)
    except (TypeError, ValueError, ConfigIndexError):
        raise RecipeError(
            f"command line: {key}: names no entry of a list in the recipe; entries are counted from 0: name one "
            "that is there, or give the list as a whole, in quotes, as in 'rewards=[{kind: model, weight: 0.5}]'"
        ) from None


def without_rivals(recipe: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """The recipe without the keys that exclude one which an override sets.

    Raises:
        OmegaConfBaseException, YAMLError: an override cannot be read.
    """
    of_batch = [one for one in overrides if one.key.split(".")[0] == _BATCH]
    given = _written(merged(OmegaConf.create({}), of_batch, frozenset()))
    tree = recipe.copy()
    for key, rival in (_RIVALS, _RIVALS[::-1]):
        if given.get(key) is not None and rival not in given and rival in _written(recipe):
            OmegaConf.update(tree, f"{_BATCH}.{rival}", None)
    return tree


def _written(tree: DictConfig) -> dict[str, object]:
    """The keys of the section that has rivals, as they are written."""
    plain = OmegaConf.to_container(tree, resolve=False)
    section = plain.get(_BATCH) if isinstance(plain, dict) else None
    return {str(key): value for key, value in section.items()} if isinstance(section, dict) else {}


def _read(override: Override, text: frozenset[str]) -> DictConfig:
    if not is_variable(override.key) and override.key not in text:
        return OmegaConf.from_dotlist([f"{override.key}={override.value}"])
    tree = OmegaConf.create({})
    value = None if override.value == "null" else _with_dollars(override.value)
    OmegaConf.update(tree, override.key, value)
    return tree


def _with_dollars(value: str) -> str:
    """Escapes each `${` that neither names a key, nor asks for what no recipe may have, nor is escaped."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if len(found[1]) % 2 else escaped(found[0])

    return re.sub(_OPENING + r"(?![\w.]+\}|[^}]*:[^}]*\})", escape, value)


def is_variable(key: str) -> bool:
    """Whether the key is one of the recipe's own names."""
    return key.startswith(f"{VARIABLES}.")


def is_whole_reference(value: object) -> bool:
    """Whether a value is another key's, with nothing around it."""
    return isinstance(value, str) and _NAMES_A_KEY.fullmatch(value) is not None


def typed(value: str) -> object:
    """What YAML makes of a value: a variable's, where it is all of a number, a truth value or a list."""
    tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={escaped(value)}"]))
    assert isinstance(tree, dict)
    return tree["value"]


def as_lists(overrides: Sequence[Override]) -> frozenset[str]:
    """The keys that are given a list on the command line, as `data.train=[a.jsonl,b.jsonl]`; a file of that name is
    none."""
    given = (one for one in overrides if one.key in _LISTS and one.value.startswith("["))
    return frozenset(one.key for one in given if not Path(one.value).exists())


def text_keys(stage: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a stage whose values are text."""
    for name, field in stage.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from text_keys(kind, f"{prefix}{name}.")
        elif _is_text(kind):
            yield f"{prefix}{name}"


def _is_text(kind: object) -> bool:
    origin = get_origin(kind)
    if origin is Annotated:
        return _is_text(get_args(kind)[0])
    if origin is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    if origin in (Union, UnionType):
        kinds = [one for one in get_args(kind) if one is not NoneType and not _is_sources(one)]
        return bool(kinds) and all(map(_is_text, kinds))
    return isinstance(kind, type) and issubclass(kind, str | Path)


def _is_sources(kind: object) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[0] is not int
