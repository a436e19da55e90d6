"""Tensors that a folder keeps inside of larger ones: all experts of a layer in one, q above k above v, gate above up.

transformers 5 holds experts so in memory, and some programs save what is in memory.
Source: transformers 5.19, conversion_mapping.py and models/mixtral/modeling_mixtral.py.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

_EXPERT = re.compile(
    r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight"
)
_ROUTER = re.compile(r"(.*)\.block_sparse_moe\.gate\.weight")
_DENSE = re.compile(r"(.*)\.(q|k|v|gate|up)_proj\.(weight|bias)")
_ABOVE = {"q": (), "k": ("q",), "v": ("q", "k"), "gate": (), "up": ("gate",)}
_JOINED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_DOWN, _UP = ("w2", "down_proj"), ("w3", "up_proj")


@dataclass(frozen=True)
class StoredPart:
    """Where a tensor lies in a folder: in `name` of `shape`, from row `first` on.

    Attributes:
        expert: index of the first dimension before; null: the stored tensor has no dimension of experts.

    Example:
        StoredPart("model.layers.0.mlp.experts.gate_up_proj", (8, 192, 64), expert=3, first=96)
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0

    def of(self, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
        """The part of the stored tensor, a view."""
        rows = tensor if self.expert is None else tensor[self.expert]
        return rows[self.first : self.first + size[0]]


def joined_parts(
    wanted: Mapping[str, tuple[int, ...]], stored: Collection[str]
) -> Iterator[tuple[str, StoredPart]]:
    """(name, where it is) of the wanted tensors that are stored inside of others.

    Args:
        wanted: name -> shape of every tensor of the model.
        stored: names in the folder.
    """
    num_experts = 1 + max((int(m[2]) for name in wanted if (m := _EXPERT.fullmatch(name))), default=-1)
    for name, size in wanted.items():
        if name in stored:
            continue
        part = _expert_part(name, size, num_experts) or _dense_part(name, wanted)
        if part is not None and part.name in stored:
            yield name, part


def _expert_part(name: str, size: tuple[int, ...], num_experts: int) -> StoredPart | None:
    if (router := _ROUTER.fullmatch(name)) is not None:
        return StoredPart(f"{router[1]}.mlp.gate.weight", size)
    if (match := _EXPERT.fullmatch(name)) is None:
        return None
    layer, expert, kind = f"{match[1]}.mlp.experts", int(match[2]), match[3]
    rows, columns = size
    if kind in _DOWN:
        return StoredPart(f"{layer}.down_proj", (num_experts, rows, columns), expert)
    first = rows if kind in _UP else 0
    return StoredPart(f"{layer}.gate_up_proj", (num_experts, 2 * rows, columns), expert, first)


def _dense_part(name: str, wanted: Mapping[str, tuple[int, ...]]) -> StoredPart | None:
    if (match := _DENSE.fullmatch(name)) is None:
        return None
    module, kind, tail = match.groups()
    names = {
        other: f"{module}.{other}_proj.{tail}" for other, joined in _JOINED.items() if joined == _JOINED[kind]
    }
    if any(other not in wanted for other in names.values()):
        return None
    lengths = {kind: wanted[other][0] for kind, other in names.items()}
    shape = (sum(lengths.values()), *wanted[name][1:])
    first = sum(lengths[other] for other in _ABOVE[kind])
    return StoredPart(f"{module}.{_JOINED[kind]}_proj.{tail}", shape, first=first)
