"""Types of command-line arguments, checked before anything heavy is imported or computed."""

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def at_least(low: int) -> Callable[[str], int]:
    """An integer of `low` or more."""

    def integer(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < low:
            raise ArgumentTypeError(f"must be an integer of at least {low}, got {text!r}")
        return int(text)

    return integer


def output_folder(text: str) -> Path:
    """A folder that is there and writable, or can be made."""
    path = Path(text).expanduser().resolve()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not text:
        raise ArgumentTypeError("is empty: name a folder")
    if not there.is_dir():
        raise ArgumentTypeError(f"{there} is a file: name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"{there} is not writable")
    return path
