"""Recipes: read a YAML file, apply dotted overrides, validate, and report every problem at once.

A recipe may hold a `vars` section with names of its own (`${vars.root}/sft`); it is resolved and removed
before the configuration is validated. Other interpolations name keys of the same file; resolvers such as
`${oc.env:X}` are refused, because the resolved configuration is saved beside the run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from rto_megatron.config.problems import Origin, all_keys, describe, suggestion
from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.config.schema import STAGES, Stage
from rto_megatron.errors import UserError

Tree = dict[str, object]

# Keys that hold a path of this machine; the others (models, data) may also name something on the hub, so they
# are made absolute only if they exist.
_LOCAL_PATHS = ("run.dir", "rollout.token_file", "evaluate.true_reward", "data.true_reward")
_PATHS_OR_HUB_NAMES = ("data.train", "data.eval", "data.pretrain")
_DEEPEST = 20
_MODELS = ("policy", "reference", "critic", "reward", "dpo", "dpo_reference")


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> Stage:
    """Read `recipe`, apply `overrides` (`a.b=value`) and return the validated configuration of its stage.

    Relative paths are taken from the current directory, not from the recipe's folder.

    Raises:
        UserError: the file, an override or any key is wrong; all problems are listed, one a line.
    """
    tree, origin = _read(recipe, overrides)
    name = tree.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        hint = suggestion(str(name), STAGES)
        raise UserError(
            f"{origin.of('stage')}: stage: found {name!r}; must be one of {', '.join(STAGES)}{hint}"
        )
    for key in _LOCAL_PATHS:
        _make_absolute(tree, key, only_if_present=False)
    for key in (*_PATHS_OR_HUB_NAMES, *(f"models.{role}" for role in _MODELS)):
        _make_absolute(tree, key, only_if_present=True)
    return _validate(STAGES[name], tree, origin)


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML that `load_recipe` reads back to an equal configuration."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    return str(text)


def save(config: BaseModel, run_dir: Path) -> Path:
    """Write the resolved configuration to `run_dir`/config.yaml and return its path."""
    make_run_folder(run_dir)
    path = run_dir / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    return path


def _validate(stage: type[Stage], tree: Tree, origin: Origin) -> Stage:
    try:
        return stage.model_validate(tree)
    except ValidationError as error:
        problems = [describe(entry, stage, origin) for entry in error.errors(include_url=False)]
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise UserError(
        f"{origin.recipe}: {count} in the configuration\n" + "\n".join(f"  {p}" for p in problems)
    )


def _read(recipe: Path, overrides: Sequence[str]) -> tuple[Tree, Origin]:
    if not recipe.is_file():
        near = suggestion(recipe.name, [p.name for p in sorted(recipe.parent.glob("*.yaml"))])
        raise UserError(f"{recipe}: no such recipe; give the path of a YAML file{near}")
    try:
        text = recipe.read_text(encoding="utf-8")
        _refuse_bombs(recipe, text)
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
        from_file = OmegaConf.create(text)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{recipe}: cannot be read as YAML: {error}") from error
    if not isinstance(from_file, DictConfig) or not from_file:
        raise UserError(f"{recipe}: holds no `key: value` pairs; see launchers/recipes for examples")
    keys = tuple(_override_key(override) for override in overrides)
    origin = Origin(recipe, lines, frozenset(keys))
    try:
        merged = OmegaConf.merge(from_file, OmegaConf.from_dotlist(list(overrides)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{' '.join(overrides)}: cannot be applied to {recipe}: {error}") from error
    _refuse_unknown_interpolations(merged, origin)
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{recipe}: {error}") from error
    assert isinstance(resolved, dict)
    tree: Tree = {str(key): value for key, value in resolved.items() if key != "vars"}
    return tree, origin


def _refuse_bombs(recipe: Path, text: str) -> None:
    """Aliases of aliases grow without bound when they are resolved, and nesting does in the parser."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise UserError(
                f"{recipe}:{line}: found the alias *{event.anchor}; recipes have none, write ${{vars.name}} instead"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise UserError(f"{recipe}:{line}: is nested deeper than {_DEEPEST} levels, recipes have three")


def _override_key(override: str) -> str:
    key, equals, _ = override.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        raise UserError(
            f"{override!r}: an override is written key=value with a dotted key, as in optimizer.lr=1e-6"
        )
    return key


def _refuse_unknown_interpolations(merged: object, origin: Origin) -> None:
    tree = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(tree, dict)
    used: set[str] = set()
    for key, value in all_keys({str(name): value for name, value in tree.items()}):
        for name in re.findall(r"\$\{([^}]*)\}", value) if isinstance(value, str) else ():
            if ":" in name:
                raise UserError(
                    f"{origin.of(key)}: {key}: found ${{{name}}}; only names of keys may stand in ${{...}}"
                )
            used.add(name)
    variables = tree.get("vars")
    if isinstance(variables, dict):
        for name in variables:
            if f"vars.{name}" not in used:
                hint = suggestion(str(name), [n.removeprefix("vars.") for n in used])
                raise UserError(
                    f"{origin.of(f'vars.{name}')}: vars.{name}: no key uses ${{vars.{name}}}{hint}"
                )


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted keys of a YAML document with the line each is on."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _lines(value, f"{dotted}.")


def _make_absolute(tree: Tree, key: str, only_if_present: bool) -> None:
    parent, _, leaf = key.rpartition(".")
    section = tree.get(parent)
    if isinstance(section, dict) and isinstance(section.get(leaf), str):
        path = Path(section[leaf]).expanduser()
        if path.exists() or not only_if_present:
            section[leaf] = str(path.absolute())


def stage_keys(stage: type[BaseModel]) -> Mapping[str, str]:
    """Every dotted key of a stage with its description; the size of the configuration is counted on it."""
    keys: dict[str, str] = {}
    for name, info in stage.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= {f"{name}.{key}": text for key, text in stage_keys(kind).items()}
        else:
            keys[name] = info.description or ""
    return keys
