"""One conversion from beginning to end: plan, write aside, prove, report, rename."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from rto_megatron.config.training import GridConfig
from rto_megatron.convert.conversion_options import Advance, Options, is_narrower
from rto_megatron.convert.conversion_report import (
    ConversionPlan,
    LogitsProof,
    Proof,
    recorded_digests,
    table,
    write_report,
)
from rto_megatron.convert.hf_to_megatron import import_weights, plan_import
from rto_megatron.convert.megatron_source import MegatronSource, open_megatron, require_hugging_face
from rto_megatron.convert.megatron_to_hf import export_weights, plan_export
from rto_megatron.convert.verify import verify_digests
from rto_megatron.errors import ConversionError, refuse_if
from rto_megatron.models.layout_checks import check_layout
from rto_megatron.models.weight_map import dtype_name
from rto_megatron.platform.fresh_folder import fresh_folder, require_absent, require_space
from rto_megatron.storage.hf_model import HfModel
from rto_megatron.storage.megatron_folder import RELEASE, REPORT
from rto_megatron.storage.megatron_tensors import MegatronTensors
from rto_megatron.storage.torch_dist_reader import TorchDistReader

Bar = Callable[[str, int], AbstractContextManager[Advance]]  # (title, bytes) -> what to call with bytes done
Logits = Callable[[Path, Path, bool], LogitsProof]  # (Hugging Face folder, Megatron checkpoint, is scalar)


@dataclass(frozen=True)
class Proofs:
    """How a conversion is to be proved before it takes its name.

    Attributes:
        logits: runs both models; null: not wanted.
        layout: tensor x pipeline ranks of `logits`.

    Example:
        Proofs(digest=True, logits=None, layout=(2, 1))
    """

    digest: bool
    logits: Logits | None
    layout: tuple[int, int] = (1, 1)


def convert_to_megatron(
    source: Path, target: Path, options: Options, proofs: Proofs, bar: Bar, dry_run: bool
) -> Table:
    """Writes a Megatron-LM checkpoint tree, and returns what to show of it.

    Raises:
        UserError: the source cannot be converted, or the result is not proved; `target` does not exist then.
    """
    require_absent(target)
    require_hugging_face(source, f"rto convert megatron-to-hf {source} TARGET")
    model = HfModel(source, options.has_scalar_head)
    plan = plan_import(model, source, target, options)
    _require_possible(plan, proofs)
    if dry_run:
        return table(plan, None, None)
    with fresh_folder(target) as folder:
        with bar("convert", plan.size()) as advance:
            written = import_weights(model, plan, folder, options, advance)
        tensors = MegatronTensors(TorchDistReader(folder / RELEASE), model.shape, model.has_scalar_head)
        recorded = recorded_digests(source, plan.dtype)
        proof = _prove(model, tensors, plan, recorded, proofs, bar, source, folder)
        write_report(folder / REPORT, plan, written, proof)
    return table(plan, written, proof)


def convert_to_hf(
    source: MegatronSource, target: Path, options: Options, proofs: Proofs, bar: Bar, dry_run: bool
) -> Table:
    """Writes a Hugging Face folder that transformers and vLLM load, and returns what to show of it.

    Raises:
        UserError: as `convert_to_megatron`.
    """
    require_absent(target)
    weights = source.reader.folder
    tensors = MegatronTensors(source.reader, source.shape, source.has_scalar_head)
    plan = plan_export(source, tensors, target, options)
    _require_possible(plan, proofs)
    if dry_run:
        return table(plan, None, None)
    with fresh_folder(target) as folder:
        with bar("convert", plan.size()) as advance:
            written = export_weights(source, tensors, plan, folder, options, advance)
        model = HfModel(folder, source.has_scalar_head)
        model.require_complete()
        # Megatron-LM goes on training in the folder of a release, whose report says nothing about its iterations.
        recorded = recorded_digests(weights.parent, plan.dtype) if weights.name == RELEASE else {}
        proof = _prove(model, tensors, plan, recorded, proofs, bar, folder, weights)
        write_report(folder / REPORT, plan, written, proof)
    return table(plan, written, proof)


def verify_pair(hf_folder: Path, megatron: Path, scalar: bool | None, proofs: Proofs, bar: Bar) -> Table:
    """Proves that two folders hold one model, without writing anything; compares in the narrower of their dtypes.

    Raises:
        UserError: they do not; names what differs.
    """
    require_hugging_face(hf_folder, f"rto convert verify HF_FOLDER {hf_folder}, as the second argument")
    model = HfModel(hf_folder, scalar)
    source = open_megatron(megatron, hf_folder, model.has_scalar_head)
    tensors = MegatronTensors(source.reader, source.shape, source.has_scalar_head)
    theirs = tensors.dtype()
    dtype = theirs if is_narrower(theirs, model.dtype()) else model.dtype()
    plan = plan_import(model, hf_folder, megatron, Options(dtype, 0, model.has_scalar_head))
    proof = _prove(model, tensors, plan, {}, proofs, bar, hf_folder, source.reader.folder)
    return table(plan, None, proof)


def _require_possible(plan: ConversionPlan, proofs: Proofs) -> None:
    """Refuses before anything is written what would fail when everything is.

    Raises:
        UserError: no room on the disk, or outputs that cannot be compared.
    """
    require_space(plan.target, plan.size())
    if proofs.logits is None:
        return
    tensor, pipeline = proofs.layout
    problems = check_layout(plan.shape, GridConfig(tensor=tensor, pipeline=pipeline), str(plan.source))
    if is_narrower(plan.dtype, plan.source_dtype):
        problems.append(
            f"--dtype rounds {dtype_name(plan.source_dtype)} to {dtype_name(plan.dtype)}, which moves the outputs; "
            "prove the conversion without --dtype"
        )
    refuse_if(problems, "--verify logits is not possible, --verify digest is", ConversionError)


def _prove(
    model: HfModel,
    tensors: MegatronTensors,
    plan: ConversionPlan,
    recorded: Mapping[str, str],
    proofs: Proofs,
    bar: Bar,
    hf_folder: Path,
    megatron: Path,
) -> Proof:
    digests: dict[str, str] = {}
    sentences = []
    if proofs.digest:
        with bar("verify", plan.size()) as advance:
            digests = verify_digests(model, tensors, plan.dtype, recorded, advance)
        rounded = f" as {dtype_name(plan.dtype)}" if _are_of_two_dtypes(model, tensors) else ""
        known = f", {len(recorded)} as the source's own report has them" if recorded else ""
        sentences.append(
            f"digest: {len(digests)} tensors bit-equal{rounded} there and back, read from both folders{known}"
        )
    logits = None if proofs.logits is None else proofs.logits(hf_folder, megatron, plan.has_scalar_head)
    return Proof(digests, logits, (*sentences, *([str(logits)] if logits else ())))


def _are_of_two_dtypes(model: HfModel, tensors: MegatronTensors) -> bool:
    one: torch.dtype = model.dtype()
    return one != tensors.dtype()


@contextmanager
def silent(title: str, size: int) -> Iterator[Advance]:
    """A bar that shows nothing."""
    yield lambda nbytes: None
