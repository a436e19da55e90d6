"""The padding token of a reward model or critic: one that never ends a sequence, in config.json and tokenizer.

transformers reads a score at the last token whose id is not the padding token's. Where that is the end-of-sequence
token, it reads one token earlier than training did, and gets another score.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.messages import Message
from rto_megatron.data.tokenizer import load_plain_tokenizer
from rto_megatron.data.vocabulary import template_text, written_ids
from rto_megatron.platform.whole_files import write_whole

# Before a user's turn, to see what a template writes.
_TURNS = ((), (Message("system", "a"),), (Message("tool", "a"),))
# Words in the names of tokens that were made to be given away.
_SPARE_NAMES = ("reserved", "unused", "extra", "dummy", "control")


def separate_padding(folder: Path, used_ids: Collection[int]) -> str | None:
    """Keeps a padding token that no sequence ends with, else takes an unused special token, else leaves none.

    Args:
        folder: with config.json and the tokenizer of a model with a scalar head; its files are changed.
        used_ids: that texts hold, as far as they are known.

    Returns:
        What was changed and why; None: the padding token stays.

    Raises:
        UserError: no tokenizer could be loaded.
    """
    tokenizer = load_plain_tokenizer(folder)
    config = _read(folder / "config.json")
    num_rows = config["vocab_size"]
    problem = _problem(tokenizer, num_rows)
    if problem is None:
        _write_ids(folder, tokenizer.pad_token_id)
        return None
    taken = {*used_ids} | _ends(config) | _ends(_read(folder / "generation_config.json"))
    free = {
        token: text for token, text in _unused(tokenizer).items() if token < num_rows and token not in taken
    }
    configured = config.get("pad_token_id")
    token = min(free, key=lambda token: _rank(free[token], token, configured), default=None)
    _write_ids(folder, token)
    _write_tokens(folder, token, None if token is None else free[token])
    if token is None:
        return (
            f"warning: {folder}: padding is null, as {problem} and the tokenizer has no unused special token: "
            "transformers scores one sequence at a time with this model and refuses batches, vLLM takes both; for "
            "batches add a padding token to the model that training starts from, and resize its embedding"
        )
    return f"{folder}: padding is {free[token]!r} (id {token}), which nothing else writes, as {problem}"


def _problem(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> str | None:
    if tokenizer.pad_token_id is None:
        return "there was none"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return f"{tokenizer.pad_token!r} ends sequences"
    if tokenizer.pad_token_id >= num_rows:
        return f"{tokenizer.pad_token!r} (id {tokenizer.pad_token_id}) has no row in the embedding"
    return None


def _ends(config: dict[str, Any]) -> set[int]:
    ends = config.get("eos_token_id")
    return {*ends} if isinstance(ends, list) else set() if ends is None else {ends}


def _unused(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of special tokens without a task: no role of the tokenizer, and not of the chat template."""
    template = template_text(tokenizer)
    named = {text for role, text in tokenizer.special_tokens_map.items() if role != "pad_token"}
    # A template may put a token's text together from parts.
    written = {*tokenizer.encode("")}.union(*(written_ids(tokenizer, turns) for turns in _TURNS))
    return {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special
        and token not in written
        and added.content not in named
        and added.content not in template
    }


def _rank(text: str, token: int, configured: int | None) -> tuple[bool, bool, bool, int]:
    """The model's own choice first, then tokens named for padding, then those that are kept in reserve."""
    name = text.lower()
    return token != configured, "pad" not in name, not any(word in name for word in _SPARE_NAMES), token


def _write_ids(folder: Path, token: int | None) -> None:
    _change(folder / "config.json", lambda config: {**config, "pad_token_id": token})
    _change(
        folder / "generation_config.json",
        lambda config: {**config, "pad_token_id": token} if "pad_token_id" in config else config,
    )


def _write_tokens(folder: Path, token: int | None, text: str | None) -> None:
    # Null is written, not left out: classes of tokenizers have a padding token of their own to fall back to.
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        path.write_text("{}")
    _change(path, lambda config: {**config, "pad_token": text})
    _change(
        folder / "special_tokens_map.json",
        lambda names: {**names, "pad_token": text} if "pad_token" in names else names,
    )
    _change(folder / "tokenizer.json", lambda state: {**state, "padding": _padding(state, token, text)})


def _padding(state: dict[str, Any], token: int | None, text: str | None) -> dict[str, Any] | None:
    padding = state.get("padding")
    return None if padding is None or token is None else {**padding, "pad_id": token, "pad_token": text}


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _change(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Writes the file anew, if it is there and the change is one."""
    before = _read(path)
    after = change(before)
    if path.is_file() and after != before:
        write_whole(path, json.dumps(after, indent=2))
