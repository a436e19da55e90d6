"""Files that are replaced as a whole."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file that a reader sees as it was or as it will be, and never in between; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text, encoding="utf-8", errors="surrogatepass")
    partial.replace(path)
