"""Where transformers reads the score of an answer: at the last token that is not config.json's padding token.

This program reads it at the end-of-sequence token, and trains reward models so. Others train them on all that a chat
template writes, some with that token as padding.
"""

import json
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.chat import encode_text
from rto_megatron.data.messages import Conversation, Message
from rto_megatron.data.template import ChatTemplate
from rto_megatron.errors import UserError

_EXCHANGE = Conversation((Message("user", "a"), Message("assistant", "a")))


def read_elsewhere(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where that is, if not at end-of-sequence; None: there.

    Args:
        folder: with config.json of a reward model or critic, whose tokenizer is `tokenizer`.
    """
    padding = json.loads((folder / "config.json").read_text()).get("pad_token_id")
    end, name = tokenizer.eos_token_id, f"the end-of-sequence token {tokenizer.eos_token!r}"
    ids = _written(tokenizer)
    behind = ids[len(ids) - ids[::-1].index(end) :] if end in ids else ()
    if read := [token for token in behind if token != padding]:
        return f"at {tokenizer.decode(read[-1:])!r}, which the chat template writes behind {name}"
    return f"one token before {name}, which is the padding token of config.json" if padding == end else None


def _written(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of a rendered exchange; none without a template that takes it."""
    if tokenizer.chat_template is not None:
        with suppress(UserError):
            return tuple(
                encode_text(tokenizer, ChatTemplate(tokenizer).text(_EXCHANGE, False, "an exchange"))
            )
    return ()
