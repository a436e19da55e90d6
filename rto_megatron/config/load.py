"""Recipes: read a YAML file, apply dotted overrides, validate, and report every problem at once.

A recipe may hold a `vars` section with names of its own (`${vars.root}/sft`); it is resolved and removed
before the configuration is validated. Other interpolations name keys of the same file; resolvers such as
`${oc.env:X}` are refused, because the resolved configuration is saved beside the run. `overrides.py` says how the
values of overrides are read.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from rto_megatron.config.facts import facts_of
from rto_megatron.config.overrides import (
    VARIABLES,
    Override,
    as_lists,
    escaped,
    interpolations,
    is_variable,
    is_whole_reference,
    merged,
    split,
    text_keys,
    typed,
    without_rivals,
)
from rto_megatron.config.problems import Origin, all_keys, describe, suggestion, truth_values
from rto_megatron.config.recipes import require_recipe
from rto_megatron.config.reward_code import with_code
from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.config.schema import STAGES, Stage
from rto_megatron.config.source_names import absolute
from rto_megatron.errors import RecipeError

Tree = dict[str, object]

# Keys that hold a path of this machine; the others (models, data) may also name something on the hub, so they
# are made absolute only if they exist.
_LOCAL_PATHS = ("run.dir", "rollout.token_file", "evaluate.true_reward", "data.true_reward", "data.cache")
_SOURCES = ("train", "eval", "pretrain")  # of section `data`
_DEEPEST = 20
_MODELS = ("policy", "reference", "critic", "reward", "dpo", "dpo_reference")


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> Stage:
    """Read `recipe`, apply `overrides` (`a.b=value`) and return the validated configuration of its stage.

    Relative paths are taken from the current directory, not from the recipe's folder.

    Raises:
        RecipeError: the file, an override or any key is wrong; all problems are listed, one a line.
    """
    tree, origin = _read(recipe, overrides)
    name = tree.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        hint = suggestion(str(name), STAGES)
        raise RecipeError(
            f"{origin.of('stage')}: stage: found {name!r}; must be one of {', '.join(STAGES)}{hint}"
        )
    for key in _LOCAL_PATHS:
        _make_absolute(tree, key, only_if_present=False)
    for role in _MODELS:
        _make_absolute(tree, f"models.{role}", only_if_present=True)
    if isinstance(data := tree.get("data"), dict):
        data |= {key: _absolute_sources(data[key]) for key in _SOURCES if key in data}
    config = _validate(STAGES[name], tree, origin)
    if (sampling := facts_of(config).sampling) is None:
        return config
    return sampling.model_copy(update={"rewards": with_code(sampling.rewards)})


def load_stage[S: Stage](recipe: Path, kind: type[S], overrides: Sequence[str] = ()) -> S:
    """Does what `load_recipe` does, for a caller that runs one kind of stage alone.

    Raises:
        RecipeError: as `load_recipe`; or the recipe is of another kind.
    """
    config = load_recipe(recipe, overrides)
    if not isinstance(config, kind):
        known = ", ".join(name for name, stage in STAGES.items() if issubclass(stage, kind))
        raise RecipeError(f"{recipe}: found stage {config.stage}; expected one of {known}")
    return config


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML that `load_recipe` reads back to an equal configuration."""
    # OmegaConf reads 1e5 as a number, which YAML 1.1 takes for text: its own writer quotes such text.
    tree = {key: _escaped(value) for key, value in config.model_dump(mode="json").items()}
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def save(config: BaseModel, run_dir: Path) -> Path:
    """Write the resolved configuration to `run_dir`/config.yaml and return its path."""
    make_run_folder(run_dir)
    path = run_dir / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    return path


def _validate(stage: type[Stage], tree: Tree, origin: Origin) -> Stage:
    try:
        config = stage.model_validate(tree)
    except ValidationError as error:
        problems = [describe(entry, stage, origin) for entry in error.errors(include_url=False)]
    else:
        problems = [
            f"{origin.of(key)}: {key}: found a truth value (true, yes or on; false, no or off); must be a number"
            for key in truth_values(tree, config.model_dump())
        ]
        if not problems:
            return config
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise RecipeError(
        f"{origin.recipe}: {count} in the configuration\n" + "\n".join(f"  {p}" for p in problems)
    )


def _read(recipe: Path, overrides: Sequence[str]) -> tuple[Tree, Origin]:
    require_recipe(recipe)
    try:
        text = recipe.read_text(encoding="utf-8")
        _refuse_bombs(recipe, text)
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
        from_file = OmegaConf.create(text)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{recipe}: cannot be read as YAML: {error}") from error
    if not isinstance(from_file, DictConfig) or not from_file:
        raise RecipeError(f"{recipe}: holds no `key: value` pairs; see launchers/recipes for examples")
    given = [split(override) for override in overrides]
    origin = Origin(recipe, lines, frozenset(override.key for override in given))
    _refuse_empty(((one.key, one.value.strip()) for one in given), origin)
    try:
        text_of_stage = _text_keys(from_file, given)
        tree = merged(without_rivals(from_file, given), given, text_of_stage)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{' '.join(overrides)}: cannot be applied to {recipe}: {error}") from error
    _refuse_unknown_interpolations(from_file, tree, origin)
    _refuse_dangling(tree, origin)
    try:
        resolved = _resolved(tree, text_of_stage)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{recipe}: {error}") from error
    _refuse_empty_text(resolved, text_of_stage, origin)
    return {key: value for key, value in resolved.items() if key != VARIABLES}, origin


def _text_keys(from_file: DictConfig, overrides: Sequence[Override]) -> frozenset[str]:
    """The keys of text of the recipe's stage, which overrides may name themselves, by a variable too."""
    naming = [one for one in overrides if one.key == "stage" or is_variable(one.key)]
    tree = merged(from_file, naming, frozenset({"stage"}))
    try:
        stage = OmegaConf.select(tree, "stage")
    except OmegaConfBaseException:  # the interpolation is refused with all others
        stage = None
    return frozenset({"stage", *(text_keys(STAGES[stage]) if stage in STAGES else ())}) - as_lists(overrides)


def _resolved(tree: DictConfig, text: frozenset[str]) -> Tree:
    """The recipe's tree without interpolations.

    A variable of the command line is text; where it is all of a value that is not, it is read as that would be.
    """
    plain = _plain(OmegaConf.to_container(tree, resolve=True))
    for key, value in all_keys(_plain(OmegaConf.to_container(tree, resolve=False))):
        parent, leaf = _section_of(plain, key)
        if key not in text and not is_variable(key) and is_whole_reference(value):
            found = parent.get(leaf)
            parent[leaf] = typed(found) if isinstance(found, str) else found
    return plain


def _plain(tree: object) -> Tree:
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _section_of(tree: Tree, key: str) -> tuple[Tree, str]:
    """The section that holds a key, and the key's name in it; sections of a list have numbers for names."""
    *parents, leaf = key.split(".")
    section: object = tree
    for name in parents:
        section = section[int(name)] if isinstance(section, list) else _plain(section)[name]
    assert isinstance(section, dict)
    return section, leaf


def _refuse_empty_text(tree: Tree, text: frozenset[str], origin: Origin) -> None:
    """An empty path would be the working directory."""
    _refuse_empty(((key, value) for key, value in all_keys(tree) if key in text or is_variable(key)), origin)


def _refuse_empty(values: Iterable[tuple[str, object]], origin: Origin) -> None:
    """A variable that the shell does not know leaves nothing behind a key, which YAML reads as null."""
    problems = [
        f"{origin.of(key)}: {key}: is empty; give a value, or null for none"
        for key, value in values
        if value == ""
    ]
    if problems:
        raise RecipeError("\n".join(problems))


def _refuse_bombs(recipe: Path, text: str) -> None:
    """Aliases of aliases grow without bound when they are resolved, and nesting does in the parser."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(
                f"{recipe}:{line}: found the alias *{event.anchor}; recipes have none, write ${{vars.name}} instead"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RecipeError(f"{recipe}:{line}: is nested deeper than {_DEEPEST} levels, recipes have three")


def _refuse_unknown_interpolations(from_file: DictConfig, tree: DictConfig, origin: Origin) -> None:
    """A variable is for the recipe's own keys: one whose users were all replaced by overrides is no mistake."""
    used = {name for _, name in _references(tree)}
    for key, name in _references(tree):
        if ":" in name:
            raise RecipeError(
                f"{origin.of(key)}: {key}: found ${{{name}}}; only names of keys may stand in ${{...}}, and \\${{ is a "
                "plain ${"
            )
    known = used | {name for _, name in _references(from_file)}
    variables = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(variables, dict)
    for name in variables.get(VARIABLES) or ():
        own = f"{VARIABLES}.{name}"
        if not any(one == own or one.startswith(f"{own}.") for one in known):
            hint = suggestion(str(name), [n.removeprefix(f"{VARIABLES}.") for n in known])
            raise RecipeError(f"{origin.of(own)}: {own}: no key uses ${{{own}}}{hint}")


def _refuse_dangling(tree: DictConfig, origin: Origin) -> None:
    """OmegaConf's own message names neither the place nor what there is."""
    known = {key for key, _ in all_keys(_plain(OmegaConf.to_container(tree, resolve=False)))}
    sections = {key[:end] for key in known for end in range(len(key)) if key[end] == "."}
    own = sorted(key.removeprefix(f"{VARIABLES}.") for key in known if is_variable(key))
    problems = []
    for key, name in _references(tree):
        if name in known | sections or not re.fullmatch(r"\w+(\.\w+)*", name):
            continue
        # `vars.` alone would make every variable like every other.
        near = (
            suggestion(name.removeprefix(f"{VARIABLES}."), own, VARIABLES)
            if is_variable(name)
            else suggestion(name, known)
        )
        hint = near or (f"; {VARIABLES} has {', '.join(own)}" if own else "; there are no vars")
        problems.append(f"{origin.of(key)}: {key}: found ${{{name}}}; there is no key {name}{hint}")
    if problems:
        raise RecipeError("\n".join(problems))


def _references(tree: DictConfig) -> list[tuple[str, str]]:
    """Every key whose value holds `${name}`, with the name."""
    pairs = all_keys(_plain(OmegaConf.to_container(tree, resolve=False)))
    return [(key, name) for key, value in pairs if isinstance(value, str) for name in interpolations(value)]


def _escaped(value: object) -> object:
    """Text in which `${` stands for itself, all through a tree."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escaped(value) if isinstance(value, str) else value


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted keys of a YAML document with the line each is on."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _lines(value, f"{dotted}.")
    elif isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield f"{prefix}{number}", entry.start_mark.line + 1
            yield from _lines(entry, f"{prefix}{number}.")


def _make_absolute(tree: Tree, key: str, only_if_present: bool) -> None:
    parent, _, leaf = key.rpartition(".")
    section = tree.get(parent)
    if isinstance(section, dict) and isinstance(section.get(leaf), str):
        path = Path(section[leaf]).expanduser()
        if path.exists() or not only_if_present:
            section[leaf] = str(path.absolute())


def _absolute_sources(given: object) -> object:
    """The same names of data, alone, in a list, or with weights."""
    if isinstance(given, str):
        return absolute(given)
    if isinstance(given, list):
        return [_absolute_sources(entry) for entry in given]
    if isinstance(given, dict) and isinstance(given.get("source"), str):
        return {**given, "source": absolute(given["source"])}
    return given
