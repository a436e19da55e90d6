"""What a path is that was named as a model folder, and what such a folder may not bring along."""

import glob
import json
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NO_OWNERS = {"runs", "models", "checkpoints", "outputs"}  # first words of paths here that are no hub names
_FORMATS = {
    ".gguf": "a GGUF file, llama.cpp's format, of which rto convert gguf-to-hf makes a folder",
    ".nemo": "NeMo's archive, which is not read here",
}
_SHOWN = 3


def misnamed(path: Path) -> str:
    """One sentence about a path without a config.json: what is there, and what to do."""
    if path.is_dir():
        expected = "expected a Hugging Face model folder or a checkpoint of an earlier stage"
        return misnamed_folder(path) or f"{path} has no config.json; {expected}"
    if path.exists():
        return _file(path)
    if _HUB_NAME.fullmatch(str(path)) and path.parts[0] not in _NO_OWNERS and not path.parent.exists():
        return (
            f"{path} does not exist; if it is a model of the Hugging Face hub, download it first: "
            f"hf download {path} --local-dir {path.name}, and name {path.name}; if an earlier stage makes it, run that"
        )
    return f"{path} does not exist; run the stage that makes it first, or give a Hugging Face folder"


def _file(path: Path) -> str:
    if (form := _FORMATS.get(path.suffix)) is not None:
        return f"{path} is {form}; take the model's release in safetensors, and name its folder"
    return f"{path} is a file; name the folder that it lies in, {path.parent}"


def misnamed_folder(path: Path) -> str | None:
    """The same of a folder; None if it is nothing that is known."""
    if snapshots := _snapshots(path):
        return f"{path} is a folder of Hugging Face's cache; name the snapshot in it, {snapshots[0]}"
    if (path / "adapter_config.json").is_file():
        return (
            f"{path} holds an adapter without its base model; load both with peft, merge them (merge_and_unload, then "
            "save_pretrained), and name the folder of the merged model"
        )
    for suffix, form in _FORMATS.items():
        if found := sorted(file.name for file in path.glob(f"*{suffix}")):
            return f"{path} has no config.json; {found[0]} is {form}: take the model's release in safetensors"
    if (path / "params.json").is_file():
        return (
            f"{path} has no config.json; its params.json is of the maker's own format: take the files for "
            "transformers of the same release (config.json, *.safetensors)"
        )
    inside = sorted(
        {str(f.parent) for f in path.glob("*/*.safetensors") if (f.parent / "config.json").is_file()}
    )
    if inside:
        return f"{path} has no config.json, but {', '.join(inside[:_SHOWN])} has; name the model's own folder"
    return None


def _snapshots(path: Path) -> list[Path]:
    """The snapshots of a repository in the hub's cache (models--org--name), the one that `main` names first."""
    folder = path if path.name == "snapshots" else path / "snapshots"
    found = sorted(config.parent for config in folder.glob("*/config.json"))
    main = folder.parent / "refs" / "main"
    wanted = main.read_text(errors="replace").strip() if main.is_file() else ""
    return sorted(found, key=lambda snapshot: snapshot.name != wanted)


_WITH_CODE = ("config.json", "tokenizer_config.json")


def code_problems(folder: Path) -> list[str]:
    """The files of a Hugging Face folder that name code to be run on loading, one sentence each."""
    return [
        f"{folder / name} names code that comes with the model (auto_map), which is never run here: remove the key "
        "from a copy, or `rto convert` the model, which leaves it out"
        for name in _WITH_CODE
        if (folder / name).is_file() and _has_auto_map((folder / name).read_bytes())
    ]


def pattern_problems(folder: Path) -> list[str]:
    """Why vLLM would find no weights in a folder, one sentence or none: it looks for them with a glob pattern."""
    if not glob.has_magic(str(folder)):
        return []
    return [
        f"vLLM reads [, * and ? in {folder} as a pattern and finds no weights there: name a link to the folder whose "
        "path has none of them (ln -s), or leave --load-weights out, as a trainer pushes its weights"
    ]


def _has_auto_map(content: bytes) -> bool:
    try:
        values = json.loads(content)
    except ValueError:  # whoever reads the file says so
        return False
    return isinstance(values, dict) and "auto_map" in values
