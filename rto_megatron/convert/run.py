"""One conversion from beginning to end: plan, write aside, prove, report, rename."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rto_megatron.convert.fresh_folder import fresh_folder, require_absent
from rto_megatron.convert.hf_to_megatron import import_weights, plan_import
from rto_megatron.convert.megatron_source import MegatronSource, open_megatron
from rto_megatron.convert.megatron_to_hf import export_weights, plan_export
from rto_megatron.convert.options import Advance, Options
from rto_megatron.convert.report import LogitsProof, Report, recorded_digests
from rto_megatron.convert.verify import verify_digests
from rto_megatron.storage.hf_model import HfModel
from rto_megatron.storage.megatron_folder import RELEASE, REPORT
from rto_megatron.storage.megatron_tensors import MegatronTensors
from rto_megatron.storage.torch_dist_reader import TorchDistReader

Bar = Callable[[str, int], AbstractContextManager[Advance]]  # (title, bytes) -> what to call with bytes done
Logits = Callable[[Path, Path, bool], LogitsProof]  # (Hugging Face folder, Megatron checkpoint, is scalar)


@dataclass(frozen=True)
class Proofs:
    """How a conversion is to be proved before it takes its name."""

    digest: bool
    logits: Logits | None


def convert_to_megatron(
    source: Path, target: Path, options: Options, proofs: Proofs, bar: Bar, dry_run: bool
) -> Report:
    """Writes a Megatron-LM checkpoint tree.

    Raises:
        UserError: the source cannot be converted, or the result is not proved; `target` does not exist then.
    """
    require_absent(target)
    model, report = plan_import(source, target, options)
    if dry_run:
        return report
    with fresh_folder(target) as folder:
        with bar("convert", report.size()) as advance:
            import_weights(model, report, folder, options, advance)
        tensors = MegatronTensors(TorchDistReader(folder / RELEASE), model.shape, model.has_scalar_head)
        _prove(model, tensors, report, recorded_digests(source, report.dtype), proofs, bar)
        if proofs.logits is not None:
            _record_logits(report, proofs.logits(source, folder, report.has_scalar_head))
        report.write(folder / REPORT)
    return report


def convert_to_hf(
    source: MegatronSource, target: Path, options: Options, proofs: Proofs, bar: Bar, dry_run: bool
) -> Report:
    """Writes a Hugging Face folder that transformers and vLLM load.

    Raises:
        UserError: as `convert_to_megatron`.
    """
    require_absent(target)
    tensors, report = plan_export(source, target, options)
    if dry_run:
        return report
    with fresh_folder(target) as folder:
        with bar("convert", report.size()) as advance:
            export_weights(source, tensors, report, folder, options, advance)
        model = HfModel(folder, source.has_scalar_head)
        model.require_complete()
        beside = recorded_digests(source.reader.folder.parent, report.dtype)
        _prove(model, tensors, report, beside, proofs, bar)
        model.folder.close()
        if proofs.logits is not None:
            _record_logits(report, proofs.logits(folder, source.folder, report.has_scalar_head))
        report.write(folder / REPORT)
    return report


def verify_pair(hf_folder: Path, megatron: Path, scalar: bool | None, proofs: Proofs, bar: Bar) -> Report:
    """Proves that two folders hold one model, without writing anything.

    Raises:
        UserError: they do not; names what differs.
    """
    model = HfModel(hf_folder, scalar)
    model.require_complete()
    source = open_megatron(megatron, hf_folder, model.has_scalar_head)
    tensors = MegatronTensors(source.reader, source.shape, source.has_scalar_head)
    options = Options(model.dtype(), 0, model.has_scalar_head)
    _, report = plan_import(hf_folder, megatron, options)
    report.direction = "Hugging Face = Megatron"
    _prove(model, tensors, report, {}, proofs, bar)
    if proofs.logits is not None:
        _record_logits(report, proofs.logits(hf_folder, megatron, report.has_scalar_head))
    return report


def _prove(
    model: HfModel,
    tensors: MegatronTensors,
    report: Report,
    recorded: Mapping[str, str],
    proofs: Proofs,
    bar: Bar,
) -> None:
    if not proofs.digest:
        return
    with bar("verify", report.size()) as advance:
        digests = verify_digests(model, tensors, report.dtype, recorded, advance)
    report.tensors = {n: replace(record, sha256=digests[n]) for n, record in report.tensors.items()}
    known = f", {len(recorded)} as the source's own report has them" if recorded else ""
    report.verified.append(
        f"digest: {len(digests)} tensors bit-equal there and back, read from both folders{known}"
    )


def _record_logits(report: Report, proof: LogitsProof) -> None:
    report.logits = proof
    worst = max(proof.max_difference.values())
    report.verified.append(
        f"logits: at most {worst:.1e} from transformers at TP{proof.tensor_parallel} x PP{proof.pipeline_parallel}, "
        "float32"
    )


@contextmanager
def silent(title: str, size: int) -> Iterator[Advance]:
    """A bar that shows nothing."""
    yield lambda nbytes: None
