"""Code that a recipe names: where it is, its digest, whether it defines the function. Nothing of it is run here."""

import ast
import difflib
import hashlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from rto_megatron.config.facts import facts_of
from rto_megatron.config.rewards import (
    FunctionSource,
    ServiceSource,
    Source,
)
from rto_megatron.config.schema import Stage
from rto_megatron.errors import RecipeError

# Kinds of sources that need a package, which is named as the kind -> the extra that brings it.
_EXTRAS = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}


def with_code(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The sources with absolute paths and with the digest of every file of code.

    Raises:
        RecipeError: a file is missing, does not define the function, or is not of the digest that is given; names all.
    """
    found, problems = [], []
    for source in sources:
        try:
            found.append(_located(source))
        except RecipeError as error:
            problems.append(f"rewards.{source.name}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    return tuple(found)


def rewards_of(config: Stage) -> tuple[Source, ...]:
    """The sources of a stage; none where it samples nothing."""
    sampling = facts_of(config).sampling
    return () if sampling is None else sampling.rewards


def running_code(sources: tuple[Source, ...]) -> list[str]:
    """A line for each function that a run will call, for people to read before it starts."""
    return [
        f"rewards.{source.name} runs {source.function} of this recipe (sha256 {(source.sha256 or 'not known')[:16]}) "
        "with your rights, in a process of its own"
        for source in sources
        if isinstance(source, FunctionSource)
    ]


def missing_packages(sources: tuple[Source, ...]) -> list[str]:
    """Says which libraries of verifiers are not installed; they are looked for and not imported."""
    found = {source.name: missing_package(source.kind) for source in sources if source.kind in _EXTRAS}
    return [f"rewards.{name}: {problem}" for name, problem in found.items() if problem is not None]


def missing_package(kind: str) -> str | None:
    """Why sources of a kind cannot work here; None where their library is installed."""
    if PathFinder.find_spec(kind) is not None:
        return None
    extra = _EXTRAS[kind]
    return f"the package {extra} is not installed; install it with: pip install 'rto-megatron[{extra}]'"


def _located(source: Source) -> Source:
    if isinstance(source, ServiceSource) and source.token_file is not None:
        return source.model_copy(update={"token_file": source.token_file.expanduser().absolute()})
    if not isinstance(source, FunctionSource):
        return source
    place, _, name = source.function.rpartition(":")
    file = _file_of(place)
    try:
        code = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error.strerror}); name a file that is there") from error
    _require_defined(code, name, file)
    digest = hashlib.sha256(code).hexdigest()
    if source.sha256 not in (None, digest):
        raise RecipeError(
            f"{file} has sha256 {digest}, and the recipe expects {source.sha256}; put the file back, or set sha256 to "
            "the new digest, or to null, once you have read what it does"
        )
    target = f"{file}:{name}" if place.endswith(".py") else source.function
    return source.model_copy(update={"function": target, "sha256": digest})


def _file_of(place: str) -> Path:
    """The file behind `file.py` or `package.module`, where the working directory comes before all others."""
    if place.endswith(".py"):
        return Path(place).expanduser().absolute()
    folders: list[str] = [str(Path.cwd()), *sys.path]
    for part in place.split("."):
        spec: ModuleSpec | None = PathFinder.find_spec(part, folders)
        if spec is None:
            raise RecipeError(
                f"there is no module {place} ({part!r} is not found from {Path.cwd()}); a file is named by its path, "
                "as in rewards/exact.py:score"
            )
        folders = list(spec.submodule_search_locations or ())
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise RecipeError(f"module {place} has no Python file; name one that has")
    return Path(spec.origin).absolute()


def _require_defined(code: bytes, name: str, file: Path) -> None:
    """A name that comes by `import *` is believed."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{file} is not Python code: {error}") from error
    names = {name for node in tree.body for name in _bound(node)}
    if name not in names and "*" not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"it defines {', '.join(sorted(names)) or 'nothing'}"
        raise RecipeError(f"{file} does not define {name}; {hint}")


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement of a module's top level gives a value."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
        case ast.If() | ast.Try() | ast.With():
            return [
                name
                for inner in ast.iter_child_nodes(node)
                if isinstance(inner, ast.stmt)
                for name in _bound(inner)
            ]
        case _:
            return [
                target.id
                for target in ast.walk(node)
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
            ]
