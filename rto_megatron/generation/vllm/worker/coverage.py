"""What a push would do to a vLLM model: asks vLLM's own loaders, with tensors without data.

The rehearsal says whether every parameter would be set, and which part of each tensor this worker's shard takes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rto_megatron.generation.vllm.worker.landing import Copies
from rto_megatron.generation.vllm.worker.regions import Place, Region, owned_parameters, region_of_view
from rto_megatron.weight_sync.manifest import DTYPES, PieceSpec

Loader = Callable[..., object]  # vLLM's loaders share no signature


@dataclass(frozen=True)
class Coverage:
    """What was rehearsed.

    Args:
        problems: everything that would go wrong, in words.
        places: tensor name -> every box that this worker's parameters take of it, and where it goes.

    Example:
        if not coverage.problems: receive(coverage.needs)
    """

    problems: tuple[str, ...]
    places: dict[str, tuple[tuple[Region, Place], ...]]

    @property
    def needs(self) -> dict[str, tuple[Region, ...]]:
        """The boxes alone."""
        return {name: tuple(box for box, _ in places) for name, places in self.places.items()}


def rehearse(model: nn.Module, model_config: ModelConfig, tensors: Iterable[PieceSpec]) -> Coverage:
    """Rehearses the load of complete tensors under Hugging Face names.

    The model serves on unchanged: during the rehearsal its parameters are vLLM's meta-device stand-ins.

    Args:
        model: vLLM's model of this worker, a shard under tensor parallelism.
        model_config: its configuration.
        tensors: one spec of each tensor; its name, dtype and whole shape are read.
    """
    tied = {name for name, _ in tied_parameters(model)}
    initialize_layerwise_reload(model)
    rehearsal = _Rehearsal(model)
    try:
        rehearsal.run(tensors)
    finally:
        rehearsal.restore_loaders()
        finalize_layerwise_reload(model, model_config)
    return rehearsal.coverage(tied)


class _Rehearsal:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: list[tuple[Tensor, Loader | None]] = []
        self._expected: dict[str, int] = {}
        self._counted: dict[str, int] = {}
        self._places: dict[str, tuple[tuple[Region, Place], ...]] = {}
        self._problems: list[str] = []
        self._tensor: PieceSpec | None = None
        replaced: set[int] = set()
        for name, module, _, parameter in owned_parameters(model):
            # One that never moves to the meta device can have several owners.
            if id(parameter) not in replaced:
                replaced.add(id(parameter))
                self._replace_loader(name, module, parameter)

    def _replace_loader(self, name: str, module: nn.Module, parameter: Tensor) -> None:
        # A parameter may keep its loader behind a property; the reload reads it the same way.
        wrapped: Loader | None = getattr(parameter, "weight_loader", None)
        loader = wrapped or default_weight_loader
        # The reload has wrapped the loader in one that buffers data; the real one is underneath.
        while loader.__name__ == "online_process_loader":
            loader = loader.__wrapped__  # type: ignore[union-attr]  # set by functools.wraps
        # Biases are never moved to the meta device by the reload: they must not be loaded into here.
        stand_in = to_meta_tensor(parameter)
        self._originals.append((parameter, wrapped))
        self._expected[name] = _loadable_numel(module, parameter)
        self._counted[name] = 0

        def count(*given: Tensor, **named: Tensor) -> object:
            # Experts are loaded with all arguments by name, everything else with the first two by position.
            loaded = named["loaded_weight"] if "loaded_weight" in named else given[1]
            given, named = (
                (stand_in, *given[1:]) if given else given,
                named | {"param": stand_in} if "param" in named else named,
            )
            if loaded.dtype != parameter.dtype:
                self._problems.append(f"{name} is {parameter.dtype} here and {loaded.dtype} in the push")
            with Copies() as copies:
                returned = loader(*given, **named)
            self._counted[name] += sum(target.numel() for target, _ in copies.seen)
            self._note((source, Place.of(target, name, stand_in)) for target, source in copies.seen)
            return returned

        parameter.weight_loader = count  # type: ignore[attr-defined]  # vLLM keeps it on the tensor

    def _note(self, copies: Iterable[tuple[Tensor, Place]]) -> None:
        spec = self._tensor
        assert spec is not None
        for source, place in copies:
            box = region_of_view(source, spec.shape)
            if box is None:
                self._problems.append(f"{spec.name} is rearranged by vLLM's loader, which cannot be proved")
            else:
                self._places[spec.name] = (*self._places.get(spec.name, ()), (box, place))

    def run(self, tensors: Iterable[PieceSpec]) -> None:
        for spec in tensors:
            self._tensor = spec
            empty = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
            before = len(self._problems)
            try:
                load_weights(self._model, [(spec.name, empty)])
            except (
                AssertionError,
                AttributeError,
                LookupError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                self._problems.append(
                    f"{spec.name} {spec.dtype} {list(spec.shape)} cannot be loaded ({type(error).__name__}: {error})"
                )
                continue
            if spec.name not in self._places and len(self._problems) == before:
                self._problems.append(f"{spec.name} is no part of the model")

    def coverage(self, tied: set[str]) -> Coverage:
        for name, expected in self._expected.items():
            if name not in tied and self._counted[name] != expected:
                self._problems.append(f"{name} would get {self._counted[name]} of its {expected} numbers")
        return Coverage(tuple(self._problems), self._places)

    def restore_loaders(self) -> None:
        for parameter, wrapped in self._originals:
            if wrapped is None:
                del parameter.weight_loader  # type: ignore[attr-defined]  # vLLM keeps it on the tensor
            else:
                parameter.weight_loader = wrapped  # type: ignore[attr-defined]  # as above


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Loads whole tensors by vLLM's own loader; returns the names of the parameters that it filled."""
    load: Callable[..., set[str]] = model.load_weights  # type: ignore[assignment]  # unknown to torch's Module
    return load(weights)


def tied_parameters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Full name and owner of each parameter that an earlier module owns as well: tied embeddings."""
    seen: set[int] = set()
    tied = []
    for name, module, _, parameter in owned_parameters(model):
        if id(parameter) in seen:
            tied.append((name, module))
        seen.add(id(parameter))
    return tied


def _loadable_numel(module: nn.Module, parameter: Tensor) -> int:
    if isinstance(module, VocabParallelEmbedding):
        # The vocabulary is padded; padding rows are set to zero, not loaded.
        return module.shard_indices.num_org_elements * parameter.numel() // parameter.shape[0]
    return parameter.numel()
