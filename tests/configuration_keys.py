"""The keys of the configuration, on which its size is counted."""

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel


def stage_keys(stage: type[BaseModel]) -> set[str]:
    """Every dotted key of a stage; a section counts wherever it stands: in a list, a mapping, or a union."""
    keys = set()
    for name, info in stage.model_fields.items():
        sections = list(_sections_in(info.annotation))
        keys |= (
            {f"{name}.{key}" for section in sections for key in stage_keys(section)} if sections else {name}
        )
    return keys


def _sections_in(kind: object) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    else:
        for inner in get_args(kind):
            yield from _sections_in(inner)
