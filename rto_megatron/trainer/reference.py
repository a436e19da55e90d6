"""A DPO model's reward is its log-ratio to the reference it was trained against: both are told apart by fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from rto_megatron.config import schema
from rto_megatron.engine.absent import AbsentModel, FrozenRole, RoleModel
from rto_megatron.engine.megatron import Model
from rto_megatron.engine.source import WeightSource
from rto_megatron.engine.weights import stage_hf_tensors
from rto_megatron.errors import ModelFolderError, RunFolderError
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.setup import REFERENCE_FINGERPRINT, note_in_config


def note_reference(folder: Path, reference: FrozenRole) -> None:
    """Records in `folder`/config.json what the model in training is compared with; all ranks must call it.

    Raises:
        RunFolderError: on every rank, when the run goes on and was compared with another reference before.
    """
    fingerprint = weights_fingerprint(reference)
    recorded = json.loads((folder / "config.json").read_text()).get(REFERENCE_FINGERPRINT, fingerprint)
    if recorded != fingerprint:
        raise RunFolderError(
            f"the run in {folder.parents[1]} was trained against a reference with fingerprint {recorded[:12]}, and "
            f"models.reference has {fingerprint[:12]}: its weights changed; restore them or name another run.dir"
        )
    reference.topology.barrier()
    if reference.topology.is_lead:
        note_in_config(folder, **{REFERENCE_FINGERPRINT: fingerprint})
    reference.topology.barrier()


def require_trained_reference(
    config: schema.ReinforcementStage, sources: Mapping[str, WeightSource], roles: Roles
) -> None:
    """Refuses a DPO model whose reference is not the one it is compared with here; all ranks must call it.

    Raises:
        ModelFolderError: on every rank; another reference, or none recorded and that is not allowed.
    """
    if roles.dpo is None:
        return
    folder = sources["dpo"].hf_folder
    recorded = json.loads((folder / "config.json").read_text()).get(REFERENCE_FINGERPRINT)
    if recorded is None:
        if config.models.allow_unverified_reference:
            return
        raise ModelFolderError(
            f"models.dpo: {folder}/config.json does not say which reference the model was trained against, as models "
            f"from elsewhere do not; if it is models.{_reference_key(config)}, set "
            f"models.allow_unverified_reference=true"
        )
    found = weights_fingerprint(roles.dpo_reference or roles.reference)
    if recorded != found:
        raise ModelFolderError(
            f"models.dpo: the model in {folder} was trained against a reference with fingerprint {recorded[:12]}, but "
            f"models.{_reference_key(config)} has {found[:12]}; its log-ratio would be no reward. Name the model it "
            f"started from as models.dpo_reference, or train it against this one"
        )


def _reference_key(config: schema.ReinforcementStage) -> str:
    if config.models.dpo_reference is not None:
        return f"dpo_reference={config.models.dpo_reference}"
    return f"reference={config.models.reference or config.models.policy}"


def weights_fingerprint(model: RoleModel) -> str:
    """sha256 over all tensors by Hugging Face name, rounded to bfloat16; all ranks must call it.

    A model that is loaded in float32 here and in bfloat16 there has one fingerprint; a trained model has another
    than the one it started from as soon as any weight moved by a bfloat16 step.
    """
    own = {} if isinstance(model, AbsentModel) else _own_digests(model)
    parts = model.topology.gather_all(own, dict[str, str])
    digests = {name: digest for part in parts for name, digest in part.items()}
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _own_digests(model: Model) -> dict[str, str]:
    """Name -> sha256 of the tensors that this rank answers for."""
    topology, own = model.topology, {}
    tensors = stage_hf_tensors(model.module, model.shape, model.has_scalar_head, topology)
    for name, tensor in tensors:
        # A copy in any case: memory that numpy has seen cannot be given away any more, as offload does.
        raw = tensor.detach().to("cpu", torch.bfloat16, copy=True).contiguous().view(torch.uint8)
        own[name] = hashlib.sha256(raw.numpy()).hexdigest()
    return own
