"""How every table of numbered patches is applied: in order, each once per process."""

from collections.abc import Callable, Mapping, Set


def apply_missing(patches: Mapping[str, Callable[[], None]], applied: set[str], skip: Set[str]) -> None:
    """Applies the patches that are in neither `applied` nor `skip`, and adds them to `applied`."""
    for name, apply in patches.items():
        if name not in skip and name not in applied:
            apply()
            applied.add(name)
