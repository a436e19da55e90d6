"""Judges all answers of a model against a baseline's: who is asked what, and what the replies become.

Sources: alpaca_eval's weighted_alpaca_eval_gpt4_turbo (one request for each instruction, the order of both answers
drawn from its text, the verdict read from the log-probs of one token), Arena-Hard's gen_judgment.py (two games, both
orders, the verdict in words, asked for once more where v0.1's judge ended without one).
"""

import asyncio
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rto_megatron.benchmarks.arena_judgments import Version, label_of
from rto_megatron.benchmarks.asked_judge import Ask, AskedJudge
from rto_megatron.benchmarks.chat_endpoint import JudgeReply
from rto_megatron.benchmarks.judge_templates import ChatMessage, JudgeTemplate
from rto_megatron.errors import JudgeError, UserError
from rto_megatron.reporting.progress import Advance, plain

ORDER_SEED = 0  # of alpaca_eval
_FIRST, _SECOND = "m", "M"  # what AlpacaEval's template calls both answers
_TRIALS = 10  # verdicts in a row without one that end the judging
_SHOWN = 200


@dataclass(frozen=True)
class JudgeOptions:
    """How the judge is asked; the defaults of both benchmarks are in `rto judge`.

    Example:
        JudgeOptions("gpt-4-1106-preview", temperature=1.0, max_tokens=1, has_logprobs=True)
    """

    model: str
    temperature: float
    max_tokens: int
    has_logprobs: bool  # AlpacaEval: weigh both letters by them; False: take the letter that was written

    def body(self, messages: Sequence[ChatMessage]) -> dict[str, object]:
        """A request."""
        told: dict[str, object] = {"logprobs": True, "top_logprobs": 5} if self.has_logprobs else {}
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **told,
        }


@dataclass(frozen=True)
class Comparison:
    """Two answers to one question, in the order in which they are shown.

    Example:
        Comparison("q1", "2 + 2?", first="4", second="Four.", is_model_first=False)
    """

    key: str
    question: str
    first: str
    second: str
    is_model_first: bool


@dataclass(frozen=True)
class JudgedComparison:
    """A comparison with its verdict.

    Example:
        JudgedComparison(comparison, 1.98, "M", "M").verdict
    """

    comparison: Comparison
    verdict: float | str | None  # a preference, or a label; None: the judge gave none
    said: str
    raw: object  # what the benchmark's own file keeps of the judge's reply
    prompt: Sequence[ChatMessage] = field(default=(), repr=False)


class PairwiseJudge:
    """AlpacaEval's judge: one token, m or M.

    Example:
        PairwiseJudge(template, options).first_request(comparison)
    """

    def __init__(self, template: JudgeTemplate, options: JudgeOptions) -> None:
        self._template = template
        self._options = options

    def first_request(self, comparison: Comparison) -> dict[str, object]:
        """What is asked about a comparison."""
        return self._options.body(
            self._template.fill(comparison.question, comparison.first, comparison.second)
        )

    async def judge(self, ask: Ask, comparison: Comparison) -> JudgedComparison:
        """A preference: 1 where the baseline is better, 2 where the model is."""
        if comparison.first == comparison.second:
            return JudgedComparison(comparison, 1.5, "", None)
        reply = await ask(self.first_request(comparison))
        if self._options.has_logprobs and reply.top is None and reply.refusal is None:
            raise JudgeError(
                "the judge's answers come without log-probs, by which AlpacaEval weighs its verdicts; take an endpoint "
                "that gives them, or --no-logprobs to count the letter that is written"
            )
        shown = preference(reply) if self._options.has_logprobs else written_preference(reply.content)
        # 1 stands for the first answer shown; the preference is for the model.
        verdict = None if shown is None else 3 - shown if comparison.is_model_first else shown
        return JudgedComparison(comparison, verdict, reply.refusal or reply.content, _raw(reply))


def preference(reply: JudgeReply) -> float | None:
    """1 for the first answer to 2 for the second, by the chances of both letters among the likeliest tokens.

    2 - p(m) / (p(m) + p(M)); a letter that is not among them has no chance; None: neither is.
    """
    chances = {token: math.exp(logprob) for token, logprob in reply.top or () if token in (_FIRST, _SECOND)}
    total = sum(chances.values())
    return 2 - chances.get(_FIRST, 0.0) / total if total > 0 else None


def written_preference(text: str) -> float | None:
    """1 or 2 by the letter that stands alone in a text; None: neither, or both do."""
    letters = set(re.findall(rf"\b[{_FIRST}{_SECOND}]\b", text))
    return {frozenset(_FIRST): 1.0, frozenset(_SECOND): 2.0}.get(frozenset(letters))


def _raw(reply: JudgeReply) -> dict[str, object]:
    top = [{"token": token, "logprob": logprob} for token, logprob in reply.top or ()]
    return {"text": reply.content, "top_logprobs": top, "refusal": reply.refusal}


class LabelJudge:
    """Arena-Hard's judge: an explanation that ends with one of five labels.

    Example:
        LabelJudge(template, options, "v0.1").first_request(comparison)
    """

    def __init__(self, template: JudgeTemplate, options: JudgeOptions, version: Version) -> None:
        self._template = template
        self._options = options
        self._version = version

    def first_request(self, comparison: Comparison) -> dict[str, object]:
        """What is asked about a comparison."""
        return self._options.body(
            self._template.fill(comparison.question, comparison.first, comparison.second)
        )

    async def judge(self, ask: Ask, comparison: Comparison) -> JudgedComparison:
        """A label, of the answers as they are shown."""
        messages = self._template.fill(comparison.question, comparison.first, comparison.second)
        asked = list(messages)
        reply = await ask(self._options.body(asked))
        said = reply.content
        label, asks_again = label_of(said, self._version)
        if asks_again and reply.refusal is None:
            asked += [
                {"role": "assistant", "content": reply.content},
                {"role": "user", "content": self._template.follow_up},
            ]
            more = await ask(self._options.body(asked))
            said = f"{said}\n{more.content}"
            label, _ = label_of(said, self._version)
        return JudgedComparison(comparison, label, reply.refusal or said, said, messages)


def shows_model_first(instruction: str, seed: int = ORDER_SEED) -> bool:
    """AlpacaEval's draw of an instruction's order, the same whenever and whoever is judged."""
    draw = random.Random(f"is_switched_outputs{instruction}{seed}")
    return draw.choices([False, True])[0]


async def judge_all(
    comparisons: Sequence[Comparison],
    judge: PairwiseJudge | LabelJudge,
    asked: AskedJudge,
    concurrency: int,
    judges_again: bool,
    advance: Advance,
) -> list[JudgedComparison]:
    """Judges every comparison, in any order; an error waits for the replies that are under way, which are kept.

    Args:
        concurrency: comparisons at a time.
        judges_again: ask once more where an earlier command got no verdict.
        advance: called for every comparison that was not known before.

    Raises:
        JudgeError: the endpoint cannot be used, or ten first verdicts are none.
    """
    found: dict[int, JudgedComparison] = {}
    failures: list[UserError] = []
    lost: list[JudgedComparison] = []
    numbers = iter(range(len(comparisons)))

    async def one(number: int) -> None:
        comparison = comparisons[number]
        is_known = asked.knows(judge.first_request(comparison))
        judged = await judge.judge(asked.ask, comparison)
        if judged.verdict is None and judges_again and is_known:
            judged = await judge.judge(asked.ask_again, comparison)
        found[number] = judged
        if judged.verdict is None:
            lost.append(judged)
        if len(lost) == len(found) == _TRIALS:
            raise _no_verdicts(lost)
        if not is_known:
            advance(f"{asked.use}")

    async def work() -> None:
        for number in numbers:
            if failures:
                return
            try:
                await one(number)
            except UserError as error:
                failures.append(error)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    if failures:
        raise failures[0]
    return [found[number] for number in range(len(comparisons))]


def _no_verdicts(lost: Sequence[JudgedComparison]) -> JudgeError:
    example = next((one.said for one in lost if one.said.strip()), "")
    return JudgeError(
        f"none of the judge's first {len(lost)} replies has a verdict, so that the rest is not asked. It said, for "
        f"one: {plain(example)[:_SHOWN]!r}. Take another judge or --template; replies are kept, and --again asks again"
    )


def unjudged_reasons(judged: Sequence[JudgedComparison]) -> Mapping[str, str]:
    """What the judge said where there is no verdict, by question."""
    return {
        one.comparison.key: plain(one.said)[:_SHOWN] or "nothing" for one in judged if one.verdict is None
    }
