"""What a reader copies from the pages is taken: settings by `rto check`, keys by recipes, commands by parsers."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from configuration_keys import stage_keys
from test_docs import PAGES
from test_house import RECIPES, ROOT
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import STAGES
from rto_megatron.errors import UserError

# Dense, of 80 layers, of experts: settings are pasted into the first of them that takes them.
BASES = [ROOT / f"launchers/recipes/{name}/rto.yaml" for name in ("llama3_8b", "llama3_70b", "qwen3_30b_a3b")]
KEYS = {key for stage in STAGES.values() for key in stage_keys(stage)}
SECTIONS = {key.partition(".")[0] for key in KEYS}
VARIABLES = {
    f"vars.{name}" for recipe in RECIPES for name in yaml.safe_load(recipe.read_text()).get("vars") or {}
}
PROGRAMS = ("bash", "python", ".venv/bin/python")  # of which the next word says what runs
FILES = (".py", ".lock")  # evaluate.py and run.lock are no keys
# Options that a page says of other programs.
FOREIGN = {
    "Megatron-LM": "load use-checkpoint-args norm-epsilon qk-layernorm moe-shared-expert-gate use-rope-scaling "
    "tokenizer-model rope-scaling-factor seq-length",
    "vLLM": "max-model-len disable-log-stats enable-sleep-mode",
    "torchrun": "signals-to-handle",
    "SLURM and containers": "gres export nv ipc",
}


def unfolded(page: Path) -> str:
    """A page without diffs, which are applied elsewhere, and without the files that its commands write."""
    text = re.sub(r"^```diff\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<<'END'.*?^END$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """What stands between fences, but for pictures, or is indented."""
    text = unfolded(page)
    fenced = re.findall(r"^```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(one) for one in [*fenced, *re.findall(r"\n\n((?: {4}.*\n+)+)", rest)]]


def spans(page: Path) -> list[str]:
    """What stands between backticks in a sentence."""
    return [re.sub(r"\s+", " ", one) for one in re.findall(r"(?<!`)`([^`]+)`(?!`)", unfolded(page))]


def settings(page: Path) -> list[str]:
    """The blocks that open with a key: a recipe's part. Rows of JSON and what programs print do not."""
    return [one for one in blocks(page) if re.match(r"(#.*\n)*[a-z_]+:(\s|$)", one)]


def with_settings(base: Path, block: str) -> str:
    """A recipe in which the sections of a block stand in place of its own."""
    return yaml.safe_dump(yaml.safe_load(base.read_text()) | yaml.safe_load(block))


def is_taken(block: str, folder: Path) -> bool:
    """Whether `rto check` finds some recipe sound with it; the functions that it names stand in `folder`."""
    recipe = folder / "pasted.yaml"
    for base in BASES:
        recipe.write_text(with_settings(base, block))
        shown = CliRunner().invoke(app, ["check", str(recipe)])
        if shown.exit_code == 0:
            return True
        assert isinstance(shown.exception, UserError), shown.exception
        print(base, shown.exception)
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if settings(page)], ids=lambda page: page.stem)
def test_settings_of_a_page_are_taken_by_a_recipe(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = [one for one in blocks(page) if one.startswith("def ")]
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards/rules.py").write_text("\n".join(code))
    assert [block for block in settings(page) if not is_taken(block, tmp_path)] == []


@pytest.mark.parametrize("block", ["parallel: {tensr: 2}", "paralel: {tensor: 2}", "parallel: {tensor: 3}"])
def test_settings_that_no_recipe_takes_are_seen(block: str, tmp_path: Path) -> None:
    assert not is_taken(block, tmp_path)


def said_keys(page: Path) -> set[str]:
    """The dotted keys that sentences name, alone or with a value."""
    found = (re.match(r"((?:\w+\.)+\w+)(?:$|: |=)", one) for one in spans(page))
    keys = {one[1] for one in found if one and one[1].partition(".")[0] in {*SECTIONS, "vars"}}
    return {key for key in keys if not key.endswith(FILES)}


def is_key(key: str) -> bool:
    """Whether it is a key of some stage, a section of one, or a variable of a shipped recipe."""
    key = re.sub(r"\.\d+\..*", "", key)  # a part of a list's entry
    return key in KEYS | VARIABLES or any(one.startswith(f"{key}.") for one in KEYS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_that_a_page_names_are_keys(page: Path) -> None:
    assert sorted(key for key in said_keys(page) if not is_key(key)) == []


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Words of each command with whether it stands whole in a block; in a sentence it may lack arguments."""
    for block in blocks(page):
        for line in with_variables(block.replace("\\\n", " ")).splitlines():
            yield from ((words, True) for words in words_of(line))
    for span in spans(page):
        yield from ((words, False) for words in words_of(span))


def with_variables(block: str) -> str:
    """A block with the values of the variables that its lines set where they are used."""
    for name, quoted, plain in re.findall(r'\b([A-Z]+)=(?:"([^"]*)"|(\S+))', block):
        block = block.replace(f"${name}", quoted or plain)
    return block


def words_of(line: str) -> Iterator[list[str]]:
    """Words of the commands of a line of bash, without what is left to the reader: `...`, brackets around an option."""
    lexer = shlex.shlex(re.sub(r" \[([^\]]*)\]", r" \1", line), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe: a sentence
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set("();<>|&"):
            if command:
                yield command
            command = []
        elif word not in ("...", "key=value", "do", "${pool[@]}", "${answers[@]}") and (
            command or not re.fullmatch(r"[A-Z_]+=.*", word)
        ):
            command.append("1" if re.fullmatch("[A-Z]", word) else word)


def problems_of(words: list[str], whole: bool) -> list[str]:
    """What our program, the recipe that is named or the disk has against a command."""
    here = [word for word in words if re.match(r"(launchers|tools)/\w", word) and "NAME" not in word]
    found = [f"{word} is not there" for word in here if not any(ROOT.glob(with_stars(word)))]
    first, *rest = words[1:] if words[0] in PROGRAMS and words[1:] else words
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if first.startswith("--"):
        return [] if first.partition("=")[0] in OPTIONS else [f"nothing has an option {first}"]
    if found or (rest and not re.fullmatch("[a-z].*", rest[0]) and first.endswith("rto")):
        return found  # or it is a line of progress
    if first.endswith("launchers/local.sh") and rest:
        first, rest = "rto", ["launch", *rest]
    if first.removeprefix(".venv/bin/") == "rto":
        whole = whole and "--help" not in rest
        rest = [word for word in rest if word != "--help"]
        return [*usage_errors(rest, whole), *recipe_errors(rest)]
    if first.startswith(("launchers/", "tools/")):
        own = OPTIONS_OF.get(first, set())
        return [f"{first} has no option {one}" for one in options if one not in own]
    return []


def with_stars(path: str) -> str:
    """A path as a pattern, with a star for each variable of the shell."""
    return re.sub(r"\$\w+", "*", path)


def usage_errors(arguments: list[str], whole: bool = True) -> list[str]:
    """What the program has against the arguments, which it reads and does not act upon."""
    place, rest, names = typer.main.get_command(app), list(arguments), "rto"
    while rest and (found := getattr(place, "commands", {}).get(rest[0])) is not None:
        place, names, rest = found, f"{names} {rest[0]}", rest[1:]
    if hasattr(place, "commands") and rest:
        return [f"{names} has no command {rest[0]}"]
    if not whole and not rest:
        return []
    try:
        place.make_context(names, rest)
    except Exception as error:  # of click or of typer's copy of it
        is_short = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError") or "requires" in str(
            error
        )
        return [] if is_short and not whole else [f"{names}: {error!r}"]
    return []


def recipe_errors(arguments: list[str]) -> list[str]:
    """What a recipe has against the keys that a command replaces; where none is named, any is meant."""
    overrides = [word for word in arguments if re.match(r"[a-z]\w*(\.\w+)*=", word) and "$" not in word]
    if not overrides:
        return []  # all recipes are loaded by test_house.py
    named = [found for word in arguments if word.endswith(".yaml") for found in ROOT.glob(with_stars(word))]
    try:
        load_recipe(named[0] if named else BASES[0], overrides)
    except UserError as error:
        return [str(error)]
    return []


def options_of_commands(place: object) -> set[str]:
    """Every option of a command of `rto` and of those below it."""
    own = {name for one in vars(place)["params"] for name in [*one.opts, *one.secondary_opts]}
    below = vars(place).get("commands", {}).values()
    return {"--help"} | own | {name for command in below for name in options_of_commands(command)}


def options_in(script: Path) -> set[str]:
    """The options that a tool, or another tool that it imports, adds to its parser, or that a launcher tells apart."""
    text = script.read_text()
    if script.suffix == ".sh":
        return set(re.findall(r"(--[a-z-]+)\)", text))
    others = [
        script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)
    ]
    own = set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)", text))
    return own.union(*(options_in(other) for other in others if other.exists()))


SCRIPTS = [*ROOT.glob("tools/*.py"), *ROOT.glob("launchers/*.sh")]
OPTIONS_OF = {str(script.relative_to(ROOT)): options_in(script) for script in SCRIPTS}
OPTIONS = {f"--{name}" for names in FOREIGN.values() for name in names.split()}.union(
    options_of_commands(typer.main.get_command(app)), *OPTIONS_OF.values()
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_commands_with_these_options_recipes_and_keys(page: Path) -> None:
    assert [one for words, whole in commands(page) for one in problems_of(words, whole)] == []


@pytest.mark.parametrize(
    "line",
    [
        "rto launc RECIPE",
        "rto data pairs FILE --nothing",
        "rto data pairs FILE",  # without --prompts
        "rto check launchers/recipes/llama3_8b/nothing.yaml",
        "rto check RECIPE optimizer.lrr=1e-6",
        "bash launchers/local.sh launchers/recipes/real_text/$stage.yaml vars.nothing=1",
        "bash launchers/quickstart.sh --nothing",
        "bash launchers/nothing.sh",
        ".venv/bin/python tools/growth.py --nothing",
        "--nothing",
    ],
)
def test_commands_that_are_none_are_seen(line: str) -> None:
    (words,) = words_of(line)
    assert problems_of(words, whole=True) != []
