"""What tensors say that are not named as transformers names a causal model's: one sentence instead of a list of all."""

from collections.abc import Collection, Mapping

from rto_megatron.models.families.blocks import EMBEDDING

_PREFIX, _TAIL = EMBEDDING.split(".", 1)
# first word of the prefix -> who writes it, and what to do
_WRITERS = {
    "": (
        "as the bare decoder is saved",
        "load the folder with transformers' AutoModelForCausalLM and save_pretrained it (if it warns that lm_head is "
        "new, the model has no language head)",
    ),
    "base_model": (
        "as peft saves a model with an adapter in it",
        "load it with peft, merge the adapter (merge_and_unload), and save_pretrained what that returns",
    ),
    "module": (
        "as a wrapper for data parallelism, DeepSpeed or NeMo saves",
        "save_pretrained the model inside (model.module), or export it to Hugging Face with the program that saved it",
    ),
    "_orig_mod": ("as torch.compile saves", "save_pretrained the model that was compiled"),
}
_OTHERS = ("as a model that holds this one as a part", "save_pretrained that part alone")
# end of the embedding's name -> who names it so
_PROGRAMS = {
    "word_embeddings.weight": "Megatron's, as NeMo keeps them",
    "tok_embeddings.weight": "those of the maker's own code",
    "wte.weight": "GPT-2's",
}


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
