"""What single tokens spell, as they do in the middle of a text."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


class TokenText:
    """The text of single tokens, with the space before a word where the token has one.

    Example:
        TokenText(decode, anchor=5)(17) == " world"
    """

    def __init__(self, decode: Decode, anchor: int) -> None:
        """Takes a token of a letter as `anchor`: some tokenizers drop a leading space, but not behind another token."""
        self._decode = decode
        self._anchor = anchor
        self._before = decode([anchor])
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """The text of one token; a part of a character is the replacement character."""
        if token not in self._known:
            text = self._decode([self._anchor, token])
            self._known[token] = (
                text.removeprefix(self._before) if text.startswith(self._before) else self._decode([token])
            )
        return self._known[token]
