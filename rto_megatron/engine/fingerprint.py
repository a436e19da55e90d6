"""A model's identity: one hash over its weights that does not depend on layout, precision or file format."""

import hashlib
from collections import deque

import torch

from rto_megatron.engine.megatron import Model
from rto_megatron.engine.weights import stage_hf_tensors


def weights_fingerprint(model: Model) -> str:
    """sha256 over all tensors by Hugging Face name, rounded to bfloat16; all ranks must call it.

    A model that is loaded in float32 here and in bfloat16 there has one fingerprint; a trained model has another
    than the one it started from as soon as any weight moved by a bfloat16 step.
    """
    place = model.topology
    tensors = stage_hf_tensors(model.module, model.shape, model.has_scalar_head, place)
    own: dict[str, str] = {}
    if place.tensor_rank == 0 and place.data_rank == 0:
        for name, tensor in tensors:
            raw = tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8)
            own[name] = hashlib.sha256(raw.numpy()).hexdigest()
    elif place.data_rank == 0:
        deque(tensors, maxlen=0)  # the other tensor ranks only take part in the gathers
    parts = place.gather_all_json(dict(own))
    digests = {n: d for part in parts if isinstance(part, dict) for n, d in part.items()}
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
