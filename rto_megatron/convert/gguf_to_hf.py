"""A GGUF file of llama.cpp -> Hugging Face folder, read by transformers and the package gguf, and proved.

A starting point for training, not a way back: packed weights are multiplied out, and what packing lost stays lost. The
whole model is in memory, in float32, twice.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rto_megatron.data.tokenizer import load_plain_tokenizer
from rto_megatron.errors import ConversionError, MachineError, ModelFolderError
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.families import FAMILIES
from rto_megatron.platform.fresh_folder import fresh_folder, require_absent, require_space

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_QUESTIONS = ("What is the capital of France?", "Write one short sentence about the sea.")
_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class GreedyAnswer:
    """What the folder's model says first, beside the file's own.

    Example:
        GreedyAnswer("What is 2 + 2?", "Four.", num_alike=8, num_tokens=8)
    """

    question: str
    answer: str
    num_alike: int  # first tokens that are those of the file's float32 weights, before rounding to `dtype`
    num_tokens: int


@dataclass(frozen=True)
class GgufReport:
    """What was written, and what is known of it.

    Example:
        print(report.num_tensors, report.answers[0].answer)
    """

    model_type: str
    num_tensors: int
    dtype: str
    answers: tuple[GreedyAnswer, ...]


def convert_gguf(source: Path, target: Path, dtype: torch.dtype) -> GgufReport:
    """Writes a folder that appears when it is proved: all tensors bit-equal to the file's in `dtype`, answers shown.

    Args:
        source: one .gguf file with a language model of a known family and its tokenizer.
        target: new folder.
        dtype: of the weights that are written.

    Raises:
        MachineError: the package gguf is missing.
        ModelFolderError: the file cannot be read, not all of it, or is of another family.
        RecipeError: `target` exists.
        ConversionError: what was written is not what was read.
    """
    _require_readable(source)
    require_absent(target)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        config = AutoConfig.from_pretrained(**where, local_files_only=True)
        _require_family(source, str(config.model_type))
        _require_read(source, config)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        read: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, local_files_only=True
        )
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, ModelFolderError):
            raise
        raise ModelFolderError(f"{source} cannot be read by transformers and gguf ({error})") from error
    tensors: Mapping[str, Tensor] = {name: one.detach().float() for name, one in read.state_dict().items()}
    plain = _model_of(read, tensors)
    require_space(target, sum(one.numel() * dtype.itemsize for one in tensors.values()))
    with fresh_folder(target) as folder:
        own = _greedy(plain, tokenizer)
        torch.nn.Module.to(plain, dtype)
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        _name_tokenizer(folder)
        answers = _prove(folder, tensors, dtype, own)
    return GgufReport(str(config.model_type), len(tensors), str(dtype).removeprefix("torch."), answers)


def _require_readable(source: Path) -> None:
    if PathFinder.find_spec("gguf") is None:
        raise MachineError(
            "the package gguf is not installed; install it with: pip install 'rto-megatron[gguf]'"
        )
    if not source.is_file() or source.suffix != _SUFFIX:
        raise ModelFolderError(f"{source} is no file ending in {_SUFFIX}; name the file itself")
    with source.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelFolderError(f"{source} does not begin as a GGUF file does; fetch it again")


def _require_family(source: Path, model_type: str) -> None:
    if model_type not in FAMILIES:
        raise ModelFolderError(
            f"{source} holds a model of type {model_type}; known families are {', '.join(FAMILIES)}"
        )


def _require_read(source: Path, config: PreTrainedConfig) -> None:
    """Refuses what changes a model's outputs and transformers 5.19 leaves unread: scaled rotations, some windows."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    values = {name: field.contents() for name, field in reader.fields.items()}
    unread = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    unread += [f"{n}={v}" for n, v in values.items() if ".rope.scal" in n and v not in ("none", 0, 1)]
    read, longest = config.to_dict().get("sliding_window"), config.max_position_embeddings
    unread += [
        f"{n}={v}"
        for n, v in values.items()
        if n.endswith(".attention.sliding_window") and 0 < v < longest and v != read
    ]
    if unread:
        raise ModelFolderError(
            f"{source} holds {', '.join(unread)}, which transformers does not read, and without which it is another "
            "model; take the model's release in safetensors"
        )


def _model_of(read: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model like any other, without the mark of packed weights that transformers refuses to save."""
    config = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    # The file holds it in float32; as a double it would read 9.999999747378752e-06.
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(type(read.config)(**config)).float().eval()
    plain.load_state_dict(dict(tensors))
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain


def _name_tokenizer(folder: Path) -> None:
    """Names the class that all versions of transformers know, as `data.tokenizer` does."""
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _prove(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, own: list[list[int]]
) -> tuple[GreedyAnswer, ...]:
    read_shape(folder)
    tokenizer = load_plain_tokenizer(folder)
    back: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    ).eval()
    written = back.state_dict()
    wrong = [
        name
        for name, tensor in tensors.items()
        if name not in written or not torch.equal(written[name], tensor.to(dtype))
    ]
    if wrong or len(written) != len(tensors):
        raise ConversionError(
            f"{folder} does not hold what was read: {', '.join(wrong[:5]) or 'a tensor too many'}; please report it"
        )
    answers = _greedy(back.float(), tokenizer)
    alike = [_num_alike(one, other) for one, other in zip(answers, own, strict=True)]
    if dtype == torch.float32 and answers != own:
        raise ConversionError(f"{folder} answers otherwise than the file; please report it")
    return tuple(
        GreedyAnswer(question, str(tokenizer.decode(ids, skip_special_tokens=True)), count, len(ids))
        for question, ids, count in zip(_QUESTIONS, answers, alike, strict=True)
    )


def _num_alike(one: list[int], other: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


@torch.no_grad()
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The first tokens of an answer to each question, by the likeliest one each."""
    answers = []
    for question in _QUESTIONS:
        if tokenizer.chat_template is None:
            prompt = tokenizer(question, return_tensors="pt")
        else:
            turns = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids = prompt["input_ids"]
        mask = torch.ones_like(ids)
        said = model.generate(  # type: ignore[operator]  # transformers declares it on a mixin
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=_ANSWER_TOKENS
        )
        answers.append([int(token) for token in said[0, ids.shape[1] :]])
    return answers
