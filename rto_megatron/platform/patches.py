"""How every table of numbered patches is applied: in order, each once per process."""

from collections.abc import Callable, Mapping, Set


def replace(owner: object, name: str, stand_in: Callable[..., object]) -> None:
    """Puts `stand_in` in the place of a function or class of another package.

    A plain assignment would be held to the whole signature; a stand-in has the part of it that is called.
    """
    setattr(owner, name, stand_in)


def apply_missing(patches: Mapping[str, Callable[[], None]], applied: set[str], skip: Set[str]) -> None:
    """Applies the patches that are in neither `applied` nor `skip`, and adds them to `applied`."""
    for name, apply in patches.items():
        if name not in skip and name not in applied:
            apply()
            applied.add(name)
