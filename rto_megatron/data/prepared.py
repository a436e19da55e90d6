"""Tokenized data in a folder that the ranks of a machine share: the first that asks writes, all map it into memory.

An entry is known by everything that its ids depend on: the contents of the sources, the tokenizer, the limits, this
code. Its files have digests, which every reader checks.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rto_megatron.config.source_names import Sources, parts_of
from rto_megatron.data.entries import locked, read_entry, write_entry
from rto_megatron.data.limits import Limits
from rto_megatron.data.load_report import Loaded
from rto_megatron.data.loader import load_demonstrations, load_judged, load_pairs, load_prompts, load_texts
from rto_megatron.data.sources import state_of
from rto_megatron.data.template import ChatTemplate
from rto_megatron.errors import MachineError
from rto_megatron.types import (
    Demonstration,
    EndOfSequence,
    Example,
    JudgedResponse,
    PreferencePair,
    Prompt,
)

_PACKAGES = ("transformers", "tokenizers", "jinja2")


@dataclass(frozen=True)
class PreparedData:
    """The folder of tokenized data, for one tokenizer and one way of reading. Sources, numbers of rows and errors are
    those of `loader`.

    Example:
        PreparedData(Path("runs/data_cache"), tokenizer, limits, eos).pairs("pairs.jsonl").items
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    eos: EndOfSequence

    def prompts(
        self, sources: Sources, max_rows: int | None = None, keeps_columns: bool = False
    ) -> Loaded[Prompt]:
        """See `load_prompts`."""

        def load(shards: Path | None) -> Loaded[Prompt]:
            return load_prompts(sources, self.tokenizer, self.limits, max_rows, keeps_columns, shards)

        return self._load("prompts", sources, load, max_rows=max_rows, keeps_columns=keeps_columns)

    def demonstrations(self, sources: Sources, max_rows: int | None = None) -> Loaded[Demonstration]:
        """See `load_demonstrations`."""

        def load(shards: Path | None) -> Loaded[Demonstration]:
            return load_demonstrations(sources, self.tokenizer, self.limits, max_rows, self.eos, shards)

        return self._load("demonstrations", sources, load, max_rows=max_rows)

    def pairs(
        self, sources: Sources, max_rows: int | None = None, has_margins: bool = False
    ) -> Loaded[PreferencePair]:
        """See `load_pairs`."""

        def load(shards: Path | None) -> Loaded[PreferencePair]:
            return load_pairs(sources, self.tokenizer, self.limits, max_rows, self.eos, has_margins, shards)

        return self._load("pairs", sources, load, max_rows=max_rows, has_margins=has_margins)

    def judged(self, sources: Sources, max_rows: int | None = None) -> Loaded[JudgedResponse]:
        """See `load_judged`; in one process, as an answer's unrelated one is another row's."""

        def load(shards: Path | None) -> Loaded[JudgedResponse]:
            return load_judged(sources, self.tokenizer, self.limits, max_rows, self.eos)

        return self._load("judged", sources, load, max_rows=max_rows)

    def texts(self, sources: Sources) -> Loaded[Demonstration]:
        """See `load_texts`."""

        def load(shards: Path | None) -> Loaded[Demonstration]:
            return load_texts(sources, self.tokenizer, self.limits, None, shards)

        return self._load("texts", sources, load)

    def _load[T: Example](
        self,
        name: str,
        sources: Sources,
        load: Callable[[Path | None], Loaded[T]],
        **how: int | bool | None,
    ) -> Loaded[T]:
        """The examples of `load`, tokenized by one process of this machine at most, and once for all runs.

        Args:
            name: of what `load` makes of rows.
            load: given an empty folder, it may leave its examples there.
            how: what `load` was told beside sources, tokenizer and limits.

        Raises:
            UserError: as `load`; or the folder cannot be written.
        """
        key = self._key(name, sources, how)
        if key is None:
            return load(None)
        lock, entry = self.folder / f"{key}.lock", self.folder / key
        found: Loaded[T] | None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(lock, is_shared=True):
                found = read_entry(entry)
            if found is None:
                with locked(lock, is_shared=False):
                    found = read_entry(entry) or self._written(entry, load)
        except OSError as error:
            raise MachineError(
                f"data.cache={self.folder} cannot hold the tokenized data ({error}); name a folder with room that this "
                "user may write, on a file system with locks"
            ) from error
        return found

    def _written[T: Example](self, entry: Path, load: Callable[[Path | None], Loaded[T]]) -> Loaded[T]:
        # Locks of some file systems hold on one host alone, and another may write the same entry.
        own = f".partial_{entry.name}_{socket.gethostname()}"
        for left in (entry, *entry.parent.glob(f"{own}_*")):
            shutil.rmtree(left, ignore_errors=True)
        partial = entry.with_name(f"{own}_{os.getpid()}")
        partial.mkdir(mode=0o700)
        try:
            write_entry(partial, load(partial))
            if not entry.exists():
                partial.rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        found: Loaded[T] | None = read_entry(entry)
        assert found is not None, "it was written a moment ago"
        return found

    def _key(self, name: str, sources: Sources, how: Mapping[str, int | bool | None]) -> str | None:
        """What tells an entry from all others; None: nothing does, and no entry is kept."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return None
        states = [state_of(part.source) for part in parts_of(sources)]
        if any(state is None for state in states):
            return None
        template = ChatTemplate(self.tokenizer, self.limits.template)
        limits = {name: str(value) for name, value in asdict(self.limits).items() if name != "template"}
        options = asdict(self.limits.template)
        moment = options.pop("moment")
        known = {
            "name": name,
            "sources": [
                [part.source, part.weight, state]
                for part, state in zip(parts_of(sources), states, strict=True)
            ],
            "tokenizer": hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "special": {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()},
            "class": type(self.tokenizer).__qualname__,
            "template": template.source,
            "options": {key: str(value) for key, value in options.items()},
            "moment": str(moment) if template.prints_date else None,
            "limits": limits,
            "eos": asdict(self.eos),
            "how": dict(how),
            "code": _code(),
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _code() -> list[str]:
    """What turns rows into ids: this room, and the packages that it leaves work to."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return [found.hexdigest(), *(version(package) for package in _PACKAGES)]
