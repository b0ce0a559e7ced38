"""Files that are complete or not there, whenever the process that writes them is killed."""

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes a text file, in place of one that is there."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)
