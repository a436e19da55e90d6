"""A parsed config.json and the refusals that model families share."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto_megatron.errors import ModelFolderError
from rto_megatron.models.model_folder import misnamed

NAMED_WEIGHTS = "transformers_weights"  # the file of weights that transformers loads before any other


@dataclass(frozen=True)
class HfConfig:
    """A parsed config.json that knows where it came from, for errors.

    Example:
        HfConfig(folder / "config.json", {"model_type": "llama"}).refuse("it has no weights")
    """

    path: Path
    values: dict[str, Any]  # of JSON, checked where it is read

    @property
    def rope(self) -> dict[str, object]:
        """How positions are rotated: transformers 5 says it in rope_parameters, earlier versions in rope_scaling."""
        return self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}

    @property
    def rope_theta(self) -> float | None:
        """The base of the rotation, which transformers 5 keeps inside rope_parameters; null: not said."""
        rope: dict[str, Any] = self.rope
        return rope.get("rope_theta") or self.values.get("rope_theta")

    def require(self, *keys: str) -> None:
        """Raises ModelFolderError: a key is absent or null."""
        missing = [key for key in keys if self.values.get(key) is None]
        if missing:
            family = self.values.get("model_type")
            raise ModelFolderError(
                f"{self.path} has no {', '.join(missing)}; expected the config.json of a {family} model"
            )

    def refuse(self, reason: str) -> None:
        """Raises ModelFolderError: the model cannot be expressed, for `reason`."""
        raise ModelFolderError(f"{self.path}: {reason}")

    def refuse_set(self, *keys: str) -> None:
        """Raises UserError: one of these switches is on, and the family here does not have it."""
        found = [key for key in keys if self.values.get(key)]
        if found:
            self.refuse(f"{found} is set; the {self.values['model_type']} family here has no such part")

    def refuse_short_window(self, window: int | None) -> None:
        """Raises UserError: a sliding window cuts off positions that the model may have."""
        longest = self.values["max_position_embeddings"]
        if window is not None and window < longest:
            self.refuse(
                f"sliding_window={window} is below max_position_embeddings={longest}; attention here sees every "
                f"earlier token. Texts of at most {window} tokens are the same with and without it: set "
                f"max_position_embeddings={window} in a copy of config.json to use the model for those"
            )


def read_config(folder: Path) -> HfConfig:
    """Parses `folder`/config.json.

    Raises:
        ModelFolderError: it is absent, not JSON, or not an object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(misnamed(folder))
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # JSON, or UTF-8
        raise ModelFolderError(f"{path} is not valid JSON ({error}); fetch or write it again") from error
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path} holds a JSON {type(config).__name__}, expected an object")
    return HfConfig(path, config)
