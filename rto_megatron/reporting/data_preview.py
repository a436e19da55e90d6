"""What a stage reads, for people: examples token by token, lengths, and what became of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.load_report import Loaded
from rto_megatron.types import Demonstration, Example, JudgedResponse, PreferencePair, Prompt

_BINS = 10
_BAR = 40  # characters of the longest
_LEARNT, _READ = "bold green", "dim"


@dataclass(frozen=True)
class Stretch:
    """Tokens one after another that are alike.

    Example:
        Stretch(ids=(88, 2), is_learnt=True)
    """

    ids: tuple[int, ...]
    is_learnt: bool


def stretches(example: Example) -> list[tuple[str, list[Stretch]]]:
    """The sequences of an example, by what they are, each cut where learnt tokens begin and end."""
    match example:
        case Prompt():
            return [("prompt", [Stretch(example.token_ids, False)])]
        case PreferencePair():
            prompt = Stretch(example.prompt_ids, False)
            answers = (("chosen", example.chosen_ids), ("rejected", example.rejected_ids))
            return [(name, [prompt, Stretch(ids, True)]) for name, ids in answers]
        case JudgedResponse():
            verdict = "desirable" if example.is_desirable else "undesirable"
            return [(verdict, [Stretch(example.prompt_ids, False), Stretch(example.response_ids, True)])]
        case Demonstration():
            return [("demonstration", _of_demonstration(example))]


def _of_demonstration(example: Demonstration) -> list[Stretch]:
    found, place = [Stretch(example.prompt_ids, False)], 0
    for first, end in example.skipped:
        found += [
            Stretch(example.response_ids[place:first], True),
            Stretch(example.response_ids[first:end], False),
        ]
        place = end
    return [one for one in (*found, Stretch(example.response_ids[place:], True)) if one.ids]


def print_preview(
    console: Console, key: str, loaded: Loaded[Example], tokenizer: PreTrainedTokenizerBase, num_examples: int
) -> None:
    """Prints the report of a source, its first examples and the lengths of all that were read."""
    console.rule(key)
    console.print(loaded.report.summary(), markup=False, highlight=False)
    for example in loaded.items[:num_examples]:
        for name, parts in stretches(example):
            learnt = sum(len(part.ids) for part in parts if part.is_learnt)
            total = sum(len(part.ids) for part in parts)
            console.print(
                f"\n{example.id}: {name}, {total} tokens, {learnt} learnt", markup=False, highlight=False
            )
            console.print(
                _spelt(parts, tokenizer, console.color_system is not None), highlight=False, soft_wrap=True
            )
    console.print(_lengths(loaded.items))


def _spelt(parts: Sequence[Stretch], tokenizer: PreTrainedTokenizerBase, has_colours: bool) -> Text:
    """Each stretch as the tokenizer spells its tokens, special ones included."""
    text = Text()
    for part in parts:
        spelt = str(tokenizer.decode(list(part.ids), skip_special_tokens=False))
        marked = spelt if has_colours or not part.is_learnt else f"⟦{spelt}⟧"
        text.append(marked, style=_LEARNT if part.is_learnt else _READ)
    return text


def _lengths(examples: Sequence[Example]) -> Table:
    """A histogram of the sequences' lengths in tokens, with how much of them is learnt."""
    pairs = [
        (sum(len(part.ids) for part in parts), sum(len(part.ids) for part in parts if part.is_learnt))
        for example in examples
        for _, parts in stretches(example)
    ]
    longest = max(total for total, _ in pairs)
    width = -(-longest // _BINS)
    bins = [[pair for pair in pairs if (pair[0] - 1) // width == number] for number in range(_BINS)]
    most = max(map(len, bins))
    table = Table(title=f"{len(pairs)} sequences, {sum(t for t, _ in pairs)} tokens, the longest {longest}")
    for name, justify in (("tokens", "right"), ("sequences", "right"), ("", "left"), ("learnt", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for number, held in enumerate(bins):
        tokens, learnt = (sum(pair[place] for pair in held) for place in (0, 1))
        bar = "█" * -(-_BAR * len(held) // most)
        share = f"{learnt / tokens:.0%}" if tokens else ""
        table.add_row(f"{number * width + 1}-{(number + 1) * width}", str(len(held)), bar, share)
    return table
