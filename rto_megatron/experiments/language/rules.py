"""The rules of a prompt, and what a text earns by them. Imports nothing heavy: it runs in a reward's own process.

A rule is met in part: one that forbids loses a third for each of its first three faults, one that demands is met or
not. The reward is the mean over the rules of a prompt, 0 to 1. Nothing here knows whether a text makes sense.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from rto_megatron.errors import DataError
from rto_megatron.rewards.sample import Json, Sample

FAULTS_PAID = 3  # of one rule; more change nothing
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_FORBIDDEN: Mapping[str, tuple[str, re.Pattern[str]]] = {
    "commas": ("do not use commas", re.compile(",")),
    "the": ('do not use the word "the"', re.compile(r"\bthe\b", re.IGNORECASE)),
    "and": ('do not use the word "and"', re.compile(r"\band\b", re.IGNORECASE)),
    "capitals": ("write everything in small letters", re.compile(r"\b[^\W\d_a-z]\w*")),
    "long words": ("use no word of more than seven letters", re.compile(r"\b[^\W\d_]{8,}\b")),
}
FORBIDDEN = tuple(_FORBIDDEN)


@dataclass(frozen=True)
class Verdict:
    """What one rule says of a text.

    Example:
        Verdict(share=2 / 3, free=1.0, paid=((17, -1 / 3),))
    """

    share: float  # of the rule that is met, 0 to 1
    free: float  # what a text has before its first word: 1 of a rule that forbids
    paid: tuple[tuple[int, float], ...] = field(
        default=()
    )  # (number of characters before it, what it adds to `free`)


def words_rule(least: int, most: int) -> dict[str, Json]:
    """The text has so many words."""
    return {"kind": "words", "least": least, "most": most}


def without_rule(what: str) -> dict[str, Json]:
    """The text has none of one of `FORBIDDEN`."""
    return {"kind": "without", "what": what}


def with_rule(word: str) -> dict[str, Json]:
    """The text has this word, in whatever letters."""
    return {"kind": "with", "word": word}


def asked(rule: Mapping[str, Json]) -> str:
    """The rule in words, for the prompt.

    Raises:
        DataError: there is no such rule.
    """
    match rule:
        case {"kind": "words", "least": least, "most": most}:
            return f"use {least} to {most} words"
        case {"kind": "without", "what": str(what)} if what in _FORBIDDEN:
            return _FORBIDDEN[what][0]
        case {"kind": "with", "word": word}:
            return f'use the word "{word}"'
    raise _unknown(rule)


def judge(text: str, rule: Mapping[str, Json]) -> Verdict:
    """How far a text keeps a rule, and where it earned or lost.

    Raises:
        DataError: there is no such rule.
    """
    match rule:
        case {"kind": "words", "least": int(least), "most": int(most)}:
            ends = [word.end() for word in _WORD.finditer(text)]
            missing = [len(text) + 1] * max(0, least - len(ends))  # charged to the token that ended the text
            return _forbidding([*ends[most:], *missing])
        case {"kind": "without", "what": str(what)} if what in _FORBIDDEN:
            return _forbidding([fault.end() for fault in _FORBIDDEN[what][1].finditer(text)])
        case {"kind": "with", "word": str(word)}:
            found = re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
            return Verdict(0.0, 0.0) if found is None else Verdict(1.0, 0.0, ((found.end(), 1.0),))
    raise _unknown(rule)


def _unknown(rule: Mapping[str, Json]) -> DataError:
    return DataError(f"rule {rule!r}: expected kind words, without ({', '.join(FORBIDDEN)}) or with")


def _forbidding(faults: Sequence[int]) -> Verdict:
    paid = tuple((place, -1 / FAULTS_PAID) for place in faults[:FAULTS_PAID])
    return Verdict(1 - len(paid) / FAULTS_PAID, 1.0, paid)


def kept(sample: Sample) -> float:
    """The reward of a response: the mean share of the rules that it keeps."""
    return _mean(sample, lambda verdict: verdict.share)


def credit(sample: Sample) -> list[float]:
    """The same reward by token, less what an empty response has of rules that forbid: their sum is `kept` less that."""
    text, rules = _text(sample), _rules(sample)
    ends = list(accumulate(len(piece) for piece in sample.tokens))
    paid = [0.0] * len(sample.tokens)
    for rule in rules:
        for place, amount in judge(text, rule).paid:
            token = next((number for number, end in enumerate(ends) if place <= end), len(paid) - 1)
            paid[token] += amount / len(rules)
    return paid


def free(sample: Sample) -> float:
    """What `credit` leaves out: the share of a prompt's rules that forbid."""
    return _mean(sample, lambda verdict: verdict.free)


def _mean(sample: Sample, of: Callable[[Verdict], float]) -> float:
    rules = _rules(sample)
    return sum(of(judge(_text(sample), rule)) for rule in rules) / len(rules)


def _text(sample: Sample) -> str:
    """The response, cut as its tokens are; a token that ends it is no text."""
    pieces = sample.tokens[:-1] if sample.finish_reason == "stop" else sample.tokens
    return "".join(pieces)


def _rules(sample: Sample) -> list[Mapping[str, Json]]:
    rules = sample.columns.get("rules")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise DataError(
            f"prompt {sample.prompt_id}: its row has no list of rules (found {rules!r}); write prompts by `rto rules`"
        )
    return [rule for rule in rules if isinstance(rule, dict)]
