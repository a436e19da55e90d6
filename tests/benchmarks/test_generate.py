"""`rto generate`: the files of each benchmark, kills and resumes, and what it refuses; engines without a model."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from benchmarks.made_files import INSTRUCTIONS, alpaca_outputs, arena_questions, read_lines, rto, write_json
from generation.canned import CannedServer, choice
from tiny_models import write_llama

from rto_megatron.benchmarks.answer_files import read_answers
from rto_megatron.benchmarks.generate import GenerationChoices, generate
from rto_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from rto_megatron.errors import DataError, MachineError, PoolError, RecipeError, RunFolderError
from rto_megatron.generation.contract import Arrived, RolloutEngine, Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.types import Prompt, Rollout

VERSION = 4
EOS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that can say anything."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    train_tokenizer(
        ["Say Ask one two three four five six # * ** ?.0123"] * 3, folder, 400, byte_fallback=True
    )
    write_llama(folder, vocab_size=448)
    return folder


class TellingEngine(ScriptedEngine):
    """Tells of each response, every second one first, and is killed after `num_told`."""

    def __init__(self, num_told: int | None = None) -> None:
        super().__init__(vocab_size=300, version=VERSION)
        self.num_told = num_told
        self.asked: list[tuple[str, ...]] = []
        self.samplings: list[Sampling] = []

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, arrived: Arrived
    ) -> list[Rollout]:
        self.asked.append(tuple(one.id for one in prompts))
        self.samplings.append(sampling)
        rollouts = self.generate(prompts, sampling, version)
        for place in (*range(1, len(prompts), 2), *range(0, len(prompts), 2)):
            if self.num_told == 0:
                raise PoolError("the pool was killed")
            arrived(place, rollouts[place])
            self.num_told = None if self.num_told is None else self.num_told - 1
        return rollouts


def run(
    model: Path, prompts: Path, out: Path, engine: RolloutEngine | None, weights: str = "w", **chosen: object
) -> Path:
    out.mkdir(exist_ok=True)

    @contextmanager
    def open_pool(longest: int) -> Iterator[tuple[RolloutEngine, int]]:
        assert engine is not None, "there is nothing to ask"
        assert longest <= 256
        yield engine, VERSION

    options = {"temperature": None, "max_tokens": 12, "seed": 0, "count_tokens": "model", **chosen}
    return generate(model, weights, prompts, out, GenerationChoices("tiny", **options), open_pool)


def test_alpaca_eval_gets_its_outputs_in_order_with_the_papers_decoding(model: Path, tmp_path: Path) -> None:
    questions = [{"instruction": text, "dataset": "koala", "output": "theirs"} for text in INSTRUCTIONS]
    prompts = write_json(tmp_path / "alpaca_eval.json", questions)
    engine = TellingEngine()
    path = run(model, prompts, tmp_path / "out", engine)
    rows = json.loads(path.read_text())
    assert path == tmp_path / "out/model_outputs.json"
    assert [(one["instruction"], one["generator"], one["dataset"]) for one in rows] == [
        (text, "tiny", "koala") for text in INSTRUCTIONS
    ]
    (sampling,) = engine.samplings
    assert (sampling.temperature, sampling.max_tokens, sampling.eos_ids) == (0.7, 12, (EOS,))
    tokenizer = load_tokenizer(model)
    template = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in INSTRUCTIONS
    ]
    drawn = ScriptedEngine(300, VERSION).generate(
        [Prompt(str(place), tuple(ids)) for place, ids in enumerate(template)], sampling, VERSION
    )
    texts = [
        tokenizer.decode([one for one in r.response_ids if one != EOS], skip_special_tokens=True)
        for r in drawn
    ]
    assert [one["output"] for one in rows] == texts
    assert read_answers(path).by_key[INSTRUCTIONS[2]].text == texts[2]


@pytest.mark.parametrize("version", ["v0.1", "v2.0"])
def test_arena_hard_gets_answers_with_counts_of_style(version: str, model: Path, tmp_path: Path) -> None:
    prompts = arena_questions(tmp_path / "question.jsonl", version)
    engine = TellingEngine()
    path = run(model, prompts, tmp_path / "out", engine)
    assert path == tmp_path / "out/model_answer/tiny.jsonl"
    assert engine.samplings[0].temperature == 0
    answers = read_answers(path)
    tokenizer = load_tokenizer(model)
    assert list(answers.by_key) == ["q0", "q1", "q2"] and answers.model == "tiny"
    for row, answer in zip(read_lines(path), answers.by_key.values(), strict=True):
        style = row["conv_metadata" if version == "v0.1" else "metadata"]
        assert isinstance(style, dict)
        assert list(style) == ["token_len", "header_count", "list_count", "bold_count"]
        assert style["token_len"] == len(tokenizer.encode(answer.text, add_special_tokens=False))
    if version == "v0.1":
        assert {"question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"} == row.keys()
    else:
        assert {"uid", "ans_id", "model", "messages", "tstamp", "metadata"} == row.keys()


def test_a_generation_that_was_killed_goes_on_and_ends_as_one_that_was_not(
    model: Path, tmp_path: Path
) -> None:
    prompts = alpaca_outputs(tmp_path / "questions.json", "none")
    whole = run(model, prompts, tmp_path / "whole", TellingEngine()).read_text()
    killed = TellingEngine(num_told=2)
    with pytest.raises(PoolError, match="killed"):
        run(model, prompts, tmp_path / "out", killed)
    assert not (tmp_path / "out/model_outputs.json").exists()
    with (tmp_path / "out/answers.jsonl").open("a") as file:
        file.write('{"key": "Say one.", "ans')
    rest = TellingEngine()
    assert run(model, prompts, tmp_path / "out", rest).read_text() == whole
    assert rest.asked == [("0", "2", "4", "5")]
    assert run(model, prompts, tmp_path / "out", None).read_text() == whole
    # An engine that tells of nothing before its end draws the same.
    assert run(model, prompts, tmp_path / "plain", ScriptedEngine(300, VERSION)).read_text() == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"temperature": 0.1}, "temperature was 0.7, now 0.1"),
        ({"weights": "others"}, "weights was 'w', now 'others'"),
    ],
)
def test_another_generation_in_the_same_folder_is_refused(
    change: dict[str, object], said: str, model: Path, tmp_path: Path
) -> None:
    prompts = alpaca_outputs(tmp_path / "questions.json", "none")
    run(model, prompts, tmp_path / "out", TellingEngine())
    with pytest.raises(RunFolderError, match=said):
        run(model, prompts, tmp_path / "out", None, **change)


def test_what_could_not_begin_leaves_the_folder_to_another_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the error about tiktoken's vocabulary advises, with the same --out."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    questions, out = arena_questions(tmp_path / "q.jsonl", "v0.1"), tmp_path / "out"
    with pytest.raises(MachineError, match="--count-tokens model"):
        run(model, questions, out, None, count_tokens=None)
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "Say one. " * 200}]))
    with pytest.raises(DataError, match="takes 256 in all"):
        run(model, tmp_path / "long.json", out, None)
    assert run(model, questions, out, TellingEngine()).name == "tiny.jsonl"


def test_long_questions_leave_fewer_tokens_and_too_long_ones_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_json(tmp_path / "q.json", [{"instruction": "one"}, {"instruction": "one " * 60}])
    engine = TellingEngine()
    run(model, prompts, tmp_path / "out", engine, max_tokens=220)
    assert sorted(one.max_tokens for one in engine.samplings)[1] == 220
    assert sorted(one.max_tokens for one in engine.samplings)[0] < 220
    assert "fewer than 220 tokens to the answers of 1 questions" in capsys.readouterr().out
    write_json(prompts, [{"instruction": "one"}, {"instruction": "one " * 600}])
    with pytest.raises(DataError, match=r"q\.json row 2: the prompt has \d+ tokens"):
        run(model, prompts, tmp_path / "new", engine)


def test_questions_of_similar_lengths_go_to_the_pool_together(model: Path, tmp_path: Path) -> None:
    questions = [{"instruction": "one " * count} for count in (1, 64, 65, 66)]
    engine = TellingEngine()
    run(model, write_json(tmp_path / "q.json", questions), tmp_path / "out", engine, max_tokens=220)
    assert engine.asked == [("0",), ("1", "2", "3")]
    assert [one.max_tokens for one in engine.samplings] == [220, 128]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "one"}], "expected instruction .AlpacaEval."),
        (
            [{"instruction": "a"}, {"instruction": "a"}, {"instruction": ""}],
            r"(?s)row 3: instruction is ''.*'a' is there",
        ),
        ([{"question_id": "q", "turns": [{"content": "a"}, {"content": "b"}]}], "expected a list of one"),
    ],
)
def test_files_without_questions_are_refused(
    rows: list[dict[str, object]], said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        run(model, write_json(tmp_path / "q.json", rows), tmp_path / "out", None)


@pytest.fixture
def server() -> Iterator[CannedServer]:
    """A server that answers everything with three tokens and the end."""
    canned = CannedServer(lambda seed: choice([40, 41, 42, EOS], "stop"))
    yield canned
    canned.close()


def test_a_token_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    files = ("--prompts", tmp_path / "none.json", "--out", tmp_path / "out")
    with pytest.raises(
        PoolError, match=r"no token file at \S+nothing; name the one that the pool was started with"
    ):
        rto(
            "generate",
            tmp_path,
            *files,
            "--server",
            "http://127.0.0.1:9",
            "--token-file",
            tmp_path / "nothing",
        )
    assert not (tmp_path / "out").exists()


def test_the_command_asks_a_running_pool(model: Path, server: CannedServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 40)
    (tmp_path / "token").chmod(0o600)
    prompts = alpaca_outputs(tmp_path / "questions.json", "none")
    arguments = ("generate", model, "--prompts", prompts, "--out", tmp_path / "out")
    running = ("--server", server.address, "--token-file", tmp_path / "token", "--max-tokens", 8)
    shown = rto(*arguments, *running)
    assert "holds weights of version 4" in shown
    rows = json.loads((tmp_path / "out/model_outputs.json").read_text())
    text = load_tokenizer(model).decode([40, 41, 42], skip_special_tokens=True)
    assert [(one["output"], one["generator"]) for one in rows] == [(text, "tiny")] * len(INSTRUCTIONS)
    assert len(server.seeds) == len(set(server.seeds)) == len(INSTRUCTIONS)
    journal = tmp_path / "out/answers.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    server.version = "5"  # the trainer whose pool it is pushed meanwhile
    with pytest.raises(RunFolderError, match=r"weights of version 5, and .* has answers by version 4"):
        rto(*arguments, *running)
    server.version = "default"
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(PoolError, match=r"random ones, until a trainer pushes.*--load-weights"):
        rto(*arguments, *running)
    with pytest.raises(RecipeError, match="belong together"):
        rto(*arguments, "--server", server.address)
    with pytest.raises(RecipeError, match="becomes a file's name"):
        rto(*arguments, "--name", "org/model")
    with pytest.raises(
        RecipeError, match=r"--pool-servers, --pool-tensor, --dtype: without effect on the running"
    ):
        rto(*arguments, *running, "--pool-servers", 2, "--pool-tensor", "2", "--dtype", "fp32")
