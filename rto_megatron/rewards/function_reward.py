"""A reward function in a process of its own: asked by a rank, ended when its time is over."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

import rto_megatron
from rto_megatron.errors import RewardError
from rto_megatron.rewards.given import Pays, listed, read_given
from rto_megatron.rewards.sample import Given, Json, Sample

_START_LIMIT_S = 120.0  # to import what the function needs
_SHOWN_CHARACTERS = 1500  # the end of a traceback
# A function that knows torch must not take its process for a rank.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Called:
    """What is called, and how.

    Args:
        key: of the source in the recipe, for messages.
        target: file.py:name or module:name.
        timeout_s: limit of all samples of one call of `rate`.
        options: keyword arguments of the function, JSON.

    Example:
        Called("rewards.exact", "rewards/exact.py:score", "response", timeout_s=60.0)
    """

    key: str
    target: str
    pays: Pays
    timeout_s: float
    options: Mapping[str, Json] | None = None


class FunctionRater:
    """See `Rater`; the process starts with it and imports the function.

    Raises:
        RewardError: the function cannot be imported.

    Example:
        FunctionRater(Called("rewards.exact", "rewards/exact.py:score", "response", 60.0)).rate([sample])
    """

    def __init__(self, called: Called) -> None:
        self._called = called
        command = [sys.executable, "-m", "rto_megatron.rewards.function_process", called.target]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        root = str(Path(rto_megatron.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [*command, json.dumps(dict(called.options or {}))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        answers, _ = self._exchange(None, 1, _START_LIMIT_S)
        if not answers or "error" in answers[0]:
            why = _end_of(answers[0]["error"]) if answers else f"no answer within {_START_LIMIT_S:.0f} s"
            self.close()
            raise RewardError(
                f"{called.key}: {called.target} cannot be imported; mend the file, or name another: {why}"
            )

    def rate(self, samples: Sequence[Sample]) -> list[Given]:
        """See `Rater.rate`."""
        called = self._called
        request = [asdict(sample) for sample in samples]
        answers, is_late = self._exchange(request, len(samples), called.timeout_s)
        by_number = {answer["number"]: answer for answer in answers}
        failed = {number: answer["error"] for number, answer in by_number.items() if "error" in answer}
        if failed:
            ids = [samples[number].prompt_id for number in failed if isinstance(number, int)]
            raise RewardError(
                f"{called.key}: {called.target} failed on {listed(ids)}; nothing is trained on. Mend the function and "
                f"start again: {_end_of(next(iter(failed.values())))}"
            )
        absent = [sample.prompt_id for number, sample in enumerate(samples) if number not in by_number]
        if absent:
            self._refuse_absent(absent, is_late)
        return [
            read_given(
                by_number[number]["value"], sample, called.pays, f"{called.key}: {called.target} returned"
            )
            for number, sample in enumerate(samples)
        ]

    def close(self) -> None:
        """Ends the process, as the end of this one does too."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _refuse_absent(self, absent: Sequence[str], is_late: bool) -> None:
        called = self._called
        if is_late:
            self._process.kill()
            what = f"took longer than {called.key}.timeout_s={called.timeout_s:g} and was ended"
            advice = "Make it faster, or raise the limit"
        else:
            what, advice = f"ended its process with status {self._process.wait()}", "Mend it"
        raise RewardError(
            f"{called.key}: {called.target} {what}, with {listed(absent)} not scored; nothing is trained on. {advice}"
        )

    def _exchange(
        self, request: object | None, num_answers: int, limit_s: float
    ) -> tuple[list[dict[str, Json]], bool]:
        """Sends a request, if there is one; gives the answers that came, and whether more may come after the limit."""
        answers: list[dict[str, Json]] = []
        reading = Thread(target=self._read, args=(request, num_answers, answers), daemon=True)
        reading.start()
        reading.join(limit_s)
        return list(answers), reading.is_alive()

    def _read(self, request: object | None, num_answers: int, answers: list[dict[str, Json]]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if request is not None:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            while len(answers) < num_answers and (line := self._process.stdout.readline()):
                answers.append(json.loads(line))
        except (OSError, ValueError):
            return  # the process has ended, or was ended by `close`


def _end_of(text: Json) -> str:
    return "\n" + str(text).strip()[-_SHOWN_CHARACTERS:]
