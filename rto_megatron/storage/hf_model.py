"""A Hugging Face model as a source of tensors: joined ones, names of heads, tied copies, FP8, and nothing left over."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.errors import ModelFolderError, refuse_if
from rto_megatron.models.config_files import shape_of
from rto_megatron.models.families import FAMILIES
from rto_megatron.models.families.blocks import EMBEDDING, LM_HEAD, SCALAR_HEAD
from rto_megatron.models.hf_config import HfConfig, read_config
from rto_megatron.models.parameters import hf_shapes, stored_parameters
from rto_megatron.models.weight_map import MappedParameter
from rto_megatron.storage.foreign_names import BARE, foreign_names, unknown_head
from rto_megatron.storage.hf_folder import HfFolder
from rto_megatron.storage.joined_tensors import StoredPart, joined_parts

_TRL_HEAD = "v_head.summary.weight"
_ONE_ROW_HEADS = ("score.0.weight", "regression_head.weight", LM_HEAD)  # also names of larger heads
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class StoredHead:
    """Where a folder keeps the scalar head of a reward model or critic.

    Example:
        StoredHead(weight="score.weight", bias=None)
    """

    weight: str
    bias: str | None


def find_scalar_head(tensors: HfFolder, config: HfConfig) -> StoredHead | None:
    """The head: transformers' `score`, OpenRLHF's `value_head` or own prefix, TRL's `v_head`, or another's of one row.

    `score.0` and `regression_head` of reward models, and verl's `lm_head`, are heads of a score if they have one row.

    Raises:
        ModelFolderError: several names that could be it, or more labels than one.
    """
    prefix = str(config.values.get("value_head_prefix", "value_head"))
    one_row = (1, config.values.get("hidden_size"))
    names = dict.fromkeys([SCALAR_HEAD, f"{prefix}.weight", "value_head.weight", _TRL_HEAD])
    found = [name for name in names if name in tensors.tensors]
    if not found:
        shapes = {name: tensors.tensors[name].shape for name in _ONE_ROW_HEADS if name in tensors.tensors}
        found = [name for name, shape in shapes.items() if shape == one_row]
    if not found:
        return None
    if len(found) > 1:
        raise ModelFolderError(f"{tensors.path} has the heads {found}; expected one of them")
    if tensors.tensors[found[0]].shape != one_row:
        raise ModelFolderError(
            f"{tensors.path}: {found[0]} has shape {tensors.tensors[found[0]].shape}; a reward model or critic has "
            f"one label, {one_row}"
        )
    bias = found[0].removesuffix(".weight") + ".bias"
    if bias in tensors.tensors and tensors.tensors[bias].shape != (1,):
        raise ModelFolderError(
            f"{tensors.path}: {bias} has shape {tensors.tensors[bias].shape}, expected (1,)"
        )
    return StoredHead(found[0], bias if bias in tensors.tensors else None)


class HfModel:
    """The tensors of one model under the names of its family's map.

    Example:
        HfModel(folder, has_scalar_head=False).require_complete()
    """

    def __init__(self, folder: Path, has_scalar_head: bool | None) -> None:
        """Opens the folder.

        Args:
            has_scalar_head: read a reward model or critic, or a language model; null: what the folder is.

        Raises:
            ModelFolderError: config.json or the files cannot be used, or the folder is both and nobody said which.
        """
        self.config = read_config(folder)
        self.shape = shape_of(self.config)
        require_known(self.config)
        self.folder = HfFolder(folder)
        if (problem := foreign_names(self.folder.tensors)) is not None:
            raise ModelFolderError(f"{folder}: {problem}")
        head = find_scalar_head(self.folder, self.config)
        if has_scalar_head is None and head is not None and self._has_language_head(head):
            raise ModelFolderError(
                f"{folder} has a language head and the scalar head {head.weight}; say which model is meant "
                "(--head language or --head scalar)"
            )
        self.has_scalar_head = head is not None if has_scalar_head is None else has_scalar_head
        self._head: StoredHead | None = head if self.has_scalar_head else None
        self._unused_head: StoredHead | None = None if self.has_scalar_head else head

    def _has_language_head(self, head: StoredHead) -> bool:
        """Besides the scalar one: TRL keeps both, and of a tied model's language head nothing is stored."""
        is_stored = LM_HEAD in self.folder.tensors and head.weight != LM_HEAD
        return is_stored or (self.shape.is_tied and head.weight == _TRL_HEAD)

    @cached_property
    def parameters(self) -> tuple[MappedParameter, ...]:
        """The family's map."""
        return stored_parameters(self.shape, self.has_scalar_head)

    @cached_property
    def _parts(self) -> dict[str, StoredPart]:
        """Name of every tensor of the map -> where it is stored."""
        sizes = hf_shapes(self.parameters)
        parts = {name: StoredPart(name, size) for name, size in sizes.items()}
        if self._head is not None:
            parts[SCALAR_HEAD] = StoredPart(self._head.weight, sizes[SCALAR_HEAD])
        return parts | dict(joined_parts(sizes, self.folder.tensors))

    @property
    def is_plain(self) -> bool:
        """Whether the folder keeps every tensor as transformers saves it, but for a scalar head."""
        is_own = all(part.name == name for name, part in self._parts.items() if name != SCALAR_HEAD)
        return is_own and self.folder.renamed is None

    def head_bias(self) -> float:
        """The constant that the scalar head adds; 0 where it has none."""
        if self._head is None or self._head.bias is None:
            return 0.0
        return float(self.folder.tensor(self._head.bias))

    def read(self, name: str, size: tuple[int, ...]) -> Tensor:
        """See `models.weight_map.TensorReader`; FP8 blocks are dequantised to bfloat16.

        Raises:
            ModelFolderError: a missing tensor or another shape.
        """
        if name in (LM_HEAD, SCALAR_HEAD) and (problem := self._unknown_head()) is not None:
            raise ModelFolderError(f"{self.folder.path}: {problem}")
        part = self._parts[name]
        tensor = part.of(self.folder.read(part.name, part.shape), size)
        if tensor.dtype == torch.float8_e4m3fn:
            return dequantize(tensor, self.folder.tensor(part.name + SCALE_SUFFIX))
        return tensor

    def dtype(self) -> torch.dtype:
        """The dtype that holds every tensor without loss."""
        wanted = [self._parts[n].name for p in self.parameters if not p.is_float32 for n in p.hf]
        found = {self.folder.tensors[n].dtype for n in wanted if n in self.folder.tensors}
        found = {torch.bfloat16 if d == torch.float8_e4m3fn else d for d in found}
        return found.pop() if len(found) == 1 else torch.float32

    def problems(self, unread: str | None = None) -> list[str]:
        """Everything that is missing, misshaped or left over.

        Args:
            unread: a tensor that is of no use, whether it is there or not.
        """
        stored, problems = self.folder.tensors, []
        for name, size in self._wanted.items():
            if name == unread:
                continue
            if (joined := self._joined_problem(name)) is not None:
                problems.append(joined)
            elif name not in stored:
                problems.append(f"{name} {size} is missing")
            elif stored[name].shape != size:
                problems.append(f"{name} has shape {stored[name].shape}, config.json says {size}")
            elif stored[name].dtype == torch.float8_e4m3fn:
                problems += self._scale_problems(name, size)
        for name in sorted(self._unused() - self.left_aside.keys() - {unread}):
            if name == LM_HEAD and self.shape.is_tied:
                problems.append(
                    f"{name} differs from {EMBEDDING}, to which config.json ties it; if it is the model's head, set "
                    "tie_word_embeddings=false there"
                )
            else:
                problems.append(
                    f"{name} {stored[name].shape} is left over: config.json describes no such tensor"
                )
        return problems

    def _joined_problem(self, name: str) -> str | None:
        is_fp8 = name in self.folder.tensors and self.folder.tensors[name].dtype == torch.float8_e4m3fn
        if not is_fp8 or name in self._parts:
            return None
        return (
            f"{name} is FP8 and several tensors in one, whose scales are not read; take a release in bfloat16"
        )

    def _scale_problems(self, name: str, size: tuple[int, ...]) -> list[str]:
        scale = self.folder.tensors.get(name + SCALE_SUFFIX)
        if scale is None:
            return [f"{name} is FP8 and {name}{SCALE_SUFFIX} is missing"]
        want = scale_shape(size)
        found = f"{name}{SCALE_SUFFIX} has shape {scale.shape}"
        return [] if scale.shape == want else [f"{found}; a scale for every block of {name} is {want}"]

    @cached_property
    def left_aside(self) -> dict[str, str]:
        """Tensors that are stored and no weights of this model, with the reason."""
        reasons = {name: self._reason_to_leave(name) for name in sorted(self._unused())}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @cached_property
    def _wanted(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape of every tensor of the map."""
        return {part.name: part.shape for part in self._parts.values()}

    def _unused(self) -> set[str]:
        wanted = self._wanted.keys()
        return self.folder.tensors.keys() - wanted - {name + SCALE_SUFFIX for name in wanted}

    def require_complete(self, unread: str | None = None) -> None:
        """Raises ModelFolderError: all problems at once; see `problems`."""
        if unread is None and (problem := self._unknown_head()) is not None:
            raise ModelFolderError(f"{self.folder.path}: {problem}")
        kind = "reward model" if self.has_scalar_head else "language model"
        heading = f"{self.folder.path} does not hold the {self.shape.family} {kind} of its config.json"
        refuse_if(self.problems(unread), heading, ModelFolderError)

    def require_language(self) -> None:
        """Raises ModelFolderError: the folder is a reward model's or critic's, though its embedding may be a head."""
        head = self._unused_head
        if head is not None and not self._has_language_head(head):
            raise ModelFolderError(
                f"{self.folder.path} holds the score of a reward model or critic ({head.weight}) and no language head; "
                "name a language model, such as the one that it was made from"
            )

    def _unknown_head(self) -> str | None:
        """What to say where the wanted head is missing and another one is there."""
        stored = self.folder.tensors
        is_known = LM_HEAD in stored or self._head is not None or self._unused_head is not None
        if is_known or (self.shape.is_tied and not self.has_scalar_head):
            return None
        heads = {n: stored[n].shape for n in sorted(stored) if not n.startswith("model.")}
        if not heads and self.folder.renamed is not None:
            return BARE
        return unknown_head(heads, self.shape.hidden_size)

    def _reason_to_leave(self, name: str) -> str | None:
        if self._head is not None:
            if name == self._head.bias:
                return "the head's constant, kept as `mean` of config.json"
            if name == LM_HEAD:
                return "a language head beside the scalar head"
        elif name == LM_HEAD and self._is_tied_copy():
            return "a copy of the tied embedding, bit-equal"
        if self._unused_head is not None and name in (self._unused_head.weight, self._unused_head.bias):
            return "a scalar head beside the language head"
        patterns: dict[re.Pattern[str], str] = {_COMPUTED: "computed from config.json"}
        patterns |= FAMILIES[self.shape.family].left_aside(self.shape)
        return next((reason for pattern, reason in patterns.items() if pattern.fullmatch(name)), None)

    def _is_tied_copy(self) -> bool:
        if not self.shape.is_tied or EMBEDDING not in self.folder.tensors:
            return False
        return torch.equal(self.folder.tensor(LM_HEAD), self.folder.tensor(EMBEDDING))


SCALE_SUFFIX = "_scale_inv"
_BLOCK = 128


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The bfloat16 matrix.

    Args:
        weight: float8_e4m3fn [r, c].
        scale: float32 [ceil(r / 128), ceil(c / 128)], by which the numbers of a block are multiplied.

    Source: DeepSeek-V3, inference/kernel.py:weight_dequant.
    """
    rows, columns = weight.shape
    spread = scale.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]
    return (weight.float() * spread).to(torch.bfloat16)


def scale_shape(size: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix of this size."""
    return tuple(-(-count // _BLOCK) for count in size)


def require_known(config: HfConfig) -> None:
    """Refuses quantised weights other than these.

    Raises:
        UserError: config.json names another quantisation.
    """
    quantization = config.values.get("quantization_config")
    if quantization is None:
        return
    if quantization.get("quant_method") != "fp8" or quantization.get("weight_block_size") != [_BLOCK, _BLOCK]:
        config.refuse(
            f"quantization_config is {quantization}; expected plain weights, or FP8 in blocks of {_BLOCK} x {_BLOCK}. "
            "Take the model's unquantised release"
        )
