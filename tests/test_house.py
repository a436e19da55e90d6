"""The rules of the house: sizes, the direction of imports, bans, and the number of configuration keys."""

import ast
import re
from pathlib import Path
from typing import Annotated

import pytest
from configuration_keys import stage_keys
from pydantic import BaseModel

from rto_megatron.config.checks import find_problems
from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import fewest_ranks
from rto_megatron.config.schema import STAGES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rto_megatron"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
RECIPES = sorted((ROOT / "launchers" / "recipes").rglob("*.yaml"))

# A folder that one process runs alone has a layer of its own.
LAYERS = {
    "shared_row": -1,
    "sums": -1,
    "errors": 0,
    "section": 0,
    "types": 0,
    "algorithms": 1,
    "config": 2,
    "platform": 3,
    "generation": 4,
    "rewards": 4,
    "generation/vllm": 5,
    "generation/vllm/client": 6,
    "data": 7,
    "parallel": 7,
    "models": 8,
    "storage": 9,
    "engine": 10,
    "convert": 11,
    "weight_sync": 11,
    "generation/vllm/worker": 12,
    "generation/vllm/start": 12,
    "reporting": 13,
    "lifecycle": 14,
    "planning": 15,
    "trainer": 16,
    "simulation": 17,
    "proofs": 17,
    "diagnosis": 19,
    "launching": 18,
    "benchmarks": 19,
    "experiments": 19,
    "cli": 20,
}
BANS = {
    r"except Exception": "catch what you handle, by name",
    r"except\s*:": "catch what you handle, by name",
    r"except ImportError": "a dependency is required, or its user is another file",
    r"\byaml\.(load|load_all|full_load|unsafe_load)\(|(Full|Unsafe)Loader|(?<![\w.])(eval|exec)\(": "runs code of "
    "whoever wrote the file",
    r"allow_pickle=True|recv_pyobj|weights_only=False\s*[,)]": "unpickles what others wrote",
    r"shell=True|os\.system\(|trust_remote_code=True|--trust-remote-code": "runs code of others",
    r"(bind|host|listen)\b[^\n]{0,30}0\.0\.0\.0|INADDR_ANY": "listens to everybody; name an address",
    r"getattr\((cfg|config|args)\b|hasattr\((cfg|config|args)\b": "configuration has a type",
    r"pypi\.org|pythonhosted|//download\.pytorch": "installation is the launcher's affair, through the usual clients",
}
# They break our code inside forked ranks, to show that a proof notices, or hold it up or listen there.
BREAKERS = {
    "planted_extension.py",
    "test_checkpoint_faults.py",
    "test_colocated.py",
    "test_pushes_killed.py",
    "test_resume_check.py",
}
THE_LOOP = " train_online"  # it reads like the algorithm of the paper from beginning to end
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLE_USERS = {"platform/safe_metadata.py"}  # the allow-list unpickler that checkpoint metadata needs


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(module: str) -> str:
    """The innermost room of a dotted module, or of what is imported from one."""
    place = module.removeprefix("rto_megatron").strip(".").replace(".", "/")
    rooms = [one for one in LAYERS if place == one or place.startswith(f"{one}/")]
    return max(rooms, key=len, default="")


def room_of(path: Path) -> str:
    return room(name(path).removesuffix(".py"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_files_are_at_most_400_lines_long() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_functions_are_at_most_60_lines_long() -> None:
    lengths = {
        f"{name(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    found = {where: length for where, length in lengths.items() if length > 60}
    found = {where: length for where, length in found.items() if not where.endswith(THE_LOOP) or length > 80}
    assert found == {}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down_the_layers(path: Path) -> None:
    own = room_of(path)
    if not own:
        return
    rooms = {room(module) for module in imports(path) if module.startswith("rto_megatron.")} - {own, ""}
    assert {other: LAYERS[other] for other in rooms if LAYERS[other] >= LAYERS[own]} == {}


def test_vllm_stays_in_its_folder_and_where_a_pool_is_started_or_connected() -> None:
    allowed = {"launching", "planning", "diagnosis", "cli"}
    users = {
        name(path)
        for path in FILES
        if any(module.startswith("rto_megatron.generation.vllm") for module in imports(path))
        and not name(path).startswith("generation/vllm/")
        and room_of(path) not in allowed
    }
    assert users == {"trainer/connected_pool.py"}


def test_megatron_state_and_schedules_have_one_user_each() -> None:
    for path in FILES:
        modules = imports(path)
        if any(module.startswith("megatron.core.parallel_state") for module in modules) or (
            "megatron.core.parallel_state" in modules or "megatron.core.mpu" in modules
        ):
            assert room_of(path) == "parallel", name(path)
        if "get_forward_backward_func" in path.read_text():
            assert room_of(path) == "engine", name(path)


def test_errors_for_users_have_a_subject() -> None:
    # The launcher says what a rank wrote into the run's status, of whatever subject that was.
    made = [
        name(path)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError" and name(path) != "errors.py"
    ]
    assert made == ["cli/launch.py"]


def test_no_two_test_files_share_a_name() -> None:
    # pytest imports test files by their bare name, and only a run of the whole suite meets both.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({file for file in names if names.count(file) > 1}) == []


def test_no_two_public_classes_share_a_name() -> None:
    # The options of every algorithm are its `Config`.
    names = [
        node.name
        for path in FILES
        for node in TREES[path].body
        if isinstance(node, ast.ClassDef) and not (node.name == "Config" and room_of(path) == "algorithms")
    ]
    public = [one for one in names if not one.startswith("_")]
    assert sorted({one for one in public if public.count(one) > 1}) == []


def test_no_two_modules_share_a_file_name() -> None:
    # An algorithm is named as its loop, a family and a command as what they are of.
    free = ("algorithms/", "models/families/", "cli/")
    names = [path.name for path in FILES if path.name != "__init__.py" and not name(path).startswith(free)]
    assert sorted({file for file in names if names.count(file) > 1}) == []


def test_no_duration_is_taken_from_the_wall_clock() -> None:
    # It jumps when a machine sets its clock; time.monotonic does not.
    found = [
        f"{name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and "time.time()" in ast.unparse(node)
    ]
    assert found == []


def test_ranks_do_not_import_transformers_generation() -> None:
    # It takes every process seconds to import, with scikit-learn and pandas; what has it is imported where it is used.
    found = [
        f"{name(path)}: {alias.name}"
        for path in FILES
        if room_of(path) not in ("convert", "diagnosis", "benchmarks", "cli")
        for node in TREES[path].body
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
        for alias in node.names
        if alias.name.startswith("Auto") or alias.name.endswith("Model") or "ForCausalLM" in alias.name
    ]
    assert found == []


def test_pickle_has_one_user() -> None:
    users = {name(path) for path in FILES if PICKLES & {module.split(".")[0] for module in imports(path)}}
    users |= {name(path) for path in FILES if "torch.load(" in path.read_text()}
    assert users <= PICKLE_USERS
    imported = rf"^\s*(import|from) ({'|'.join(PICKLES)})\b|\btorch\.load\("
    scripts = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]
    assert [path.name for path in scripts if re.search(imported, path.read_text(), re.MULTILINE)] == []


def test_banned_code_is_absent() -> None:
    launchers = sorted(
        [
            *(path for kind in ("*.sh", "*.sbatch", "*.py") for path in (ROOT / "launchers").rglob(kind)),
            *(ROOT / "tools").rglob("*.py"),
            *ROOT.glob("requirements*"),
            *ROOT.glob("requirements/*"),
            *ROOT.glob("Dockerfile*"),
        ]
    )
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}: {reason}"
        for path in [*FILES, *(path for path in launchers if path.is_file())]
        for ban, reason in BANS.items()
        for match in re.finditer(ban, path.read_text())
    ]
    assert found == []


def own_names(tree: ast.Module) -> set[str]:
    """The names under which a test knows modules, classes and functions of the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rto_megatron":
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] == "rto_megatron"]
            found |= {alias.asname or "rto_megatron" for alias in ours}
    return found


def is_limit(attribute: str) -> bool:
    """Whether it is named as a constant of a module, such as how long something waits."""
    return attribute.isupper()


def patches_of_our_code(tree: ast.Module) -> list[int]:
    """The lines in which a test puts something in the place of a function or class of the package.

    Seen are monkeypatch and setattr, on an imported name or a dotted text, and assignments to an attribute.
    """
    own, lines = own_names(tree), []

    def is_ours(target: ast.expr) -> bool:
        if isinstance(target, ast.Constant):
            dotted = str(target.value)
            return dotted.startswith("rto_megatron.") and not is_limit(dotted.rpartition(".")[2])
        while isinstance(target, ast.Attribute):
            target = target.value
        return isinstance(target, ast.Name) and target.id in own

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("setattr", "delattr"):
            target, *rest = node.args
            called = rest[0].value if rest and isinstance(rest[0], ast.Constant) else ""
            if is_ours(target) and not (isinstance(called, str) and is_limit(called)):
                lines.append(node.lineno)
        elif isinstance(node, ast.Assign):
            attributes = [one for one in node.targets if isinstance(one, ast.Attribute)]
            lines += [node.lineno for one in attributes if is_ours(one) and not is_limit(one.attr)]
    return lines


@pytest.mark.parametrize(
    "text",
    [
        "from rto_megatron.engine import export as module\nmonkeypatch.setattr(module, 'export_hf', print)",
        "import rto_megatron.engine.export as module\nsetattr(module, 'export_hf', print)",
        "import rto_megatron.engine\nmonkeypatch.setattr(rto_megatron.engine.export, 'export_hf', print)",
        "monkeypatch.setattr('rto_megatron.engine.export.export_hf', print)",
        "from rto_megatron.reporting import pace\nmonkeypatch.setattr(pace.time, 'monotonic', print)",
        "from rto_megatron.engine.saving import Saving\nSaving.finish = print",
    ],
)
def test_a_patch_is_seen_under_any_name(text: str) -> None:
    assert len(patches_of_our_code(ast.parse(text))) == 1


def test_constants_and_code_of_others_may_be_patched() -> None:
    limit = "from rto_megatron.platform import patience\nmonkeypatch.setattr(patience, '_PAUSES_S', (1.0,))"
    assert patches_of_our_code(ast.parse(limit)) == []
    assert (
        patches_of_our_code(ast.parse("import tempfile\nmonkeypatch.setattr(tempfile, 'tempdir', 'x')")) == []
    )


def test_tests_do_not_patch_our_code() -> None:
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in (*BREAKERS, "test_house.py")]
    found = [
        f"{path.name}: unittest.mock" for path in paths if re.search(r"unittest\.mock", path.read_text())
    ]
    found += [
        f"{path.name}:{line}" for path in paths for line in patches_of_our_code(ast.parse(path.read_text()))
    ]
    assert found == []


def test_every_type_ignore_names_its_code_and_a_reason() -> None:
    found = [
        f"{name(path)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "type: ignore" in line and not re.search(r"# type: ignore\[[a-z, -]+\]  # \S+ \S+", line)
    ]
    assert found == []


def public_functions(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods that other modules may call, constructors among them."""
    found: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += public_functions(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_special = node.name.startswith("__") and node.name != "__torch_dispatch__"
            if is_special or not node.name.startswith("_"):
                found.append(node)
    return found


def test_no_public_signature_says_any() -> None:
    found = [
        f"{name(path)}:{function.lineno} {function.name}"
        for path, tree in TREES.items()
        for function in public_functions(tree.body)
        for part in (function.args, function.returns)
        if part is not None and any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(part))
    ]
    assert found == []


def test_configuration_has_at_most_180_keys() -> None:
    keys = set().union(*map(stage_keys, STAGES.values()))
    assert len(keys) <= 180


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_loads_and_fits_together_on_the_fewest_ranks(recipe: Path) -> None:
    config = load_recipe(recipe)
    assert find_problems(config, fewest_ranks(config.parallel), {}) == []


def test_keys_are_counted_in_lists_and_unions() -> None:
    class One(BaseModel):
        first: int

    class Other(BaseModel):
        second: int
        third: int

    class Both(BaseModel):
        either: One | Other | None
        several: list[One]
        named: dict[str, Annotated[Other, "a note"]]
        plain: tuple[int, ...]

    found = {"either.first", "either.second", "either.third", "several.first", "named.second", "named.third"}
    assert stage_keys(Both) == found | {"plain"}
