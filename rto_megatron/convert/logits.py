"""Proof by numbers: Megatron's outputs at a tensor x pipeline layout against transformers', both in float32.

The ranks run `convert.forward` in processes of their own; the reference is computed here.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from rto_megatron.config.training import FrozenPrecisionConfig, ParallelConfig
from rto_megatron.convert.conversion_report import LogitsProof
from rto_megatron.data.tokenizer import has_tokenizer, load_plain_tokenizer
from rto_megatron.errors import ConversionError
from rto_megatron.models.families.blocks import SCALAR_HEAD
from rto_megatron.storage.hf_model import HfModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
from safetensors.torch import save_file

from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.engine.source import WeightSource
from rto_megatron.platform.device import prepare

# Relative to the largest output: sums of thousands of float32 products differ by their order.
TOLERANCE = 1e-4
_RANDOM_LENGTHS = (5, 17, 64)
_TEXTS = (
    "The committee met on Tuesday to discuss the budget; nothing was decided, and everyone went home early.",
    "def mean(xs):\n    return sum(xs) / len(xs)\n\n# Ünïcode, naïve café, 東京, emoji 🙂\n",
)
RunRanks = Callable[[int, Sequence[str]], None]  # (number, arguments of the rto command)


@torch.no_grad()
def prove_logits(
    hf_folder: Path, megatron: Path, scalar: bool, tensor: int, pipeline: int, run_ranks: RunRanks
) -> LogitsProof:
    """Runs both models on random and real text.

    Args:
        scalar: compare a reward model's or critic's value at every token.
        tensor, pipeline: a layout that `models.checks.check_layout` has no objection to.

    Raises:
        ConversionError: an output differs too much.
    """
    model = HfModel(hf_folder, scalar)
    sequences = _sequences(hf_folder, model.shape.vocab_size)
    with TemporaryDirectory(prefix="rto-logits-") as folder:
        tokens, outputs = Path(folder) / "tokens.json", Path(folder) / "outputs.safetensors"
        tokens.write_text(json.dumps([ids for group in sequences.values() for ids in group]))
        layout = [
            f"--tensor={tensor}",
            f"--pipeline={pipeline}",
            f"--head={'scalar' if scalar else 'language'}",
        ]
        run_ranks(
            tensor * pipeline,
            ["convert", "outputs", str(megatron), str(hf_folder), str(tokens), str(outputs), *layout],
        )
        found = load_file(outputs)
    reference = _reference_outputs(model)
    numbers = iter(range(len(found)))
    magnitudes, differences = [], {}
    for name, group in sequences.items():
        pairs = [(reference(ids), found[str(next(numbers))]) for ids in group]
        magnitudes.append(_largest([want for want, _ in pairs]))
        differences[name] = _largest([want - got for want, got in pairs])
    largest = _largest([torch.tensor(magnitudes)])
    tolerance = TOLERANCE * max(1.0, largest)
    # Written so that a NaN is refused.
    if not all(difference <= tolerance for difference in differences.values()):
        raise ConversionError(
            f"the outputs of {megatron} at TP{tensor} x PP{pipeline} differ from transformers' of {hf_folder} by "
            f"{differences}, of at most {largest:.3g}; expected less than {tolerance:.1e}. If the digests agree, "
            "Megatron computes this model otherwise than transformers: please report it with the config.json"
        )
    counts = {name: sum(len(ids) for ids in group) for name, group in sequences.items()}
    return LogitsProof(tensor, pipeline, counts, differences, largest, tolerance)


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude; a NaN if there is one, which Python's max would pass over."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())


def _sequences(folder: Path, vocab_size: int) -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in _RANDOM_LENGTHS]
    if not has_tokenizer(folder):
        return {"random": random}
    tokenizer = load_plain_tokenizer(folder)
    texts = [[i for i in tokenizer(text)["input_ids"] if i < vocab_size] for text in _TEXTS]
    return {"random": random, "text": texts}


def _reference_outputs(model: HfModel) -> Callable[[list[int]], Tensor]:
    """transformers' outputs [tokens, vocabulary] or [tokens, 1] of one sequence."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not model.has_scalar_head:
        language = _in_transformers(AutoModelForCausalLM, model)
        return lambda ids: language(torch.tensor([ids])).logits[0]
    # The head may have a name that no class of transformers knows: it is applied to the decoder's states here.
    decoder = _in_transformers(AutoModel, model)
    head = model.read(SCALAR_HEAD, (1, model.shape.hidden_size)).float()
    return lambda ids: decoder(torch.tensor([ids])).last_hidden_state[0] @ head.T


def _in_transformers(kind: "type[_BaseAutoModelClass]", model: HfModel) -> "PreTrainedModel":
    """The model in float32; of FP8 blocks with the bfloat16 numbers into which they are multiplied out.

    Tensors that the folder does not keep as transformers does are handed over under transformers' names.
    """
    from transformers import AutoConfig

    folder = model.folder.path
    is_quantized = "quantization_config" in model.config.values
    if model.is_plain and not is_quantized:
        loading = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
        loading["attn_implementation"] = "eager"  # torch's kernels leave out a soft cap of scores
        loaded: PreTrainedModel = kind.from_pretrained(folder, **loading).eval()
        return loaded
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if is_quantized:
        del config.quantization_config
    weights = {
        name: model.read(name, size)
        for parameter in model.parameters
        for name, size in parameter.sizes()
        if name != SCALAR_HEAD
    }
    with torch.device("meta"):  # only to learn the class, which alone takes weights without a folder
        found = type(kind.from_config(config))
    filled: PreTrainedModel = found.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32
    ).eval()
    return filled


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
    from rto_megatron.engine.build_roles import build_frozen
    from rto_megatron.parallel.topology import Topology

    source = open_megatron(megatron, hf_files, scalar)
    has_experts = source.shape.experts is not None
    topology = Topology.init(
        device, ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=has_experts), seed=0
    )
    weights = WeightSource("megatron", source.reader.folder, hf_files)
    precision = FrozenPrecisionConfig(dtype="fp32")
    model = build_frozen("converted", weights, scalar, precision, topology)
    sequences = json.loads(tokens.read_text())
    batches = [token_batch([(ids, 1)], True, topology.row_multiple, device.torch_device) for ids in sequences]
    found = model.raw_outputs(batches)
    if topology.is_last_stage and topology.tensor_rank == 0 and topology.data_rank == 0:
        named = {
            str(number): values[: len(ids)].contiguous().cpu()
            for number, (ids, values) in enumerate(zip(sequences, found, strict=True))
        }
        save_file(named, outputs)
    topology.barrier()
    destroy_process_group()
