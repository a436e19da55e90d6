"""The tokens that end a sequence: the tokenizer's, and those at which transformers and vLLM stop a model.

Both read the latter from generation_config.json, or from config.json where there is none.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.errors import ModelFolderError
from rto_megatron.types import EndOfSequence

GENERATION_CONFIG = "generation_config.json"


def own_eos(tokenizer: PreTrainedTokenizerBase) -> EndOfSequence:
    """The tokenizer's alone."""
    written = int(tokenizer.eos_token_id)
    return EndOfSequence((written,), written)


def read_eos(
    folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[EndOfSequence, list[str]]:
    """What ends a sequence of the model in a Hugging Face folder, and warnings about ids that cannot.

    An id beyond the vocabulary cannot be sampled, and one of ordinary text would end sentences in their middle: they
    are left out.

    Args:
        folder: with config.json and the tokenizer.
        tokenizer: of the folder.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: eos_token_id is no id and no list of ids.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        path = folder / "config.json"
    named, own = _ids(path), own_eos(tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    usable = [token for token in named if token in special and 0 <= token < vocab_size]
    ids = tuple(dict.fromkeys([own.written, *usable]))
    odd = [token for token in named if token not in ids]
    warnings = [
        f"warning: {path}: eos_token_id names {odd}, which are no special tokens of the tokenizer within "
        f"vocab_size={vocab_size}: they end nothing here, but do in transformers and vLLM; remove them"
    ]
    return EndOfSequence(ids, own.written), warnings if odd else []


def with_eos(value: object, eos: EndOfSequence) -> int | list[int]:
    """The eos_token_id of a file with all of `eos` added: what stands there stays, and stays first."""
    known = [value] if isinstance(value, int) else list(value) if isinstance(value, list) else []
    ids = list(dict.fromkeys([*known, *eos.ids]))
    return ids[0] if len(ids) == 1 else ids


def _ids(path: Path) -> list[int]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{path} is no JSON ({error}); restore it") from error
    found = values.get("eos_token_id") if isinstance(values, dict) else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ModelFolderError(
            f"{path}: eos_token_id is {found!r:.80}, expected a token id or a list of token ids"
        )
    return ids
