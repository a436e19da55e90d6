"""Which layout a row is in: chosen by its columns, and refused where two layouts say different things of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rto_megatron.data.row import Row
from rto_megatron.errors import DataError, UserError

type Cells = Mapping[str, object]  # of a row, by column
Examples = Literal["prompts", "pairs", "demonstrations", "judgements", "texts"]


@dataclass(frozen=True)
class RowLayout[T]:
    """One way in which public data write an example.

    Attributes:
        name: as `data.layout` takes it.
        columns: what it reads, for messages.
        matches: whether a row has these columns, with values of the right kind.
        read: what the row then says.
        is_last_resort: for rows that are in no other layout.

    Example:
        RowLayout("text", "text", lambda cells: "text" in cells, lambda row: str(row.columns["text"]))
    """

    name: str
    columns: str
    matches: Callable[[Cells], bool]
    read: Callable[[Row], T]
    is_last_resort: bool = False


@dataclass(frozen=True)
class Said[T]:
    """What a row says, and the layout by which it was read.

    Example:
        Said(layout="text", value="hello")
    """

    layout: str
    value: T


@dataclass(frozen=True)
class Reader[T]:
    """The layouts of one kind of example; the first is that of a row that is in none, whose error then says why.

    Example:
        Reader("texts", (layout,)).read(row).value
    """

    examples: Examples
    layouts: tuple[RowLayout[T], ...]

    def read(self, row: Row, preferred: str | None = None) -> Said[T]:
        """What a row says.

        Args:
            preferred: the name of the layout that decides for rows that are in several.

        Raises:
            UserError: the row is in no layout or not whole, or two layouts that it is in say different things.
        """
        matching = [layout for layout in self.layouts if layout.matches(row.columns)]
        named = [layout for layout in matching if layout.name == preferred]
        usual = [layout for layout in matching if not layout.is_last_resort]
        first, *others = named or usual or matching or [self.layouts[0]]
        value = first.read(row)
        for other in others:
            if not _agrees(other, row, value):
                raise DataError(
                    f"{row.where}: its columns {first.columns} ({first.name}) and {other.columns} ({other.name}) say "
                    f"different things; set data.layout={first.name} or data.layout={other.name}, or remove columns"
                )
        return Said(first.name, value)


def _agrees[T](layout: RowLayout[T], row: Row, value: T) -> bool:
    """Columns in which nothing can be read contradict nothing."""
    try:
        return layout.read(row) == value
    except UserError:
        return True
