"""Model files that the checkpoints and exports of a run carry: what ends an answer, and what pads one."""

import json
from collections.abc import Collection
from pathlib import Path

from rto_megatron.data.eos import GENERATION_CONFIG, with_eos
from rto_megatron.data.padding_token import separate_padding
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.whole_files import write_whole
from rto_megatron.reporting.progress import say
from rto_megatron.types import EndOfSequence

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def note_eos(folder: Path, eos: EndOfSequence) -> None:
    """Adds what ends a trained answer to config.json and generation_config.json, where transformers and vLLM look.

    Without it they never stop a policy whose tokenizer ends sequences with another token than these files name.
    """
    config, generation = folder / "config.json", folder / GENERATION_CONFIG
    values = json.loads(config.read_text())
    # Without the second file both take its token ids from the first.
    taken = {name: values[name] for name in _TOKENS if values.get(name) is not None}
    for path, before in ((config, values), (generation, _read(generation) or taken)):
        after = {**before, "eos_token_id": with_eos(before.get("eos_token_id"), eos)}
        if after != before or not path.is_file():
            write_whole(path, json.dumps(after, indent=2))


def _read(path: Path) -> dict[str, object] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def give_own_padding(hf_files: Path, used_ids: Collection[int], topology: Topology) -> None:
    """Changes the padding token where it must be; all ranks must call it.

    Args:
        used_ids: see `separate_padding`.
    """
    if topology.is_lead and (changed := separate_padding(hf_files, used_ids)) is not None:
        say(changed, True)
    topology.barrier()
