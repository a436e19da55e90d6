"""The plain values of a state, such as an optimizer's parameter groups, for ranks that do not hold the state.

Megatron writes those of global rank 0, and compares them between all ranks: a rank without a role must have them too.
"""

import json

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from torch import Tensor

from rto_megatron.parallel.collectives import Json

_DTYPES = {
    str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
}


def plain_text(state: ShardedStateDict) -> str:
    """All of a state but what is stored in shards, to be read by `plain_state`; the state stays as it is."""
    _, kept = extract_nonpersistent(state)
    _, plain = extract_sharded_base(kept)
    return json.dumps(_tagged(plain))


def plain_state(text: str) -> ShardedStateDict:
    """Inverse of `plain_text`, of equal values and kinds."""
    state = _untagged(json.loads(text))
    assert isinstance(state, dict)
    return state


def _tagged(value: object) -> Json:
    """JSON knows neither tuples, tensors nor keys that are numbers: those are told by a tag before their content."""
    if isinstance(value, Tensor):
        return ["tensor", str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return ["dict", [[_tagged(key), _tagged(inner)] for key, inner in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_tagged(inner) for inner in value]]
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def _untagged(value: Json) -> object:
    if not isinstance(value, list):
        return value
    if value[0] == "tensor":
        return torch.tensor(value[2], dtype=_DTYPES[str(value[1])])
    content = value[1]
    assert isinstance(content, list)
    if value[0] == "dict":
        pairs = [pair for pair in content if isinstance(pair, list)]
        return {_untagged(key): _untagged(inner) for key, inner in pairs}
    inner = [_untagged(one) for one in content]
    return tuple(inner) if value[0] == "tuple" else inner
