"""What every part of a recipe shares: unknown keys, and keys that the others leave without effect, are refused."""

import json
from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know, and keys that it would ignore.

    Example:
        class SamplingConfig(Section): max_response_tokens: int = 1024
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def unread(self) -> Mapping[str, str]:
        """Keys that the others leave without effect, each with where that is so and what to do about it."""
        return {}

    @model_validator(mode="after")
    def _refuse_unread(self) -> Self:
        values = dict(self)
        for name, why in self.unread().items():
            if values[name] != type(self).model_fields[name].default:
                raise ValueError(f"{name}={json.dumps(values[name])} has no effect {why}")
        return self


def unread_keys(section: Section, prefix: str = "") -> set[str]:
    """Dotted keys of a section, and of the sections in it, that the others leave without effect."""
    parts = [(name, part) for name, part in section if isinstance(part, Section)]
    own = {f"{prefix}{name}" for name in section.unread()}
    return own.union(*(unread_keys(part, f"{prefix}{name}.") for name, part in parts))
