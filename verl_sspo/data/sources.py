"""Rows of local files, folders, and data sets on the Hugging Face hub, with their places: `x.jsonl, line 3`."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

#: The place of a row, and the row or the error that says why it cannot be read.
Row = tuple[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
# Files that `datasets` writes next to its data.
METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


class SourceError(RuntimeError):
    """A source that cannot be read at all."""


def open_source(source: str, *, config: str | None, splits: tuple[str, ...], file_split: str) -> dict[str, list[Row]]:
    """Rows of a source by split.

    Args:
        source: A file (json, jsonl, parquet, arrow, csv), a folder, or the id of a data set on the Hugging Face hub.
        config: Configuration of the data set: a name on the hub, a subfolder of a folder.
        splits: Splits to read, as far as the source has them.
        file_split: Split of a single file, or of a folder whose file names contain no split.

    Raises:
        SourceError: It does not exist, cannot be read, is empty, or has none of the splits.
    """
    path = Path(source).expanduser()
    if path.is_file():
        found = {file_split: _read(path)}
    elif path.is_dir():
        files = _files(path / config if config and (path / config).is_dir() else path, splits, file_split)
        found = {split: [row for file in files[split] for row in _read(file)] for split in files}
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in SUFFIXES:
        raise SourceError(f"{path} does not exist")
    else:
        found = _from_hub(source, config, splits)
    if not any(found.values()):
        raise SourceError(f"{source} has no rows")
    return found


def _files(folder: Path, splits: tuple[str, ...], file_split: str) -> dict[str, list[Path]]:
    """The files of each split, by its name in their path."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.name not in METADATA)
    if not files:
        raise SourceError(f"{folder} has no data files: {', '.join(SUFFIXES)} are read")

    def named(words: str) -> list[Path]:
        pattern = re.compile(rf"(?<![a-z])({words})(?![a-z])")
        return [path for path in files if pattern.search(str(path.relative_to(folder)).lower())]

    found = {split: named(re.escape(split)) for split in splits if named(re.escape(split))}
    if not found and (others := named("train|validation|valid|val|dev|test")):
        raise SourceError(f"{folder} has {others[0].name}, but no file of the splits {', '.join(splits)}")
    return found or {file_split: files}


def _from_hub(source: str, config: str | None, splits: tuple[str, ...]) -> dict[str, list[Row]]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, config)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"cannot load {source!r} from the Hugging Face hub ({type(error).__name__}: {str(error)[:300]}). Without "
            "a network, or if a script loads it: download its data files and pass them with --source."
        ) from error
    found = {
        split: [(f"{source} {split}, row {number}", row) for number, row in enumerate(loaded[split], 1)]
        for split in splits
        if split in loaded
    }
    if not found:
        raise SourceError(f"{source} has the splits {sorted(loaded)}, none of {list(splits)}")
    return found


def _read(path: Path) -> list[Row]:
    try:
        if path.suffix in (".json", ".jsonl"):
            return [(f"{path}, {place}", row) for place, row in _read_json(path.read_bytes())]
        if path.suffix == ".csv":
            rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        elif path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        elif path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file:
                rows = pa.ipc.open_stream(file).read_all().to_pylist()
        else:
            raise SourceError(f"{path}: unknown kind of file; {', '.join(SUFFIXES)} are read")
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _read_json(data: bytes) -> Iterator[Row]:
    # Line by line, not with `datasets`, which rejects a whole file for one bad line.
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.lstrip().startswith(b"["):
        yield from ((f"item {number}", row) for number, row in enumerate(json.loads(data), 1))
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line.decode())
            except json.JSONDecodeError as error:
                yield f"line {number}", ValueError(f"not JSON: {error.msg} at column {error.colno}")
            except UnicodeDecodeError as error:
                yield (
                    f"line {number}",
                    ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"),
                )
            except RecursionError:
                yield f"line {number}", ValueError("not JSON: nested too deeply")
