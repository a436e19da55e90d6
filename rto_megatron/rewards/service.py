"""Rewards from an HTTP service: batches, a few at a time, each tried again, all within one limit."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path

import aiohttp

from rto_megatron.config.rewards import ServiceSource
from rto_megatron.errors import MachineError, RewardError, UserError
from rto_megatron.rewards.given import listed, read_given
from rto_megatron.rewards.sample import Given, Json, Sample

_FIRST_PAUSE_S = 0.5
_SHOWN_CHARACTERS = 500
_NO_LIMIT = aiohttp.ClientTimeout()  # the one of all requests holds
_TOO_BUSY = (408, 429)  # of the 4xx, those that another time may answer


class RewardServiceLost(RewardError):  # noqa: N818  (a state that may pass, named for what it is)
    """The service gave no answer: it is down, slow or fails.

    Example:
        RewardServiceLost("rewards.far: http://10.0.0.2:8100/score did not score 3 samples").reason == "INFRA_NO_REWARD"
    """

    reason = "INFRA_NO_REWARD"


class _UnansweredError(RewardError):
    """One request got no usable answer, and may get one if it is sent again."""


@dataclass(frozen=True)
class ServiceRater:
    """See `Rater`.

    Raises:
        MachineError: the token is not where the configuration says.

    Example:
        ServiceRater(ServiceSource(kind="service", url="http://127.0.0.1:8100/score")).rate([sample])
    """

    source: ServiceSource

    def rate(self, samples: Sequence[Sample]) -> list[Given]:
        """See `Rater.rate`."""
        return asyncio.run(self._rate(samples, _headers(self.source)))

    @property
    def _key(self) -> str:
        return f"rewards.{self.source.name}"

    async def _rate(self, samples: Sequence[Sample], headers: Mapping[str, str]) -> list[Given]:
        answered: dict[int, list[Given]] = {}  # by the number of the batch
        heard = ["no answer came"]
        batches = list(batched(samples, self.source.batch))
        try:
            async with asyncio.timeout(self.source.timeout_s):
                await self._ask_all(batches, headers, answered, heard)
        except TimeoutError:
            absent = [one for number, batch in enumerate(batches) if number not in answered for one in batch]
            raise self._lost(heard[-1], absent, f"{self.source.timeout_s:g} s") from None
        return [given for number in range(len(batches)) for given in answered[number]]

    async def _ask_all(
        self,
        batches: Sequence[tuple[Sample, ...]],
        headers: Mapping[str, str],
        answered: dict[int, list[Given]],
        heard: list[str],
    ) -> None:
        turns = asyncio.Semaphore(self.source.concurrency)
        failures: list[UserError] = []

        async def ask(http: aiohttp.ClientSession, number: int, batch: tuple[Sample, ...]) -> None:
            async with turns:
                answered[number] = await self._persistently(http, batch, heard)

        try:
            async with (
                aiohttp.ClientSession(
                    headers=headers, cookie_jar=aiohttp.DummyCookieJar(), timeout=_NO_LIMIT
                ) as http,
                asyncio.TaskGroup() as group,
            ):
                for number, batch in enumerate(batches):
                    group.create_task(ask(http, number, batch))
        except* UserError as errors:
            failures = [one for one in errors.exceptions if isinstance(one, UserError)]
        if failures:
            raise failures[0]

    async def _persistently(
        self, http: aiohttp.ClientSession, batch: tuple[Sample, ...], heard: list[str]
    ) -> list[Given]:
        """Asks again where no usable answer came, after growing pauses; `heard` keeps why."""
        for attempt in range(self.source.retries + 1):
            if attempt:
                await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                return await self._asked(http, batch)
            except _UnansweredError as error:
                heard.append(str(error))
        raise self._lost(heard[-1], batch, f"{self.source.retries + 1} requests")

    def _lost(self, last: str, absent: Sequence[Sample], after: str) -> RewardServiceLost:
        return RewardServiceLost(
            f"{self._key}: {self.source.url} did not score {listed([sample.prompt_id for sample in absent])} within "
            f"{after}: {last}; nothing is trained on. See that the service runs and is fast enough, or raise "
            f"{self._key}.timeout_s or retries"
        )

    async def _asked(self, http: aiohttp.ClientSession, batch: Sequence[Sample]) -> list[Given]:
        url = self.source.url
        try:
            async with http.post(url, json=self._request(batch), allow_redirects=False) as response:
                status, content = response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, OSError) as error:
            raise _UnansweredError(f"{type(error).__name__}: {error}") from error
        if status >= 500 or status in _TOO_BUSY:
            raise _UnansweredError(f"it answered {status}: {content[:_SHOWN_CHARACTERS]}")
        if status != 200:
            raise RewardError(
                f"{self._key}: {url} refused a request with status {status}: {content[:_SHOWN_CHARACTERS]}; check url, "
                "protocol and token"
            )
        return self._read(content, batch)

    def _request(self, batch: Sequence[Sample]) -> dict[str, Json | object]:
        if self.source.protocol == "vllm":
            ids = [[*sample.prompt_ids, *sample.response_ids] for sample in batch]
            return {"input": ids, "task": "classify", "use_activation": False}
        return {"samples": [asdict(sample) for sample in batch], "pays": self.source.pays}

    def _read(self, content: str, batch: Sequence[Sample]) -> list[Given]:
        try:
            answer = json.loads(content)
            if self.source.protocol == "vllm":
                entries = sorted(answer["data"], key=lambda entry: entry["index"])
                values = [_single(entry["data"]) for entry in entries]
            else:
                values = answer["rewards"]
            if not isinstance(values, list) or len(values) != len(batch):
                raise ValueError(f"{len(values)} rewards for {len(batch)} samples")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RewardError(
                f"{self._key}: {self.source.url} did not answer {listed([sample.prompt_id for sample in batch])} as "
                f"protocol {self.source.protocol} wants ({type(error).__name__}: {error}): "
                f"{content[:_SHOWN_CHARACTERS]}; nothing is trained on (docs/rewards.md has the protocol)"
            ) from error
        who = f"{self._key}: {self.source.url} answered"
        return [
            read_given(value, sample, self.source.pays, who)
            for value, sample in zip(values, batch, strict=True)
        ]


def _single(data: object) -> object:
    """The one number of vLLM's [number]."""
    if isinstance(data, list) and len(data) == 1:
        return data[0]
    raise ValueError(f"{data!r:.80} in place of a list of one number; serve a reward model with one label")


def _headers(source: ServiceSource) -> dict[str, str]:
    token = read_token(source)
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def read_token(source: ServiceSource) -> str | None:
    """The bearer token of a service; None where it has none.

    Raises:
        MachineError: it is not where the configuration says.
    """
    key = f"rewards.{source.name}"
    if source.token_env is not None:
        if not (token := os.environ.get(source.token_env, "").strip()):
            raise MachineError(
                f"{key}.token_env: the environment has no {source.token_env}; set it where ranks start"
            )
        return token
    if source.token_file is None:
        return None
    try:
        token = Path(source.token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(f"{key}.token_file: {source.token_file} cannot be read ({error})") from error
    if not token:
        raise MachineError(f"{key}.token_file: {source.token_file} is empty; write the token into it")
    return token
