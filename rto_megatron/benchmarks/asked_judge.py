"""A judge that is asked everything once: replies are kept in a file as they come, and counted."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Protocol

from rto_megatron.benchmarks.chat_endpoint import ChatClient, JudgeReply
from rto_megatron.benchmarks.journal import Entry, Journal
from rto_megatron.errors import RunFolderError


class Ask(Protocol):
    """Asks the judge.

    Example:
        reply = await ask({"model": "gpt-4-1106-preview", "messages": messages, "temperature": 0})
    """

    async def __call__(self, body: Mapping[str, object]) -> JudgeReply: ...


@dataclass(frozen=True)
class TokenUse:
    """What was paid for.

    Example:
        TokenUse(num_requests=805, prompt_tokens=1_310_000, completion_tokens=805)
    """

    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, reply: JudgeReply) -> "TokenUse":
        return TokenUse(
            self.num_requests + 1,
            self.prompt_tokens + reply.prompt_tokens,
            self.completion_tokens + reply.completion_tokens,
        )

    def __str__(self) -> str:
        return f"{self.num_requests} requests, {self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written"


class AskedJudge:
    """Remembers every reply by its request; one request is never under way twice.

    Example:
        AskedJudge(client, journal).knows(body)
    """

    def __init__(self, client: ChatClient, journal: Journal) -> None:
        self._client = client
        self._journal = journal
        self._known: dict[str, JudgeReply] = {}
        self._under_way: dict[str, asyncio.Task[JudgeReply]] = {}
        self._asked_here: set[str] = set()
        self.use = TokenUse()  # of this command
        self.use_before = TokenUse()
        for entry in journal.entries:
            reply = _read(entry)
            self._known[str(entry["request"])] = reply
            self.use_before += reply

    def knows(self, body: Mapping[str, object]) -> bool:
        """Whether a request was answered before."""
        return _name(body) in self._known

    async def ask(self, body: Mapping[str, object]) -> JudgeReply:
        """The reply, from the file where it is there.

        Raises:
            JudgeError: see `ChatClient.ask`.
        """
        name = _name(body)
        return self._known[name] if name in self._known else await self._fresh(name, body)

    async def ask_again(self, body: Mapping[str, object]) -> JudgeReply:
        """As `ask`, but a reply from before this command does not count."""
        name = _name(body)
        return self._known[name] if name in self._asked_here else await self._fresh(name, body)

    async def _fresh(self, name: str, body: Mapping[str, object]) -> JudgeReply:
        if name not in self._under_way:
            self._under_way[name] = asyncio.create_task(self._paid(name, body))
        return await asyncio.shield(self._under_way[name])

    async def _paid(self, name: str, body: Mapping[str, object]) -> JudgeReply:
        try:
            reply = await self._client.ask(body)
            self._journal.append({"request": name, **asdict(reply)})
        finally:
            del self._under_way[name]
        self._known[name] = reply
        self._asked_here.add(name)
        self.use += reply
        return reply


def _name(body: Mapping[str, object]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(entry: Entry) -> JudgeReply:
    try:
        top, refusal = entry["top"], entry["refusal"]
        return JudgeReply(
            str(entry["content"]),
            tuple((str(token), float(logprob)) for token, logprob in top) if isinstance(top, list) else None,
            None if refusal is None else str(refusal),
            int(str(entry["prompt_tokens"])),
            int(str(entry["completion_tokens"])),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise RunFolderError(
            f"the file of replies holds something else ({type(error).__name__}: {error}); name another --out"
        ) from error
