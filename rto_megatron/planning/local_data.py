"""What `rto check` and `rto doctor` say of a recipe's data files, as far as they are on this machine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rto_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rto_megatron.config.schema import Stage
    from rto_megatron.types import EndOfSequence


@dataclass(frozen=True)
class LookedAt:
    """What was found at one key of the configuration.

    Example:
        LookedAt("data.train", "does not exist", is_problem=True)
    """

    key: str
    found: str
    is_problem: bool = False


def look_at(config: "Stage") -> list[LookedAt]:
    """One entry a source of rows; those of the hub and of other machines are not looked at."""
    from rto_megatron.data.limits import limits_of
    from rto_megatron.data.look import NUM_ROWS, data_sources, look

    sources = data_sources(config)
    try:
        limits_of(config)  # wrong wherever the data are
    except UserError as error:
        return [LookedAt("data", str(error), is_problem=True)]
    try:
        tokenizer, eos = (
            policy_tokenizer(config) if any(data.absence is None for data in sources) else (None, None)
        )
    except UserError as error:
        return [LookedAt("models.policy", str(error), is_problem=True)]
    by = "with the policy's tokenizer" if tokenizer else "layout alone, as the policy's tokenizer is not here"
    looked = []
    for data in sources:
        if data.absence is not None:
            looked.append(LookedAt(data.key, f"{data.source}: {data.absence}, not looked at"))
            continue
        try:
            found = look(config, data, tokenizer, eos)
        except UserError as error:
            looked.append(LookedAt(data.key, f"of the first {NUM_ROWS} rows, {by}: {error}", is_problem=True))
        else:
            looked.append(LookedAt(data.key, f"of the first {NUM_ROWS} rows, {by}: {found}"))
    return looked


def policy_tokenizer(config: "Stage") -> "tuple[PreTrainedTokenizerBase | None, EndOfSequence | None]":
    """The policy's and what ends its answers, if it is on this machine."""
    from rto_megatron.data.eos import read_eos
    from rto_megatron.data.tokenizer import has_tokenizer, load_tokenizer
    from rto_megatron.models.config_files import read_shape
    from rto_megatron.planning.shapes import hugging_face_folder

    try:
        folder = hugging_face_folder(config.models.policy)
    except UserError:
        return None, None  # a hub model, or an earlier stage that has not run yet
    is_here = has_tokenizer(folder) or (folder / "tokenizer_config.json").is_file()
    if not is_here:
        return None, None
    tokenizer = load_tokenizer(folder)
    return tokenizer, read_eos(folder, tokenizer, read_shape(folder).vocab_size)[0]
