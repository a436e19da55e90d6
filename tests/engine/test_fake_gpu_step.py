"""What a step does on a GPU beside its layers: copies that nobody waits for, logits in fp32, Adam in one kernel."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import topology
from fake_gpu import GPU, FakeGpu, pretend
from ranks import run_ranks
from tiny_models import write_llama

from rto_megatron.config.training import OptimizerConfig, TrainParallelConfig
from rto_megatron.data.packing import gather_to_grid, scatter_to_positions, token_batch
from rto_megatron.engine.optimizer import build_optimizer, wrap_for_training
from rto_megatron.models.build import build_chunks, is_padding, transformer_config
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.logit_shaping import LogitShaping
from rto_megatron.models.packed_rows import packed_row, row_of
from rto_megatron.platform.device import Device

SEQUENCES = [(tuple(range(3, 40)), 20), ((*range(3, 23), 7, 8), 20)]  # of one prompt


def _copies() -> tuple[int, list[torch.Size]]:
    pretend()
    with FakeGpu() as gpu:
        for packed, shares_prompts in ((True, False), (True, True), (False, False)):
            batch = token_batch(SEQUENCES, packed, 8, GPU, shares_prompts)
            row = packed_row(batch.cu_seqlens, GPU) if batch.shared is None else row_of(batch.shared)
            assert {batch.tokens_T.device, row.cu_seqlens_q.device, is_padding(batch).device} == {GPU}
            grid = torch.empty(2, 17, device=GPU)
            values_T = scatter_to_positions(grid, batch, [20, 20], [17, 2])
            assert gather_to_grid(values_T, batch, [20, 20], [17, 2], 17).shape == grid.shape
    return gpu.num_copies, gpu.waited


def test_nobody_waits_for_the_copies_of_a_batch() -> None:
    ((num_copies, waited),) = run_ranks(1, _copies)
    assert waited == [] and num_copies >= 3 * (3 + 1 + 1 + 6)  # ids, targets, places; offsets; padding; grids


def _logits() -> list[tuple[torch.dtype, torch.device]]:
    pretend()
    with FakeGpu():
        states_Ch, weight_vh = (torch.empty(n, 16, dtype=torch.bfloat16, device=GPU) for n in (4, 32))
        found = [LogitShaping(is_fp32=is_fp32).logits(states_Ch, weight_vh) for is_fp32 in (False, True)]
    return [(one.dtype, one.device) for one in found]


def test_logits_of_a_head_in_fp32_have_a_product_of_their_own() -> None:
    assert run_ranks(1, _logits) == [[(torch.float32, GPU)] * 2]


def _adam(folder: Path, dtype: torch.dtype, is_sharded: bool) -> tuple[int, int, list[set[torch.device]]]:
    """How many parameters there are and were stepped, and where what each call of the kernel was given lies."""
    place = replace(topology("one"), device=Device(GPU, "nccl"))
    shape, parallel = read_shape(folder), TrainParallelConfig(distributed_optimizer=is_sharded)
    pretend()
    with FakeGpu() as gpu, GPU:
        config = transformer_config(shape, place, dtype, recompute=False)
        module = build_chunks(shape, config, place, False)
        wrapped = wrap_for_training(module, parallel, place)
        optimizer = build_optimizer(wrapped, OptimizerConfig(lr=1e-3), parallel, place)
        # Without the norm of the gradients: Megatron reads a number for each parameter off the device before the step.
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()
    lists = [[one for one in call if isinstance(one, list)] for call in gpu.kernel]
    devices = [{one.device for arguments in call for one in arguments} for call in lists]
    return len(list(module.parameters())), sum(len(call[0]) for call in lists), devices


@pytest.mark.parametrize(("dtype", "is_sharded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_adam_steps_in_one_kernel_that_reads_nothing(
    dtype: torch.dtype, is_sharded: bool, tmp_path: Path
) -> None:
    write_llama(tmp_path)
    ((num_parameters, num_stepped, devices),) = run_ranks(1, _adam, tmp_path, dtype, is_sharded)
    assert (
        devices == [{GPU}] * len(devices) and 1 <= len(devices) <= 2
    )  # of weights that decay, and of others
    assert num_stepped == num_parameters
