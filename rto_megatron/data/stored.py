"""Examples in files that all ranks of a machine map into memory: four bytes a token, once.

Legend: N examples of a shard, S sequences of each (prompt, answers). A shard is a folder with
    tokens.bin      int32: the ids of all sequences, one behind another
    bounds.npy      int64 [N S + 1]: where each begins
    numbers.npy     float64 [N]: margin, verdict
    rows.npy        int64 [N]: the number of the row among all rows that were read, ascending
    texts.bin       UTF-8: the name of each example and what else it has, as JSON
    text_bounds.npy int64 [2 N + 1]: where each begins
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self, cast, overload

import numpy

from rto_megatron.data.batches import Fingerprinted, digest_of
from rto_megatron.types import Demonstration, Example, JudgedResponse, PreferencePair, Prompt

_KIND = "kind.json"
_SEQUENCES = {"prompt": 1, "demonstration": 2, "pair": 3, "judged": 3}
_AT_A_TIME = 1 << 22  # tokens


class ExampleWriter[T: Example]:
    """Writes examples of one kind into a folder; without any there is none.

    Example:
        with ExampleWriter(folder) as writer: writer.add(0, Prompt("p7", (1, 529, 3)))
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kind: str | None = None
        self._bounds, self._text_bounds = array("q", [0]), array("q", [0])
        self._numbers, self._rows = array("d"), array("q")

    def __enter__(self) -> Self:
        self._folder.mkdir()
        self._tokens = (self._folder / "tokens.bin").open("wb")
        self._texts = (self._folder / "texts.bin").open("wb")
        return self

    def add(self, row: int, example: T) -> None:
        """One example more, of the row with that number."""
        self._kind, sequences, number, extra = _parts(example)
        for ids in sequences:
            self._tokens.write(array("i", ids))
            self._bounds.append(self._bounds[-1] + len(ids))
        for text in (example.id.encode(), extra.encode()):
            self._texts.write(text)
            self._text_bounds.append(self._text_bounds[-1] + len(text))
        self._numbers.append(number)
        self._rows.append(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._texts.close()
        arrays = {
            "bounds": self._bounds,
            "text_bounds": self._text_bounds,
            "numbers": self._numbers,
            "rows": self._rows,
        }
        for name, values in arrays.items():
            numpy.save(self._folder / f"{name}.npy", numpy.array(values))
        (self._folder / _KIND).write_text(json.dumps(self._kind))


class _Shard:
    def __init__(self, folder: Path, kind: str) -> None:
        self._num_sequences = _SEQUENCES[kind]
        self._kind = kind
        self.tokens = numpy.memmap(folder / "tokens.bin", numpy.int32, "r")
        self._texts = numpy.memmap(folder / "texts.bin", numpy.uint8, "r")
        self._bounds, self._text_bounds, self._numbers, self.rows = (
            numpy.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("bounds", "text_bounds", "numbers", "rows")
        )

    def example(self, number: int) -> Example:
        first = number * self._num_sequences
        bounds = self._bounds[first : first + self._num_sequences + 1].tolist()
        sequences = tuple(tuple(self.tokens[a:b].tolist()) for a, b in pairwise(bounds))
        a, b, c = self._text_bounds[2 * number : 2 * number + 3].tolist()
        name, extra = (bytes(self._texts[x:y]).decode() for x, y in ((a, b), (b, c)))
        return _example(self._kind, name, sequences, float(self._numbers[number]), extra)


class StoredExamples[T: Example](Fingerprinted[T]):
    """Examples in the order of their rows, each made when it is asked for.

    Example:
        StoredExamples.opened(folder)[0]
    """

    def __init__(self, shards: Sequence[_Shard], facts: tuple[str, frozenset[int]] | None) -> None:
        """See `opened`."""
        self._facts = facts
        self._shards = tuple(shards)
        rows = numpy.concatenate([numpy.empty(0, numpy.int64), *(shard.rows for shard in shards)])
        ends = numpy.cumsum([len(shard.rows) for shard in shards])
        # The place of each example among those of all shards, in the order of rows.
        self._order = numpy.argsort(rows, kind="stable")
        self._ends = ends.tolist()

    @classmethod
    def opened(cls, folder: Path, facts: tuple[str, frozenset[int]] | None = None) -> Self:
        """The examples of the shards of a folder.

        Args:
            facts: digest and vocabulary of the examples, where they are known.
        """
        folders = sorted(folder.glob("shard_*"))
        kinds = [json.loads((shard / _KIND).read_text()) for shard in folders]
        return cls([_Shard(shard, kind) for shard, kind in zip(folders, kinds, strict=True) if kind], facts)

    @property
    def digest(self) -> str:
        """See `Fingerprinted`."""
        return digest_of(self) if self._facts is None else self._facts[0]

    @property
    def vocabulary(self) -> frozenset[int]:
        """See `Fingerprinted`."""
        if self._facts is not None:
            return self._facts[1]
        found: set[int] = set()
        for shard in self._shards:
            for first in range(0, len(shard.tokens), _AT_A_TIME):
                found.update(numpy.unique(shard.tokens[first : first + _AT_A_TIME]).tolist())
        return frozenset(found)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return tuple(self._at(place) for place in self._order[index].tolist())
        return self._at(int(self._order[index]))

    def _at(self, place: int) -> T:
        shard = bisect_right(self._ends, place)
        before = self._ends[shard - 1] if shard else 0
        example = self._shards[shard].example(place - before)
        return cast(T, example)


def _parts(example: Example) -> tuple[str, tuple[tuple[int, ...], ...], float, str]:
    match example:
        case Prompt():
            columns = json.dumps(dict(example.columns)) if example.columns else ""
            return "prompt", (example.token_ids,), 0.0, columns
        case Demonstration():
            skipped = json.dumps(example.skipped) if example.skipped else ""
            return "demonstration", (example.prompt_ids, example.response_ids), 0.0, skipped
        case PreferencePair():
            sequences = (example.prompt_ids, example.chosen_ids, example.rejected_ids)
            return "pair", sequences, example.margin, ""
        case JudgedResponse():
            sequences = (example.prompt_ids, example.response_ids, example.unrelated_ids)
            return "judged", sequences, float(example.is_desirable), ""


def _example(
    kind: str, name: str, sequences: tuple[tuple[int, ...], ...], number: float, extra: str
) -> Example:
    """The example of which `_parts` are these."""
    match kind:
        case "prompt":
            return Prompt(name, sequences[0], json.loads(extra) if extra else {})
        case "demonstration":
            skipped = tuple((first, end) for first, end in json.loads(extra or "[]"))
            return Demonstration(name, sequences[0], sequences[1], skipped)
        case "pair":
            prompt_ids, chosen_ids, rejected_ids = sequences
            return PreferencePair(name, prompt_ids, chosen_ids, rejected_ids, number)
    assert kind == "judged"
    prompt_ids, response_ids, unrelated_ids = sequences
    return JudgedResponse(name, prompt_ids, response_ids, number == 1.0, unrelated_ids)
