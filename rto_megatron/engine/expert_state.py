"""Optimizer state of a mixture's checkpoint from before its experts had an optimizer of their own.

Such a checkpoint holds the same tensors under the same names, and one list of settings where two are wanted: those of
the experts' parameters and of the others.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

_OF_EXPERTS = "is_expert_parallel"
_GROUPS = "param_groups"
type _State = dict[Any, Any]  # of Megatron: settings by name, tensors by number


def with_experts_apart(loaded: _State, optimizer: MegatronOptimizer) -> _State:
    """The state as `optimizer` reads it, whichever way the checkpoint holds its settings.

    Args:
        loaded: what was asked of the checkpoint by number of the optimizer, beside what it holds for both.
    """
    shared = {name: kept for name, kept in loaded.items() if not isinstance(name, int)}
    if not isinstance(optimizer, ChainedOptimizer) or len(optimizer.chained_optimizers) == 1 or not shared:
        return loaded
    return {
        number: _merged(shared, loaded[number], one.param_groups)
        for number, one in enumerate(optimizer.chained_optimizers)
    }


def _merged(shared: _State, own: _State, groups: Sequence[Mapping[str, Any]]) -> _State:
    """`own` beside a copy of `shared`; of the parameter groups those that `groups` wants."""
    merged: _State = {}
    for name in {**shared, **own}:
        if name == _GROUPS:
            beside = own.get(name, [{}] * len(groups))
            merged[name] = [
                {**_like(group, shared[name]), **rest, _OF_EXPERTS: group[_OF_EXPERTS]}
                for group, rest in zip(groups, beside, strict=True)
            ]
        elif isinstance(shared.get(name), dict):
            merged[name] = _merged(shared[name], own.get(name, {}), groups)
        else:
            merged[name] = own[name] if name in own else deepcopy(shared[name])
    return merged


def _like(group: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The saved group with the settings of `group`, whatever it is of."""
    keys = [key for key in param_group_identifier_keys if key != _OF_EXPERTS]
    (found,) = [one for one in saved if all(one.get(key) == group.get(key) for key in keys)]
    return found
