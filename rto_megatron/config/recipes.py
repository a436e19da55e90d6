"""Where recipes are, for whoever names one that is not there."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import rto_megatron
from rto_megatron.errors import RecipeError

_OURS = Path(rto_megatron.__file__).parents[1] / "launchers" / "recipes"
_SHOWN = 6


def require_recipe(recipe: Path) -> None:
    """Raises RecipeError where `recipe` is no file; names the recipes that may be meant."""
    if recipe.is_file():
        return
    if recipe.is_dir():
        inside = sorted(path for path in recipe.iterdir() if path.suffix in (".yaml", ".yml"))
        told = f"; it holds {_listed(inside)}" if inside else ""
        raise RecipeError(f"{recipe} is a folder; give the path of a YAML file{told}")
    near = _near(recipe, recipe.parent.glob("*.yaml"))
    meant = f"; did you mean {near[0]}?" if near else _of_ours(recipe)
    raise RecipeError(f"{recipe}: no such recipe; give the path of a YAML file{meant}")


def _of_ours(recipe: Path) -> str:
    ours = sorted(_OURS.rglob("*.yaml"))
    if not ours:
        return ", such as those in launchers/recipes of the repository"
    parts = recipe.with_suffix(".yaml").parts
    alike = [path for path in ours if path.parts[-len(parts) :] == parts] or [
        path for path in ours if path.stem == recipe.stem
    ]
    meant = alike or _near(recipe, ours)
    if meant:
        return f"; recipes of that name: {_listed(meant)}"
    return f"; recipes are in {_shown(_OURS)}/*: {_listed(sorted(_OURS.iterdir()))}"


def _near(recipe: Path, candidates: Iterable[Path]) -> list[Path]:
    """Those whose name is nearest to the recipe's."""
    by_name: dict[str, list[Path]] = {}
    for path in sorted(candidates):
        by_name.setdefault(path.stem, []).append(path)
    names = difflib.get_close_matches(recipe.stem.lower(), by_name, n=1, cutoff=0.6)
    return by_name[names[0]] if names else []


def _listed(paths: list[Path]) -> str:
    more = [f"and {len(paths) - _SHOWN} more"] if len(paths) > _SHOWN else []
    return ", ".join([*map(_shown, paths[:_SHOWN]), *more])


def _shown(path: Path) -> str:
    """The path as seen from the working directory, where it lies below that."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
