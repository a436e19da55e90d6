"""Every public class shows in its docstring how it is written or used, with names that exist."""

import ast
import builtins
import importlib
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from pydantic import BaseModel
from test_house import ROOT, TREES, imports, name

SECTIONS = ("algorithms", "config")  # the rooms whose classes a recipe fills
# What an exception says stands where it is raised, and an enumeration's members are the example.
HEAVY = {"vllm", "modelopt"}  # each takes as long to import as all of the rest
NO_EXAMPLE = ("Error", "Exception", "Enum")


def is_public(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and not node.name.startswith("_")


def needs_example(node: ast.ClassDef, exceptions: set[str]) -> bool:
    bases = [ast.unparse(base).split("[")[0] for base in node.bases]
    return not any(base.endswith(NO_EXAMPLE) or base in exceptions for base in bases)


def example_of(node: ast.ClassDef) -> str:
    """What stands indented under `Example:`; empty: nothing does."""
    block = (ast.get_docstring(node) or "").partition("Example:\n")[2].splitlines()
    end = next(
        (number for number, line in enumerate(block) if line and not line.startswith("    ")), len(block)
    )
    return textwrap.dedent("\n".join(block[:end])).strip()


def members(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str] | None:
    """Names of fields, methods and parameters of the constructor; None: a base of another file may have more."""
    found = set()
    for base in node.bases:
        name = ast.unparse(base).split("[")[0]
        if name in classes:
            inherited = members(classes[name], classes)
            if inherited is None:
                return None
            found |= inherited
        elif name != "Protocol":
            return None
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found.add(part.target.id)
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(part.name)
            if part.name == "__init__":
                found |= {argument.arg for argument in [*part.args.args, *part.args.kwonlyargs]}
    return found


def known_names(tree: ast.Module) -> set[str]:
    """What a module's code can name: its imports, its own names, builtins."""
    found = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.TypeAlias):
            found.add(ast.unparse(node.name) if isinstance(node, ast.TypeAlias) else node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def _is_value(name: str) -> bool:
    """Whether it is written as a value is: in lower case, with the shape of a tensor behind it."""
    return name.split("_", maxsplit=1)[0].islower()


def problems_of_python(text: str, node: ast.ClassDef, tree: ast.Module, known: set[str]) -> list[str]:
    """What an example says that the module does not have."""
    try:
        example = ast.parse(text)
    except SyntaxError as error:
        return [f"is no Python ({error})"]
    classes = {one.name: one for one in tree.body if isinstance(one, ast.ClassDef)}
    found = []
    named, attributes = set(), set()
    for part in ast.walk(example):
        if isinstance(part, ast.Name):
            named.add(part.id)
            if part.id not in known and not _is_value(part.id):
                found.append(f"names {part.id}, which is not in the module")
        elif isinstance(part, ast.Attribute):
            attributes.add(part.attr)
        made = part.value if isinstance(part, ast.Attribute) else part
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id in classes:
            own = members(classes[made.func.id], classes)
            said = {keyword.arg for keyword in made.keywords} | (
                {part.attr} if isinstance(part, ast.Attribute) else set()
            )
            found += [f"{made.func.id} has no {one}" for one in sorted(said - own)] if own is not None else []
    own = members(node, classes) or attributes
    if node.name not in named and not (attributes | named) & own and "__call__" not in own:
        found.append("neither names the class nor uses a part of it")
    return found


def problems_of_section(text: str, section: type[BaseModel]) -> list[str]:
    """What a recipe's part says that the section, or the stage, does not take."""
    said = yaml.safe_load(text)
    if len(said) == 1 and not said.keys() & section.model_fields.keys():
        (values,) = said.values()
        section.model_validate(values)
        return []
    found = [f"has no key {key}" for key in said.keys() - section.model_fields.keys()]
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.model_fields:
            found += [
                f"{key} has no key {one}" for one in said.get(key, {}).keys() - kind.model_fields.keys()
            ]
    return found


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    )


def section_of(path: Path, node: ast.ClassDef) -> type[BaseModel] | None:
    """The class of a recipe's keys; None: it is no such class."""
    if name(path).split("/")[0] not in SECTIONS:
        return None
    kind = vars(module_of(path))[node.name]
    return kind if issubclass(kind, BaseModel) and kind.model_fields else None


def problems(path: Path, tree: ast.Module, exceptions: set[str]) -> list[str]:
    """What is wrong with the examples of a file, one entry for each."""
    found, known = [], known_names(tree)
    for node in filter(is_public, tree.body):
        assert isinstance(node, ast.ClassDef)
        text = example_of(node)
        if not text:
            found += [f"{node.name} has no Example:"] if needs_example(node, exceptions) else []
        elif (section := section_of(path, node)) is not None:
            found += [f"{node.name}: {one}" for one in problems_of_section(text, section)]
        else:
            found += [f"{node.name}: {one}" for one in problems_of_python(text, node, tree, known)]
    return found


def test_every_public_class_has_an_example_that_fits_it() -> None:
    classes = [node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    exceptions: set[str] = set()
    while grown := {node.name for node in classes if not needs_example(node, exceptions)} - exceptions:
        exceptions |= grown
    found = [
        f"{path.relative_to(ROOT)}: {wrong}"
        for path, tree in TREES.items()
        for wrong in problems(path, tree, exceptions)
    ]
    assert not found, "\n".join(found)


def runs_with(names: set[str], text: str) -> bool:
    """Whether it reads these names alone: what needs a pool, a model or ranks does not run here."""
    read = (
        one
        for one in ast.walk(ast.parse(text))
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)
    )
    return {one.id for one in read} <= names


def test_examples_run_where_they_need_nothing_but_the_module() -> None:
    for path, tree in TREES.items():
        if HEAVY & {module.split(".")[0] for module in imports(path)}:
            continue
        known = known_names(tree) | {"tensor"}
        for node in filter(is_public, tree.body):
            assert isinstance(node, ast.ClassDef)
            text = example_of(node)
            if text and section_of(path, node) is None and runs_with(known, text):
                values = {**vars(module_of(path)), "tensor": torch.tensor}
                exec(compile(text, f"{name(path)}:{node.name}", "exec"), values)


_MODULE = '''
from dataclasses import dataclass

@dataclass
class Point:
    """A place.

    Example:
        {example}
    """

    x: int

    def far(self) -> bool: ...
'''


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("Point(x=3).far()", []),
        ("point.far()", []),
        ("Point(x=", ["is no Python"]),
        ("Point(y=3)", ["Point has no y"]),
        ("Point(x=3).near()", ["Point has no near"]),
        ("Place(x=3)", ["names Place, which is not in the module", "neither names the class"]),
        ("place.near()", ["neither names the class"]),
    ],
)
def test_an_example_that_names_what_is_not_there_is_seen(example: str, said: list[str]) -> None:
    tree = ast.parse(_MODULE.format(example=example))
    node = tree.body[-1]
    assert isinstance(node, ast.ClassDef)
    found = problems_of_python(example_of(node), node, tree, known_names(tree))
    assert len(found) == len(said) and all(
        one.startswith(start) for one, start in zip(found, said, strict=True)
    )
