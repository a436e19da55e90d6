"""torch's Adam inside megatron-core 0.19.2's optimizers, and its checkpoints: numbered patches, on GPUs too.

It is the optimizer whatever computes the layers, so that a checkpoint of one kind of kernels loads with another. That
Adam keeps a `step` tensor per parameter, which megatron's load paths lose or share. Other optimizers are left alone.
"""

import functools
from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor

from rto_megatron.platform.patches import apply_missing, replace

_applied: set[str] = set()

# Parameter -> state; megatron adds `common_step`, a tensor, for all of them.
type _States = dict[object, Mapping[str, object] | Tensor]


def prime_adam_state(optimizer: object) -> None:
    """Give every parameter the state that torch's Adam makes in its first step; keep state that exists.

    Without it megatron cannot build the optimizer's sharded state before the first step: DistributedOptimizer
    asserts that one `step` exists, the others save no moments. Call it before each save and each load.

    Args:
        optimizer: what get_megatron_optimizer returned.
    """
    from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

    if isinstance(optimizer, ChainedOptimizer):
        for chained in optimizer.chained_optimizers:
            prime_adam_state(chained)
        return
    assert isinstance(optimizer, MegatronOptimizer)
    if not _is_torch_adam(optimizer.optimizer):
        return
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.optimizer.state[parameter]
            state.setdefault("step", _zero_step())
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def o1_fully_reshardable_step() -> None:
    """Loading `fully_reshardable` state leaves `step` as load_state_dict set it, instead of KeyError 'step'.

    Call site: load_parameter_state_from_fully_reshardable of optimizer/distrib_optimizer.py drops 'step' from
    what it hands to _set_main_param_and_optimizer_states, which asks for every tensor of the state.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    def set_states_and_keep_step(
        self: DistributedOptimizer, model_param: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        if _is_torch_adam(self.optimizer) and "step" not in tensors:
            group_index, order = self.model_param_group_index_map[model_param]
            main_param = self.optimizer.param_groups[group_index]["params"][order]
            tensors = {**tensors, "step": self.optimizer.state[main_param]["step"]}
        set_states(self, model_param, tensors)

    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states_and_keep_step)


def o2_own_step() -> None:
    """After a load each parameter of a DistributedOptimizer owns its `step`.

    Call site: load_state_dict of optimizer/distrib_optimizer.py puts one tensor into the state of all
    parameters; Adam then counts it up once per parameter and silently diverges.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_state_dict

    @functools.wraps(load)
    def load_and_own_steps(self: DistributedOptimizer, state_dict: dict[str, object]) -> None:
        load(self, state_dict)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    replace(DistributedOptimizer, "load_state_dict", load_and_own_steps)


def o3_missing_step() -> None:
    """A checkpoint of before the first step loads with step 0, instead of KeyError 'step'.

    Call site: sharded_state_dict of FP32Optimizer and Float16OptimizerWithFloat16Params in
    optimizer/optimizer.py writes the common step `if step:`, which is false for 0.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    load_fp32 = FP32Optimizer.load_state_dict
    load_float16 = Float16OptimizerWithFloat16Params.load_state_dict

    @functools.wraps(load_fp32)
    def load_fp32_with_step(self: FP32Optimizer, state_dict: dict[str, _States]) -> None:
        if _is_torch_adam(self.optimizer):
            _add_missing_step(state_dict["state"])
        load_fp32(self, state_dict)

    @functools.wraps(load_float16)
    def load_float16_with_step(
        self: Float16OptimizerWithFloat16Params, state_dict: dict[str, dict[str, _States]]
    ) -> None:
        if _is_torch_adam(self.optimizer):
            _add_missing_step(state_dict["optimizer"]["state"])
        load_float16(self, state_dict)

    replace(FP32Optimizer, "load_state_dict", load_fp32_with_step)
    replace(Float16OptimizerWithFloat16Params, "load_state_dict", load_float16_with_step)


def o4_torch_with_any_kernels() -> None:
    """The optimizers are torch's also where TransformerEngine is installed.

    Call sites: the imports at the head of optimizer/__init__.py and optimizer/distrib_optimizer.py.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    replace(optimizer, "Adam", torch.optim.AdamW)
    replace(optimizer, "SGD", torch.optim.SGD)
    replace(distrib_optimizer, "Adam", torch.optim.Adam)
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False


PATCHES: dict[str, Callable[[], None]] = {
    "O4": o4_torch_with_any_kernels,
    "O1": o1_fully_reshardable_step,
    "O2": o2_own_step,
    "O3": o3_missing_step,
}


def install(skip: Set[str] = frozenset()) -> None:
    """Apply the patches that this process does not have yet.

    Args:
        skip: names of patches to leave out, for the tests that show what each one is for.
    """
    apply_missing(PATCHES, _applied, skip)


def _add_missing_step(states: _States) -> None:
    # megatron gives `common_step` to every parameter, so leave alone states that hold a step each.
    if "common_step" not in states and any("step" not in state for state in states.values()):
        states["common_step"] = _zero_step()


def _is_torch_adam(optimizer: object) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _zero_step() -> Tensor:
    return torch.tensor(0.0, dtype=torch.float32)
