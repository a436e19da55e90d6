"""Collectives on plain values. JSON, not pickle, so that nothing a peer sends can run code."""

import json

import torch
import torch.distributed as dist
from torch import Tensor

type Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


def _to_bytes(value: Json, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _to_value(data: Tensor) -> Json:
    value: Json = json.loads(bytes(data.cpu().numpy()).decode())
    return value


def broadcast_json(value: Json, source: int, group: dist.ProcessGroup, device: torch.device) -> Json:
    """The value of global rank `source`, on every rank of the group; all of them must call it."""
    if dist.get_world_size(group) == 1:
        return value
    is_source = dist.get_rank() == source
    data = _to_bytes(value, device) if is_source else torch.empty(0, dtype=torch.uint8, device=device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, source, group=group)
    if not is_source:
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    dist.broadcast(data, source, group=group)
    return value if is_source else _to_value(data)


def gather_json(value: Json, group: dist.ProcessGroup, device: torch.device) -> list[Json]:
    """Every rank's value, by rank in the group; all of them must call it."""
    world = dist.get_world_size(group)
    if world == 1:
        return [value]
    data = _to_bytes(value, device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=device), group=group)
    longest = int(torch.cat(sizes).max().item())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return [_to_value(chunk[: int(size.item())]) for chunk, size in zip(gathered, sizes, strict=True)]
