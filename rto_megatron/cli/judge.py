"""`rto judge`: answers against a baseline's, by a language model behind an endpoint."""

import os
import urllib.parse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rto_megatron.errors import JudgeError, MachineError, RecipeError

if TYPE_CHECKING:
    from rto_megatron.benchmarks.judge import JudgeOutcome
    from rto_megatron.benchmarks.judging import JudgeOptions
    from rto_megatron.benchmarks.questions import Benchmark
    from rto_megatron.reporting.progress import Advance

_LOCAL = ("127.0.0.1", "::1")
_SHOWN = 5


_Answers = Annotated[
    Path,
    typer.Argument(
        help="The model's answers: model_outputs.json, or model_answer/NAME.jsonl.", show_default=False
    ),
]
_Baseline = Annotated[
    Path, typer.Option(help="The baseline's answers, in the same format.", show_default=False)
]
_EndpointUrl = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="An OpenAI-compatible API, as https://api.openai.com/v1 or http://127.0.0.1:8000/v1.",
    ),
]
_Judge = Annotated[
    str,
    typer.Option("--judge", metavar="NAME", help="The judge's name at the endpoint.", show_default=False),
]
_Out = Annotated[
    Path,
    typer.Option(help="Folder of replies and judgments; the same command goes on where it was stopped."),
]
_Category = Annotated[
    str | None, typer.Option(help="Of Arena-Hard v2.0: judge this one alone, against its own baseline.")
]
_Template = Annotated[
    Path | None,
    typer.Option(
        help="The judge's prompt: AlpacaEval's alpaca_eval_clf.txt, Arena-Hard's judge_config.yaml, or yours."
    ),
]
_KeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable with the endpoint's key.")
]
_JudgeTemperature = Annotated[
    float | None, typer.Option(min=0, help="Default: 1 for AlpacaEval, 0 for Arena-Hard.")
]
_MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest reply; default: 1 for AlpacaEval, 4096 for Arena-Hard."),
]
_Logprobs = Annotated[
    bool,
    typer.Option(help="AlpacaEval: weigh the verdict by the judge's log-probs, or take the letter it wrote."),
]
_Retries = Annotated[
    int,
    typer.Option(
        min=0, help="How often a request is sent again that got no answer, a limit of rates included."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(judge)


def judge(
    answers: _Answers,
    baseline: _Baseline,
    endpoint: _EndpointUrl,
    judge_model: _Judge,
    out: _Out,
    questions: Annotated[Path | None, typer.Option(help="Arena-Hard's question.jsonl.")] = None,
    category: _Category = None,
    template: _Template = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the endpoint's key.")] = None,
    key_env: _KeyEnv = None,
    temperature: _JudgeTemperature = None,
    max_tokens: _MaxTokens = None,
    logprobs: _Logprobs = True,
    concurrency: Annotated[int, typer.Option(min=1, help="Comparisons under way at a time.")] = 8,
    retries: _Retries = 8,
    timeout_s: Annotated[float, typer.Option(min=1, help="Limit of one request in seconds.")] = 600,
    again: Annotated[
        bool, typer.Option("--again", help="Ask once more where an earlier command got no verdict.")
    ] = False,
) -> None:
    """Judge every answer against the baseline's, and write the benchmark's own files of judgments.

    AlpacaEval: OUT/annotations.json, one comparison each, in an order drawn from the instruction. Arena-Hard:
    OUT/model_judgment/JUDGE/MODEL.jsonl, two games each, both orders. Replies are kept as they come, never paid twice.
    Next: rto score.
    """
    from rto_megatron.benchmarks.chat_endpoint import Endpoint
    from rto_megatron.benchmarks.judge import judge as judge_answers
    from rto_megatron.benchmarks.judge import read_task
    from rto_megatron.benchmarks.judge_templates import own_template, read_template
    from rto_megatron.lifecycle.run_lock import held
    from rto_megatron.reporting.progress import progress

    url, key = _url(endpoint), _key(key_file, key_env)
    _warn_of_open_key(url, key)
    task = read_task(answers, baseline, questions, category)
    benchmark = task.answers.benchmark
    chosen = own_template(benchmark) if template is None else read_template(template)
    options = _options(benchmark, judge_model, temperature, max_tokens, logprobs)

    def bar(total: int, known: int) -> "AbstractContextManager[Advance]":
        return progress("judge", total, True, done=known)

    with held(out):
        asked = Endpoint(url, key, concurrency, retries, timeout_s)
        outcome = judge_answers(task, asked, chosen, options, out, again, bar)
    _tell(outcome, chosen.source)


def _options(
    benchmark: "Benchmark", model: str, temperature: float | None, max_tokens: int | None, logprobs: bool
) -> "JudgeOptions":
    from rto_megatron.benchmarks.judging import JudgeOptions

    is_pairwise = benchmark == "alpaca_eval"
    if not logprobs and not is_pairwise:
        raise RecipeError("--no-logprobs is of AlpacaEval's judge; Arena-Hard's verdicts are words")
    return JudgeOptions(
        model,
        (1.0 if is_pairwise else 0.0) if temperature is None else temperature,
        max_tokens or (1 if is_pairwise else 4096),
        has_logprobs=is_pairwise and logprobs,
    )


def _url(endpoint: str) -> str:
    from rto_megatron.config.addresses import without_localhost

    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_sound_port(parts):
        raise RecipeError(f"--endpoint {endpoint}: expected an address as https://api.openai.com/v1")
    if parts.username or parts.password:
        raise RecipeError(
            "--endpoint holds a name or password before an @; give the key by --key-file or --key-env"
        )
    return without_localhost(endpoint).removesuffix("/chat/completions")


def _has_sound_port(parts: urllib.parse.SplitResult) -> bool:
    """None is sound: the scheme has one."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _key(key_file: Path | None, key_env: str | None) -> str | None:
    if key_file is not None and key_env is not None:
        raise RecipeError("--key-file and --key-env both give a key; remove one")
    if key_env is not None:
        if not (key := os.environ.get(key_env, "").strip()):
            raise MachineError(f"--key-env {key_env}: the environment has no such variable, or it is empty")
        return key
    if key_file is None:
        return None
    try:
        key = key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(f"--key-file {key_file} cannot be read ({error})") from error
    if not key or not key.isprintable():
        raise MachineError(f"--key-file {key_file} holds no key: expected one line of text")
    return key


def _warn_of_open_key(url: str, key: str | None) -> None:
    parts = urllib.parse.urlsplit(url)
    if key is not None and parts.scheme == "http" and parts.hostname not in _LOCAL:
        typer.echo(
            f"warning: the key travels to {parts.hostname} in the open; use https where others share the network"
        )


def _tell(outcome: "JudgeOutcome", template: str) -> None:
    typer.echo(f"{outcome.path}: {outcome.num_comparisons} comparisons, judged by the template {template}")
    typer.echo(f"this command: {outcome.use}; before: {outcome.use_before}")
    if not outcome.unjudged:
        return
    typer.echo(
        f"{len(outcome.unjudged)} questions have no verdict in at least one comparison, the judge said:"
    )
    for key, said in list(outcome.unjudged.items())[:_SHOWN]:
        typer.echo(f"  {key!r:.60}: {said!r:.160}")
    if outcome.num_unjudged * 2 > outcome.num_comparisons:
        raise JudgeError(
            "more than half of the comparisons have no verdict; take another judge or --template, or --again"
        )
