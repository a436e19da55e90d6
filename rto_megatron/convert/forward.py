"""One rank of a forward pass through a checkpoint, for the proof by numbers."""

import json
from pathlib import Path

from safetensors.torch import save_file

from rto_megatron.config import schema
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.engine.source import WeightSource
from rto_megatron.platform.device import prepare


def write_outputs(
    megatron: Path, hf_files: Path, tokens: Path, outputs: Path, tensor: int, pipeline: int, scalar: bool
) -> None:
    """Builds this rank's part of the model; the last stage writes the outputs of every sequence.

    Args:
        tokens: a JSON list of lists of token ids.
        outputs: safetensors file to write, number of the sequence -> float32 [tokens, vocabulary] or [tokens, 1].

    Raises:
        UserError: the checkpoint cannot be read.
    """
    device = prepare()
    # These import megatron.core, which must find the patches in place.
    from torch.distributed import destroy_process_group

    from rto_megatron.data.packing import token_batch
    from rto_megatron.engine.roles import build_frozen
    from rto_megatron.parallel.topology import Topology

    source = open_megatron(megatron, hf_files, scalar)
    has_experts = source.shape.experts is not None
    place = Topology.init(device, tensor, pipeline, sequence=has_experts, seed=0)
    weights = WeightSource("megatron", source.reader.folder, hf_files)
    precision = schema.FrozenPrecisionConfig(dtype="fp32")
    model = build_frozen("converted", weights, scalar, precision, place)
    sequences = json.loads(tokens.read_text())
    batches = [token_batch([(ids, 1)], True, place.row_multiple, device.torch_device) for ids in sequences]
    found = model.raw_outputs(batches)
    if place.is_last_stage and place.tensor_rank == 0 and place.data_rank == 0:
        named = {
            str(number): values[: len(ids)].contiguous().cpu()
            for number, (ids, values) in enumerate(zip(sequences, found, strict=True))
        }
        save_file(named, outputs)
    place.barrier()
    destroy_process_group()
