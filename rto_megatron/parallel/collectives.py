"""Collectives on plain values of a given type. JSON, not pickle, so that nothing a peer sends can run code.

A type is whatever pydantic checks: numbers, texts, lists, mappings, dataclasses, and tuples, which JSON has not.
"""

import json

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

type Json = bool | int | float | str | list[Json] | dict[str, Json] | None


def _to_bytes[T](value: T, kind: type[T], device: torch.device) -> Tensor:
    text = json.dumps(TypeAdapter(kind).dump_python(value))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)


def _to_value[T](data: Tensor, kind: type[T]) -> T:
    return TypeAdapter(kind).validate_python(json.loads(bytes(data.cpu().numpy()).decode()))


def broadcast[T](value: T, kind: type[T], source: int, group: dist.ProcessGroup, device: torch.device) -> T:
    """The value of global rank `source`, on every rank of the group; all of them must call it."""
    if dist.get_world_size(group) == 1:
        return value
    is_source = dist.get_rank() == source
    data = _to_bytes(value, kind, device) if is_source else torch.empty(0, dtype=torch.uint8, device=device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, source, group=group)
    if not is_source:
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    dist.broadcast(data, source, group=group)
    return value if is_source else _to_value(data, kind)


def gather[T](value: T, kind: type[T], group: dist.ProcessGroup, device: torch.device) -> list[T]:
    """Every rank's value, by rank in the group; all of them must call it."""
    world = dist.get_world_size(group)
    if world == 1:
        return [value]
    data = _to_bytes(value, kind, device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=device), group=group)
    longest = int(torch.cat(sizes).max().item())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return [_to_value(chunk[: int(size.item())], kind) for chunk, size in zip(gathered, sizes, strict=True)]
