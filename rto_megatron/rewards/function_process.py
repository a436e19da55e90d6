"""The process that calls a reward function: `python -m rto_megatron.rewards.function_process FUNCTION [OPTIONS]`.

It reads one JSON list of samples a line and answers one line a sample, as soon as that is rated. It imports nothing of
the trainer but the contract, so it starts at once, and what the function does to its process never reaches a rank.
"""

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TextIO

from rto_megatron.rewards.sample import Sample

type Function = Callable[[Sample], object]

_PR_SET_PDEATHSIG = 1
# A job's scheduler and a terminal send these to every process, and the rank still wants the scores of its step.
_LEFT_TO_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def main() -> None:
    """Answers until its input ends, or the rank that started it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    for one in _LEFT_TO_THE_RANK:
        signal.signal(one, signal.SIG_IGN)
    # What the function prints must not stand among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        function = _load(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    except BaseException:  # a file of the user's may raise anything, sys.exit among it
        _say(answers, {"error": traceback.format_exc()})
        return
    _say(answers, {"ready": True})
    for line in sys.stdin:
        asyncio.run(_rate(function, [_sample(fields) for fields in json.loads(line)], answers))


def _load(target: str, options: dict[str, object]) -> Function:
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        sys.path.insert(0, str(Path(place).parent))
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(place)  # Python puts the working directory of `-m` before all others
    function = vars(loaded).get(name)
    if not callable(function):
        raise TypeError(f"{place} has no function {name}; found {function!r}")
    return partial(function, **options)


def _sample(fields: dict[str, object]) -> Sample:
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Sample(**{**fields, **lists})  # type: ignore[arg-type]  # the rank wrote the fields of a Sample


async def _rate(function: Function, samples: list[Sample], answers: TextIO) -> None:
    """Calls the function in order; what it leaves to be awaited runs together, once all calls have returned."""
    waiting = []
    for number, sample in enumerate(samples):
        try:
            value = function(sample)
        except BaseException as error:  # as above
            _fail(answers, number, error)
            continue
        if inspect.isawaitable(value):
            waiting.append(_awaited(value, answers, number))
        else:
            _answer(answers, number, value)
    await asyncio.gather(*waiting)


async def _awaited(value: Awaitable[object], answers: TextIO, number: int) -> None:
    try:
        _answer(answers, number, await value)
    except BaseException as error:  # as above
        _fail(answers, number, error)


def _answer(answers: TextIO, number: int, value: object) -> None:
    try:
        _say(answers, {"number": number, "value": value})
    except (TypeError, ValueError) as error:
        _fail(answers, number, error)


def _fail(answers: TextIO, number: int, error: BaseException) -> None:
    told = "".join(traceback.format_exception(error))
    _say(answers, {"number": number, "error": told})


def _say(answers: TextIO, words: Mapping[str, object]) -> None:
    answers.write(json.dumps(words, default=_plain) + "\n")
    answers.flush()


def _plain(value: object) -> float:
    """A number of another library, such as NumPy's."""
    if isinstance(value, Real):
        return float(value)
    raise TypeError(
        f"a reward is made of numbers and lists of them, found {type(value).__name__}: {value!r:.100}"
    )


if __name__ == "__main__":
    main()
