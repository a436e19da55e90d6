"""What can be done wrong between a worker's checks and vLLM's own loader: faults that tests plant in servers.

Without vLLM, so that a test may import it; planted_extension.py brings them into a server's workers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

PLANT_FILE_VARIABLE = "RTO_TEST_PLANT_FILE"

KEYS_AND_VALUES = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight")
NORMS = ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight")
SQUARE = "model.layers.0.self_attn.o_proj.weight"  # cut by tensor parallelism
PLAIN = "model.norm.weight"  # not packed for a CPU's kernels

Weights = Iterable[tuple[str, Tensor]]
Load = Callable[[Weights], set[str]]
Old = Mapping[str, Tensor]  # what a worker's parameters held before, by name
Plant = Callable[[nn.Module, Old], AbstractContextManager[None]]


def _around_loader(change: Callable[[nn.Module, Load, Weights, Old], set[str]]) -> Plant:
    @contextmanager
    def planted(model: nn.Module, old: Old) -> Iterator[None]:
        load: Load = model.load_weights
        model.load_weights = lambda weights: change(model, load, weights, old)
        try:
            yield
        finally:
            del model.load_weights

    return planted


def _skip(model: nn.Module, load: Load, weights: Weights, old: Old) -> set[str]:
    for _ in weights:
        pass
    return {name for name, _ in model.named_parameters()}


def _exchange(names: tuple[str, str]) -> Plant:
    other = dict(zip(names, reversed(names), strict=True))
    return _around_loader(
        lambda model, load, weights, old: load((other.get(name, name), value) for name, value in weights)
    )


def _transpose(model: nn.Module, load: Load, weights: Weights, old: Old) -> set[str]:
    return load((name, value.t() if name == SQUARE else value) for name, value in weights)


def _put_back(model: nn.Module, load: Load, weights: Weights, old: Old) -> set[str]:
    loaded = load(weights)
    model.get_parameter(PLAIN).detach().numpy()[:] = old[PLAIN].numpy()  # no operator of torch's
    return loaded


PLANTS: dict[str, Plant] = {
    "skip": _around_loader(_skip),
    "put back": _around_loader(_put_back),
    "exchange keys and values": _exchange(KEYS_AND_VALUES),
    "exchange norms": _exchange(NORMS),
    "transpose": _around_loader(_transpose),
}
