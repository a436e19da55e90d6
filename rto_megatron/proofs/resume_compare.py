"""Compares a run with the one that was resumed in its middle: everything that the next step depends on."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from rto_megatron.parallel.collectives import Json
from rto_megatron.platform.safe_metadata import safe_reading
from rto_megatron.proofs.resumed_runs import OBSERVED
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.storage.checkpoints import CHECKPOINTS, STATE
from rto_megatron.storage.file_digests import WEIGHTS, checkpoint_name, file_digests, file_names

# Keys of a torch_dist checkpoint of megatron-core 0.19.2; whatever fits none of these is a weight.
_KINDS = {
    "optimizer.state.exp_avg_sq.": "Adam's second moments",
    "optimizer.state.exp_avg.": "Adam's first moments",
    "optimizer.state.fp32_param.": "fp32 master weights",
    "optimizer.state.param.": "fp32 master weights",
    "optimizer/": "optimizer's step",
}
_CLOCK = ("time", "memory")  # metrics of the machine, not of the training, begin with one of them


@dataclass(frozen=True)
class Item:
    """One row of the comparison.

    Example:
        Item("policy", difference=1e-7, where="layers.0").is_within(1e-6)
    """

    name: str
    # Largest absolute one; for weights at another layout, relative to the way since the resume.
    difference: float
    where: str  # what differs most, or first; empty where all is equal

    def is_within(self, tolerance: float) -> bool:
        """Whether the resume kept it; 0 wants every bit."""
        return self.difference <= tolerance


def compare(whole: Path, resumed: Path, k: int) -> list[Item]:
    """Every item, bit for bit. Needs a process group of one rank.

    Args:
        whole, resumed: run folders after 2k steps at one layout.
    """
    first, second = _Checkpoint(whole, 2 * k), _Checkpoint(resumed, 2 * k)
    return [
        *(
            _item(name, _absolute(first.tensors.get(name, {}), second.tensors.get(name, {})))
            for name in _names(first.tensors, second.tensors)
        ),
        *_facts(first.settings, second.settings),
        *_facts(_state(first.path), _state(second.path)),
        *_metrics(whole, resumed, is_relative=False),
        *_facts(_observed(whole, k), _observed(resumed, k)),
        *_facts(_exported(whole), _exported(resumed)),
    ]


def compare_layouts(whole: Path, resumed: Path, k: int) -> list[Item]:
    """What another layout must keep up to rounding, as relative differences. Needs a process group of one rank.

    Tensors: the distance between both runs over the distance from step k to step 2k. Generators and the seeds of
    requests belong to a layout, and are not compared.
    """
    start, first, second = (_Checkpoint(*place) for place in ((whole, k), (whole, 2 * k), (resumed, 2 * k)))
    return [
        *(
            _item(
                name,
                _relative(start.tensors.get(name, {}), first.tensors[name], second.tensors.get(name, {})),
            )
            for name in first.tensors
        ),
        *_facts(_without_floats(_state(first.path)), _without_floats(_state(second.path))),
        *_metrics(whole, resumed, is_relative=True),
    ]


class _Checkpoint:
    """All of one checkpoint: item -> key -> tensor, and item -> everything that is not a tensor."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / CHECKPOINTS / checkpoint_name(step)
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.settings: dict[str, Json] = {}
        for weights in sorted(self.path.glob(f"*/{WEIGHTS}")):
            role = weights.parent.name
            with safe_reading(weights):
                saved = dist_checkpointing.load_plain_tensors(str(weights))
            for key, value in _flat(saved, ""):
                kind = next((kind for start, kind in _KINDS.items() if key.startswith(start)), "weights")
                if isinstance(value, Tensor):
                    self.tensors.setdefault(f"{role}: {kind}", {})[key] = value
                else:
                    self.settings[f"{role}: {key.rpartition('/')[2]}"] = str(value)


def _flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


def _names(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    return [*first, *(name for name in second if name not in first)]


def _item(name: str, differences: Iterable[tuple[str, float]]) -> Item:
    where, difference = max(differences, key=lambda pair: pair[1], default=("nothing was saved", math.inf))
    return Item(name, difference, where if difference else "")


def _absolute(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    for key in _names(first, second):
        one, other = first.get(key), second.get(key)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            yield key, math.inf
        elif torch.equal(one, other):
            yield key, 0.0
        else:
            apart = float((one.double() - other.double()).abs().max())
            yield key, apart if math.isfinite(apart) else math.inf


def _relative(
    start: Mapping[str, Tensor], first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """One difference for all tensors of an item together, named after the largest part of it."""
    moved = math.hypot(*(_norm(start[key], one) for key, one in first.items()))
    apart = {key: _norm(one, second[key]) if key in second else math.inf for key, one in first.items()}
    total = math.hypot(*apart.values())
    yield max(apart, key=lambda key: apart[key]), total / moved if moved else (math.inf if total else 0.0)


def _norm(one: Tensor, other: Tensor) -> float:
    # Rows that pad the vocabulary come and go with the layout.
    common = tuple(slice(0, min(pair)) for pair in zip(one.shape, other.shape, strict=True))
    return float((one[common].double() - other[common].double()).norm())


def _facts(first: Mapping[str, Json], second: Mapping[str, Json]) -> list[Item]:
    """An item each; a difference between things that are no numbers is infinite."""
    items = []
    for name in _names(first, second):
        one, other = first.get(name), second.get(name)
        if one == other:
            items.append(Item(name, 0.0, ""))
            continue
        both = [(str(key), value, dict(_flat(other, name)).get(key)) for key, value in _flat(one, name)]
        changed = [triple for triple in both if triple[1] != triple[2]] or [(name, one, other)]
        key, value, found = changed[0]
        gap = abs(value - found) if isinstance(value, float) and isinstance(found, float) else math.inf
        items.append(Item(name, gap, f"{key}: {_short(value)}, resumed {_short(found)}"))
    return items


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


_STATE_NAMES = {
    "data": "data position",
    "pretraining": "position in the pretraining texts",
    "kl": "KL controller",
    "step": "step counter",
    "config": "configuration",
}


def _state(checkpoint: Path) -> dict[str, Json]:
    state = json.loads((checkpoint / STATE).read_text())
    return {_STATE_NAMES.get(key, f"state: {key}"): value for key, value in state.items()}


def _without_floats(state: dict[str, Json]) -> dict[str, Json]:
    """What is counted, not computed; the controller's coefficient is among the metrics."""
    return {name: value for name, value in state.items() if name != "KL controller"}


def _metrics(whole: Path, resumed: Path, is_relative: bool) -> list[Item]:
    """Learning rates, and all other metrics of all steps."""
    first, second = read_metrics(whole), read_metrics(resumed)
    differences: dict[str, list[tuple[str, float]]] = {"learning rates": [], "logged metrics": []}
    if [entry["step"] for entry in first] != [entry["step"] for entry in second]:
        return [Item("logged metrics", math.inf, f"{len(first)} steps, resumed {len(second)}")]
    for one, other in zip(first, second, strict=True):
        for name in _names(one, other):
            if not name.startswith(_CLOCK):
                kind = "learning rates" if name.split("/")[0] == "lr" else "logged metrics"
                gap = _gap(one.get(name), other.get(name), is_relative)
                differences[kind].append((f"step {one['step']} {name}", gap))
    return [_item(name, pairs) for name, pairs in differences.items()]


def _gap(one: float | None, other: float | None, is_relative: bool) -> float:
    if one == other:
        return 0.0
    if one is None or other is None:
        return math.inf
    return abs(one - other) / (max(1.0, abs(one)) if is_relative else 1.0)


def _observed(run_dir: Path, k: int) -> dict[str, Json]:
    """Generators of all ranks, and what their leads asked the pool for in the second half."""
    generators: dict[str, Json] = {}
    requests: dict[str, Json] = {}
    for path in sorted((run_dir / OBSERVED).glob("*.json")):
        seen = json.loads(path.read_text())
        generators[f"rank {int(path.stem)}"] = seen["generators"]
        if seen["requests"]:
            # One version answers several where rollouts are drawn ahead.
            late = [request for request in seen["requests"] if request["version"] >= k]
            requests[f"rank {int(path.stem)}"] = {
                f"request {n} of version {one['version']}": one for n, one in enumerate(late)
            }
    found: dict[str, Json] = {"random generators": generators}
    return {**found, "prompts, versions and seeds of requests": requests} if requests else found


def _exported(run_dir: Path) -> dict[str, Json]:
    digests = file_digests(run_dir / "hf", file_names(run_dir / "hf"))
    return {"exported model": {name: digest.sha256 for name, digest in digests.items()}}
