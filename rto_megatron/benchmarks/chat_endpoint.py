"""An OpenAI-compatible endpoint that judges: chat completions over HTTP, persistent where another try may help."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Self

import aiohttp

from rto_megatron.errors import JudgeError
from rto_megatron.reporting.progress import plain

_PASSING = (408, 409, 425, 429)  # of the 4xx, those that another time may answer
_ONE_ALONE = ("content_filter", "content_policy_violation", "context_length_exceeded", "context length")
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_LONGEST_ASKED_PAUSE_S = 900.0
_SHOWN = 300
_NO_LIMIT = aiohttp.ClientTimeout()


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Args:
        url: of the API, as https://api.openai.com/v1.
        key: bearer key; None: the endpoint asks for none.
        retries: how often a request that got no answer is sent again.
        timeout_s: limit of one request.

    Example:
        Endpoint("http://127.0.0.1:8000/v1", key=None, concurrency=8, retries=8, timeout_s=600.0)
    """

    url: str
    key: str | None = field(repr=False)
    concurrency: int
    retries: int
    timeout_s: float


@dataclass(frozen=True)
class JudgeReply:
    """What the judge said to one request.

    Example:
        JudgeReply(content="M", top=(("M", -0.1), ("m", -2.4)), refusal=None, prompt_tokens=812, completion_tokens=1)
    """

    content: str
    top: tuple[tuple[str, float], ...] | None  # likeliest first tokens with log-probs in nats; None: not told
    refusal: str | None  # why there is no answer; None: there is one
    prompt_tokens: int
    completion_tokens: int


class _PassingError(JudgeError):
    """Another try may help; `wait_s` is what the endpoint asks for."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class ChatClient:
    """Asks one endpoint from one event loop; an async context manager.

    Example:
        ChatClient(endpoint)
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._route = endpoint.url.rstrip("/") + "/chat/completions"
        self._resume_at = 0.0  # by the monotonic clock; a limit of rates holds for all requests

    async def __aenter__(self) -> Self:
        key = self._endpoint.key
        self._http = aiohttp.ClientSession(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=_NO_LIMIT,
            trust_env=self._route.startswith("https://"),  # a proxy would read the key of a plain request
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def ask(self, body: Mapping[str, object]) -> JudgeReply:
        """Sends one request, again where it got no answer, after growing pauses or those that the endpoint asks for.

        Raises:
            JudgeError: the endpoint refuses it, does not answer, or answers something else.
        """
        for attempt in range(self._endpoint.retries + 1):
            await asyncio.sleep(max(0.0, self._resume_at - time.monotonic()))
            try:
                return await self._asked(body)
            except _PassingError as error:
                last = error
                pause_s = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
                self._resume_at = max(self._resume_at, time.monotonic() + (error.wait_s or pause_s))
        raise JudgeError(
            f"{self._route} gave no answer to {self._endpoint.retries + 1} requests, the last time: {last}; all "
            "answers so far are kept, and the same command goes on from them"
        )

    async def _asked(self, body: Mapping[str, object]) -> JudgeReply:
        try:
            async with (
                asyncio.timeout(self._endpoint.timeout_s),
                self._http.post(self._route, json=body, allow_redirects=False) as response,
            ):
                status, text = response.status, self._without_key(await response.text(errors="replace"))
                wait_s = _asked_pause(response.headers.get("retry-after"))
        except TimeoutError:
            raise _PassingError(f"no answer within {self._endpoint.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return _reply(self._route, text)
        return self._refused(status, text, wait_s)

    def _without_key(self, text: str) -> str:
        """What an endpoint says may hold the key that it was sent, and is kept and shown."""
        key = self._endpoint.key
        return text if key is None else text.replace(key, "[key]")

    def _refused(self, status: int, text: str, wait_s: float) -> JudgeReply:
        """A reply that says why a single request is refused, or an error that says what to do."""
        said = self._without_key(text)
        if status == 429 and "insufficient_quota" in text:
            raise JudgeError(
                f"{self._route}: the account's quota is used up ({said}); what was judged is kept: renew it and "
                "repeat the command"
            )
        if status in _PASSING or status >= 500:
            raise _PassingError(f"it answered {status}: {said}", wait_s)
        if status in (400, 413, 422) and any(mark in text for mark in _ONE_ALONE):
            return JudgeReply("", None, said, 0, 0)
        advice = {
            401: "the key is missing or wrong: name it with --key-file or --key-env",
            403: "the key may not use this model: take another key or --judge",
            404: "there is no such model or route: --endpoint mostly ends in /v1, --judge is the model's name there",
        }.get(status, "see whether the endpoint takes chat completions with these options")
        raise JudgeError(f"{self._route} refused a request with status {status}; {advice}. It said: {said}")


def _asked_pause(header: str | None) -> float:
    """Seconds that a Retry-After header asks for; 0: none, or nothing sensible."""
    if header is None:
        return 0.0
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a zone
            return 0.0
    return min(max(0.0, wait_s), _LONGEST_ASKED_PAUSE_S)


def _reply(route: str, text: str) -> JudgeReply:
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        message = choice["message"]
        logprobs = choice.get("logprobs") or {}
        places = logprobs.get("content") or []
        top = (
            [(str(one["token"]), float(one["logprob"])) for one in places[0]["top_logprobs"]]
            if places
            else None
        )
        usage = answer.get("usage") or {}
        refusal = message.get("refusal")
        if choice.get("finish_reason") == "content_filter":
            refusal = refusal or "the endpoint's content filter stopped the answer"
        return JudgeReply(
            str(message.get("content") or ""),
            None if top is None else tuple(top),
            None if refusal is None else str(refusal),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise JudgeError(
            f"{route} answered no chat completion ({type(error).__name__}: {error}): {plain(text)[:_SHOWN]}; see that "
            "--endpoint is that of an OpenAI-compatible API"
        ) from error
