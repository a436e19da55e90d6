"""A model's answers to the questions of a benchmark, sampled by a pool and kept as they come.

The folder holds answers.jsonl, to which each answer is added when it is there, generation.json, which says what is
generated, and in the end the files of `answers`. A generation that was stopped goes on where it was, with the seeds
that it would have had: every question's seed follows from its place in the file.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_megatron.benchmarks.answer_files import write_answers
from rto_megatron.benchmarks.journal import Journal
from rto_megatron.benchmarks.questions import Benchmark, Question, Questions, read_questions
from rto_megatron.benchmarks.token_counts import OFFICIAL, CountTokens, token_counter
from rto_megatron.data.encoder import Encoder
from rto_megatron.data.eos import read_eos
from rto_megatron.data.limits import Limits
from rto_megatron.data.messages import Message
from rto_megatron.data.row import Row
from rto_megatron.data.template import TemplateOptions
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import DataError, RunFolderError, refuse_if
from rto_megatron.generation.contract import RolloutEngine, Sampling, stream
from rto_megatron.models.config_files import read_shape
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.reporting.progress import progress, say
from rto_megatron.types import EndOfSequence, Prompt, Rollout

JOURNAL = "answers.jsonl"
PLAN = "generation.json"
# The paper's: AlpacaEval 2 sampled, Arena-Hard greedy, both up to 4096 tokens (appendix D).
TEMPERATURES: Mapping[Benchmark, float] = {
    "alpaca_eval": 0.7,
    "arena_hard_v0.1": 0.0,
    "arena_hard_v2.0": 0.0,
}
MAX_TOKENS = 4096
_ROOM_STEP = 64  # tokens

# Engine and version of its weights, given the longest prompt and answer, in tokens.
type OpenPool = Callable[[int], AbstractContextManager[tuple[RolloutEngine, int]]]


@dataclass(frozen=True)
class Generation:
    """What is generated, as generation.json has it: a resumed one must agree.

    Example:
        Generation("rto", "runs/rto/hf", "alpaca_eval", "7a0c", 805, 0.7, 4096, 0, "cl100k_base", "2026-11-29T19:00:00")
    """

    name: str  # of the model, under which it is judged
    weights: str  # where they are and what their files look like
    benchmark: Benchmark
    questions: str  # sha256 of their keys and texts
    num_questions: int
    temperature: float
    max_tokens: int
    seed: int
    counted_by: str  # who counts tokens for style control
    moment: str  # for chat templates that print the date


@dataclass(frozen=True)
class GenerationChoices:
    """What a user chooses; None: the paper's.

    Example:
        GenerationChoices(name="rto", temperature=None, max_tokens=None, seed=0, count_tokens=None)
    """

    name: str
    temperature: float | None
    max_tokens: int | None
    seed: int
    count_tokens: str | None


@dataclass(frozen=True)
class _Asked:
    """A question in tokens, and how many an answer may have."""

    place: int
    question: Question
    prompt: Prompt
    room: int


def generate(
    model: Path, weights: str, prompts: Path, folder: Path, choices: GenerationChoices, open_pool: OpenPool
) -> Path:
    """Answers all questions and writes the benchmark's file, whose path it returns.

    Args:
        model: Hugging Face folder: its tokenizer and config.json are read here.
        weights: what tells the weights apart from others.
        prompts: the file of questions.
        folder: of the answers; exists.
        open_pool: called only when answers are missing.

    Raises:
        UserError: questions that cannot be asked, a folder that holds another generation, or a pool that failed.
    """
    questions = read_questions(prompts)
    tokenizer = load_tokenizer(model)
    shape = read_shape(model)
    eos, odd_ids = read_eos(model, tokenizer, shape.vocab_size)
    for warning in odd_ids:
        say(warning, True)
    plan = _agreed(folder, _plan(weights, questions, choices))
    counter = _counter(plan, tokenizer)
    asked = _encoded(questions, tokenizer, plan, shape.max_positions)
    write_whole(folder / PLAN, json.dumps(asdict(plan), indent=2) + "\n")
    with Journal(folder / JOURNAL) as journal:
        answered = _known(journal, asked, folder)
        missing = [one for one in asked if one.question.key not in answered]
        if missing:
            say(f"{len(missing)} of {len(asked)} questions of {plan.benchmark} to answer", True)
            longest = max(len(one.prompt.token_ids) + one.room for one in missing)
            with open_pool(longest) as (engine, version):
                _require_version(journal, version, folder)
                _ask(engine, version, missing, plan, eos, tokenizer, journal, answered, len(asked))
    cut = sum(is_cut for _, is_cut in answered.values())
    if cut:
        say(f"{cut} of {len(asked)} answers were cut at their longest length", True)
    pairs = [(one.question, answered[one.question.key][0]) for one in asked]
    return write_answers(plan.benchmark, plan.name, pairs, folder, counter)


def _plan(weights: str, questions: Questions, choices: GenerationChoices) -> Generation:
    benchmark = questions.benchmark
    temperature = choices.temperature
    identity = json.dumps([(one.key, one.text) for one in questions.items])
    return Generation(
        choices.name,
        weights,
        benchmark,
        sha256(identity.encode("utf-8", "surrogatepass")).hexdigest(),
        len(questions.items),
        TEMPERATURES[benchmark] if temperature is None else temperature,
        choices.max_tokens or MAX_TOKENS,
        choices.seed,
        choices.count_tokens or OFFICIAL.get(benchmark, ""),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _agreed(folder: Path, plan: Generation) -> Generation:
    """The plan, of a folder that holds it with the moment of its first start; refuses a folder that holds another."""
    path = folder / PLAN
    if not path.exists():
        return plan
    try:
        before = Generation(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); name another --out") from error
    plan = replace(plan, moment=before.moment)
    was, is_now = asdict(before), asdict(plan)
    problems = [
        f"{key} was {was[key]!r:.100}, now {is_now[key]!r:.100}" for key in was if was[key] != is_now[key]
    ]
    refuse_if(
        problems,
        f"{folder} holds another generation; name another --out, or repeat the command that began it",
        RunFolderError,
    )
    return plan


def _counter(plan: Generation, tokenizer: PreTrainedTokenizerBase) -> CountTokens | None:
    """Made before anything is sampled, as it may need a network."""
    return None if plan.benchmark == "alpaca_eval" else token_counter(plan.counted_by, tokenizer)


def _encoded(
    questions: Questions, tokenizer: PreTrainedTokenizerBase, plan: Generation, max_positions: int
) -> list[_Asked]:
    """Every question under the model's chat template, as the only turn of a user."""
    template = TemplateOptions(moment=datetime.fromisoformat(plan.moment))
    encoder = Encoder(tokenizer, Limits(max_positions, max_positions + 1, "error", template=template))
    asked, problems = [], []
    for place, question in enumerate(questions.items):
        try:
            ids = encoder.prompt(Row(question.where, {}), [Message("user", question.text)])
        except DataError as error:
            problems.append(str(error))
            continue
        room = _room(max_positions - len(ids), plan.max_tokens)
        if room < 1:
            problems.append(
                f"{question.where}: the prompt has {len(ids)} tokens, and the model takes {max_positions} in all"
            )
        asked.append(_Asked(place, question, Prompt(str(place), ids), room))
    refuse_if(problems, "questions that this model cannot be asked", DataError)
    short = sum(one.room < plan.max_tokens for one in asked)
    if short:
        say(
            f"warning: the model's {max_positions} positions leave fewer than {plan.max_tokens} tokens to the answers "
            f"of {short} questions",
            True,
        )
    return asked


def _room(left: int, wanted: int) -> int:
    """Tokens of an answer. What a pool is asked at once has one limit, so that short rooms are whole steps."""
    if left >= wanted:
        return wanted
    return left if left < _ROOM_STEP else left - left % _ROOM_STEP


def _known(journal: Journal, asked: Sequence[_Asked], folder: Path) -> dict[str, tuple[str, bool]]:
    """Answers by question, and whether each was cut, as the journal has them."""
    keys = {one.question.key for one in asked}
    try:
        known = {str(one["key"]): (str(one["answer"]), bool(one["is_cut"])) for one in journal.entries}
    except KeyError as error:
        raise RunFolderError(f"{folder / JOURNAL} has a line without {error}; name another --out") from error
    return {key: answer for key, answer in known.items() if key in keys}


def _require_version(journal: Journal, version: int, folder: Path) -> None:
    """Of a trainer's pool the version tells the weights apart, and not the model's folder."""
    others = {one["version"] for one in journal.entries if "version" in one} - {version}
    if others:
        raise RunFolderError(
            f"the pool holds weights of version {version}, and {folder / JOURNAL} has answers by version "
            f"{', '.join(map(str, others))}; name another --out"
        )


def _ask(
    engine: RolloutEngine,
    version: int,
    missing: Sequence[_Asked],
    plan: Generation,
    eos: EndOfSequence,
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal,
    answered: dict[str, tuple[str, bool]],
    total: int,
) -> None:
    by_room: dict[int, list[_Asked]] = defaultdict(list)
    for one in missing:
        by_room[one.room].append(one)
    with progress("answer", total, True, done=len(answered)) as advance:
        for room, group in sorted(by_room.items(), reverse=True):
            sampling = Sampling(
                max_tokens=room,
                eos_ids=eos.ids,
                temperature=plan.temperature,
                seed=plan.seed,
                places=tuple(one.place for one in group),
            )

            def arrived(place: int, rollout: Rollout, group: Sequence[_Asked] = tuple(group)) -> None:
                key, text = group[place].question.key, _text(rollout, eos, tokenizer)
                is_cut = rollout.finish_reason == "length"
                journal.append({"key": key, "answer": text, "is_cut": is_cut, "version": version})
                answered[key] = (text, is_cut)
                advance(f"{len(rollout.response_ids)} tokens")

            rollouts = stream(engine, [one.prompt for one in group], sampling, version, arrived)
            for place, rollout in enumerate(rollouts):  # of an engine that tells of nothing before its end
                if group[place].question.key not in answered:
                    arrived(place, rollout)


def _text(rollout: Rollout, eos: EndOfSequence, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = list(rollout.response_ids)
    if ids and ids[-1] in eos.ids:
        ids.pop()
    return str(tokenizer.decode(ids, skip_special_tokens=True))
