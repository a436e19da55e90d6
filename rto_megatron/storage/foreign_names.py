"""Tensors that are not named as in transformers' causal models: read under those names, or refused in one sentence."""

import re
from collections.abc import Collection, Mapping

from rto_megatron.models.families.blocks import EMBEDDING

_PREFIX, _TAIL = EMBEDDING.split(".", 1)
# Modules that hold the whole model as their only part: DDP, DeepSpeed, NeMo; torch.compile; FSDP; a doubled `model.`.
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|model)\.)*")
_DECODER = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")
# first word of the prefix -> who writes it, and what to do
_WRITERS = {
    "base_model": (
        "as peft saves a model with an adapter in it",
        "load it with peft, merge the adapter (merge_and_unload), and save_pretrained what that returns",
    ),
}
_OTHERS = ("as a model that holds this one as a part", "save_pretrained that part alone")
# end of the embedding's name -> who names it so
_PROGRAMS = {
    "word_embeddings.weight": "Megatron's, as NeMo keeps them",
    "tok_embeddings.weight": "those of the maker's own code",
    "wte.weight": "GPT-2's",
}


def own_names(stored: Collection[str]) -> tuple[dict[str, str], str | None]:
    """transformers' name of every tensor, and what to say where that is another; see `foreign_names` for the rest.

    A prefix of wrappers is left out if all tensors have it, and a bare decoder's names get the prefix that they lack.
    """
    plain = {name: name for name in stored}
    embedding = next((name for name in sorted(stored) if name == _TAIL or name.endswith(f".{_TAIL}")), None)
    if EMBEDDING in stored or embedding is None:
        return plain, None
    prefix = embedding.removesuffix(_TAIL)
    wrapper = prefix.removesuffix(_PREFIX + ".")
    if not _WRAPPERS.fullmatch(prefix) or not all(name.startswith(wrapper) for name in stored):
        return plain, None
    inside = {name: name.removeprefix(wrapper) for name in stored}
    named = {name: f"{_PREFIX}.{own}" if own.startswith(_DECODER) else own for name, own in inside.items()}
    return (
        named,
        f"tensors have the prefix {prefix!r} instead of {_PREFIX + '.'!r}; they are read as if they had that",
    )


def foreign_names(tensors: Collection[str]) -> str | None:
    """Whose names these are and what to do; None if the embedding has its own name, or nothing like it is there."""
    if EMBEDDING in tensors:
        return None
    for name in sorted(tensors):
        if name == _TAIL or name.endswith(f".{_TAIL}"):
            prefix = name.removesuffix(_TAIL)
            writer, remedy = _WRITERS.get(prefix.split(".")[0], _OTHERS)
            return f"tensors have the prefix {prefix!r} instead of {_PREFIX + '.'!r} ({name}), {writer}; {remedy}"
    for end, owner in _PROGRAMS.items():
        if found := sorted(name for name in tensors if name.endswith(end)):
            return f"names of tensors are {owner} ({found[0]}); export the model to Hugging Face with its program"
    return None


BARE = (
    "the folder holds the decoder without a head, as AutoModel saves it: a policy needs lm_head.weight, a reward model "
    "or critic score.weight; take the folder of the whole model (AutoModelForCausalLM), or start a reward model or "
    "critic from this one, whose head is drawn then"
)


def unknown_head(heads: Mapping[str, tuple[int, ...]], hidden_size: int) -> str | None:
    """What to say about a head that has no known name; None if there is none.

    Args:
        heads: name -> shape of the tensors that lie outside of the decoder.
    """
    if not heads:
        return None
    listed = ", ".join(f"{name} {shape}" for name, shape in heads.items())
    weights = [name for name in heads if name.endswith(".weight")]
    if len(weights) == 1 and heads[weights[0]] == (1, hidden_size):
        prefix = weights[0].removesuffix(".weight")
        return (
            f"the head is {listed}, a name that is not known here; if it gives a reward model's or critic's score, "
            f'set "value_head_prefix": "{prefix}" in config.json'
        )
    return (
        f"the head is {listed}; expected lm_head.weight of a language model, or one row (1, {hidden_size}) of a reward "
        "model or critic under the name score, value_head or v_head.summary. Heads of several layers or labels have no "
        "place in Megatron's models here"
    )
