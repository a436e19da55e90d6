"""What a rank keeps of a long row for the backward pass falls with the number of context ranks."""

from pathlib import Path

import pytest
import torch
from engine.layouts import CONTEXT, LAYOUTS, topology, trained
from ranks import run_ranks
from tiny_models import llama_config, write_llama
from torch import Tensor

from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import token_batch
from rto_megatron.models.build import forward

LENGTH = 256  # the model's positions


def _kept_bytes(layout: str, folder: Path) -> int:
    """Bytes of all tensors that a training forward of one row leaves, weights and what depends on no length apart."""
    place = topology(layout)
    model = trained(place, folder, False, OptimizerConfig(kind="sgd", lr=0.1))
    ids = [7 * i % 90 + 3 for i in range(LENGTH)]
    batch = token_batch([(ids, 1)], True, place.row_multiple, place.device.torch_device)
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward(model.module.last, batch, place)
    assert output.shape[0] == LENGTH // CONTEXT.get(layout, (1, ""))[0]
    return sum(kept.values())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Layout -> bytes on its first and its last context rank, whichever keeps more."""
    folder = tmp_path_factory.mktemp("model")
    write_llama(folder)
    return {
        layout: max(run_ranks(LAYOUTS[layout][0], _kept_bytes, layout, folder))
        for layout in ("one", "cp2", "cp2_gather", "cp4", "cp4_gather")
    }


def test_ulysses_keeps_a_part_of_everything(kept: dict[str, int]) -> None:
    print({layout: f"{size / 2**20:.2f} MiB" for layout, size in kept.items()})
    assert kept["cp2"] / kept["one"] == pytest.approx(1 / 2, rel=0.1)
    # Two heads of keys and values for four ranks: each has one of them, not half of one.
    assert 1 / 4 < kept["cp4"] / kept["one"] < 0.3


def test_gathered_keys_stay_whole(kept: dict[str, int]) -> None:
    config = llama_config()
    keys = 2 * config.num_key_value_heads * config.head_dim * LENGTH * 4 * config.num_hidden_layers
    # On a CPU torch makes a mask of a rank's queries and the keys before them, which its kernels for GPUs do without.
    masks = LENGTH // 2 * LENGTH * 4 * config.num_hidden_layers
    assert kept["cp2_gather"] - kept["cp2"] == pytest.approx(keys / 2 + masks, rel=0.05)
    assert kept["cp4_gather"] < kept["cp2_gather"]
