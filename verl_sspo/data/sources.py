"""Rows of local files, folders, and data sets on the Hugging Face hub, with their places: `x.jsonl, line 3`."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Where a row stands, and the row, or the error that says why it cannot be read.
Row = tuple[str, Any]
# What `datasets` writes beside its data.
METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


class SourceError(RuntimeError):
    """A source that cannot be read at all."""


def open_source(source: str, *, config: str | None, splits: tuple[str, ...], file_split: str) -> dict[str, list[Row]]:
    """Rows of a source by split.

    Args:
        source: A file (json, jsonl, parquet, arrow, csv), a folder, or the id of a data set on the Hugging Face hub.
        config: Configuration of the data set: a name on the hub, a subfolder of a folder.
        splits: Splits wanted, of those that the source has.
        file_split: Split that a single file, or a folder whose files name no split, stands for.

    Raises:
        SourceError: It does not exist, cannot be read, is empty, or has none of the splits.
    """
    path = Path(source).expanduser()
    if path.is_file():
        found = {file_split: list(_read(path))}
    elif path.is_dir():
        files = _files(path / config if config and (path / config).is_dir() else path, splits, file_split)
        found = {split: [row for file in files[split] for row in _read(file)] for split in files}
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in READERS:
        raise SourceError(f"{path} does not exist")
    else:
        found = _from_hub(source, config, splits)
    if not any(found.values()):
        raise SourceError(f"{source} has no rows")
    return found


def _files(folder: Path, splits: tuple[str, ...], file_split: str) -> dict[str, list[Path]]:
    """The files of each split, by the word in their path."""
    try:
        os.listdir(folder)
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error}") from error
    files = sorted(path for path in folder.rglob("*") if path.suffix in READERS and path.name not in METADATA)
    if not files:
        raise SourceError(f"{folder} has no data files: {', '.join(READERS)} are read")

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
    except RuntimeError as error:
        # A data set with a loading script; every other RuntimeError is a failure of the library.
        if "scripts are no longer supported" not in str(error):
            raise
        raise SourceError(
            f"{source} is loaded by a script, which `datasets` does not run: download its data files and give one "
            "with --source"
        ) from error
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise SourceError(
            f"cannot load {source!r} from the Hugging Face hub ({type(error).__name__}: {str(error)[:300]}). Without "
            "a network: download the data set where there is one, and give its folder or file with --source."
        ) from error
    found = {
        split: [(f"{source} {split}, row {number}", row) for number, row in enumerate(loaded[split], 1)]
        for split in splits
        if split in loaded
    }
    if not found:
        raise SourceError(f"{source} has the splits {sorted(loaded)}, none of {list(splits)}")
    return found


# --- files -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[Row]:
    if path.suffix not in READERS:
        raise SourceError(f"{path}: unknown kind of file; {', '.join(READERS)} are read")
    try:
        for place, row in READERS[path.suffix](path):
            yield f"{path}, {place}", row
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"{path} is UTF-16: make it UTF-8, for example with iconv -f UTF-16 -t UTF-8")
    return data.decode("utf-8-sig", errors="surrogateescape")


def _check_bytes(text: str) -> None:
    """Raises ValueError where `_text` met bytes that are not UTF-8."""
    if found := re.search("[\udc80-\udcff]", text):
        raise ValueError(
            f"not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} at column {found.start() + 1}; iconv -f LATIN1 -t UTF-8 "
            "makes UTF-8 of Latin-1"
        )


def _read_json(path: Path) -> Iterator[Row]:
    # Line by line, not through `datasets`, which gives up a whole file for one bad line.
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path} is not JSON: {error}") from error
        yield from ((f"item {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                _check_bytes(line)
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                yield f"line {number}", ValueError(f"not JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                yield f"line {number}", ValueError("not JSON: nested too deeply")
            except ValueError as error:
                yield f"line {number}", error


def _read_csv(path: Path) -> Iterator[Row]:
    text = _text(path)
    csv.field_size_limit(1 << 30)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = 1
    for row in reader:
        place, before = f"line {before + 1}", reader.line_num
        try:
            if None in row or None in row.values():
                raise ValueError(f"fields do not match the columns {', '.join(reader.fieldnames or ())}")
            _check_bytes(delimiter.join(row.values()))
            yield place, row
        except ValueError as error:
            yield place, error


def _read_parquet(path: Path) -> Iterator[Row]:
    yield from ((f"row {number}", row) for number, row in enumerate(pq.read_table(path).to_pylist(), 1))


def _read_arrow(path: Path) -> Iterator[Row]:
    with pa.memory_map(str(path)) as file:
        try:
            table = pa.ipc.open_stream(file).read_all()  # as `datasets` writes it
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(file).read_all()
        yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
