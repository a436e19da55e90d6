"""The files of a Hugging Face folder that belong to its tokenizer and to generation: copied and proved unchanged."""

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

from rto_megatron.data.folders import regular_file
from rto_megatron.errors import TokenizerError

# transformers' folder for further templates; the other one is not read by transformers 5, but was carried before.
_TEMPLATES = ("additional_chat_templates", "chat_templates")
# Relative to the folder. A tokenizer's own Python code is not among them: it is never run here.
_PATTERNS = (
    "tokenizer.model",
    "tokenizer.model.v*",  # Mistral's versions
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    *(f"{folder}/*.jinja" for folder in _TEMPLATES),
    "generation_config.json",
)


def carry(source: Path, target: Path) -> dict[str, str]:
    """Copy the files byte for byte.

    Args:
        source: Hugging Face folder, or a snapshot of Hugging Face's cache.
        target: another folder, created if missing; files of the same names are replaced.

    Returns:
        File name, relative to both folders, -> sha256 of the bytes that were written.

    Raises:
        TokenizerError: no such folder, or both are one.
        ModelFolderError: a file is no regular file or leads out of the folder.
    """
    files = _files(source)
    if target.exists() and target.resolve() == source.resolve():
        raise TokenizerError(
            f"cannot carry the tokenizer of {source} into itself; give another target folder"
        )
    digests = {}
    for name, path in files.items():
        content = path.read_bytes()
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)  # a link there must not be written through
        copy.write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def require_unchanged(folder: Path, recorded: dict[str, str]) -> None:
    """Compare the files of a folder with what `carry` returned for it.

    Raises:
        TokenizerError: a file changed, is missing or is extra, or cannot be read as `carry` would; names it.
    """
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in _files(folder).items()}
    problems = [
        *(f"{name} is missing" for name in sorted(recorded.keys() - found.keys())),
        *(f"{name} was not there" for name in sorted(found.keys() - recorded.keys())),
        *(
            f"{name} changed: its sha256 is {found[name]}, expected {recorded[name]}"
            for name in sorted(found.keys() & recorded.keys())
            if found[name] != recorded[name]
        ),
    ]
    if problems:
        raise TokenizerError(
            f"the tokenizer files of {folder} are not those that were recorded: {'; '.join(problems)}; "
            "restore them, or convert the checkpoint again"
        )


def _files(folder: Path) -> dict[str, Path]:
    """Name -> resolved path of every file that matches a pattern, in the order of the names."""
    if not folder.is_dir():
        raise TokenizerError(f"tokenizer folder {folder} does not exist; give a Hugging Face model folder")
    root = folder.resolve()
    listed = [*root.iterdir(), *(path for name in _TEMPLATES for path in (root / name).glob("*"))]
    names = sorted(path.relative_to(root).as_posix() for path in listed)
    return {name: regular_file(root, name) for name in names if any(_matches(name, p) for p in _PATTERNS)}


def _matches(name: str, pattern: str) -> bool:
    # fnmatch's star crosses slashes.
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
