"""The pages name what there is: every room of the house, and files that exist."""

import ast
import builtins
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_house import FILES, LAYERS, PACKAGE, ROOT, TREES, name

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert [room for room in LAYERS if room.rsplit("/", 1)[-1] not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    # Files of the package are named from the package, recipes from their folder.
    named = set(re.findall(r"`((?!megatron/)[a-z0-9_/]+/[a-z0-9_]+\.(?:py|sh|md|yaml))`", text))
    bases = (ROOT, PACKAGE, ROOT / "launchers", ROOT / "launchers/recipes", PACKAGE / "generation/vllm")
    assert [name for name in sorted(named) if not any((base / name).exists() for base in bases)] == []


def test_make_has_the_five_commands_and_their_scripts() -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == ["setup", "fast", "test", "format", "quickstart"]
    called = re.findall(r"bash (\S+)|(tests/\S+)", text)
    assert [one for pair in called for one in pair if one and not (ROOT / one).exists()] == []


def _examples(path: Path) -> list[str]:
    docstrings = [
        ast.get_docstring(node) or "" for node in TREES[path].body if isinstance(node, ast.ClassDef)
    ]
    return [doc.split("Example:\n")[1] for doc in docstrings if "Example:\n" in doc]


@pytest.mark.parametrize("path", [path for path in FILES if _examples(path)], ids=name)
def test_examples_of_types_run(path: Path) -> None:
    module = vars(import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)))
    known = {**vars(builtins), **module, "tensor": torch.tensor}
    for example in _examples(path):
        tree = ast.parse(inspect.cleandoc(example))
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        read = {one.id for one in names if isinstance(one.ctx, ast.Load)}
        # What needs a pool, a model or ranks is parsed and not run.
        if read <= known.keys():
            exec(compile(tree, str(path), "exec"), dict(known))
