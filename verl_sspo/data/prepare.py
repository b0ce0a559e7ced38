"""Reads data sets and makes verl's rows of them; says what it left out and why."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl_sspo.data.schema import make_row

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
FILES = {".json", ".jsonl", *BUILDERS}


class Dropped(Exception):
    """A row that is left out on purpose; the message says why."""


class SourceError(RuntimeError):
    """A source that cannot be read at all."""


@dataclasses.dataclass(frozen=True)
class Example:
    """What a row of a source says."""

    problem: str
    ground_truth: str
    data_source: str | None = None  # where the row knows better than its task


@dataclasses.dataclass
class Split:
    """Rows made from one split of a source, and an account of the others."""

    name: str
    rows: list[dict[str, Any]]
    dropped: dict[str, int]  # reason: how many
    unreadable: list[str]  # each named, with what is wrong with it

    def summary(self) -> str:
        """Several lines for people."""
        lines = [f"{self.name}: {len(self.rows)} rows"]
        if self.rows:
            longest = max(self.rows, key=_prompt_length)
            lines.append(
                f"  longest prompt: {_prompt_length(longest)} characters (row {longest['extra_info']['index']} of "
                f"{longest['data_source']}, {longest['extra_info']['split']})"
            )
        lines += [f"  left out: {count} ({reason})" for reason, count in sorted(self.dropped.items())]
        lines += [f"  NOT READABLE: {len(self.unreadable)}"] if self.unreadable else []
        lines += [f"    {each}" for each in self.unreadable[:20]]
        lines += [f"    and {len(self.unreadable) - 20} more"] if len(self.unreadable) > 20 else []
        return "\n".join(lines)


def _prompt_length(row: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in row["prompt"])


# --- reading -----------------------------------------------------------------------------------------------------


def open_source(source: str, *, config: str | None, splits: tuple[str, ...], file_split: str) -> dict[str, list[Any]]:
    """Rows of a source by split. A row that could not be parsed is the exception that says why.

    Args:
        source: A file (json, jsonl, parquet, arrow, csv), a folder, or the id of a data set on the Hugging Face hub.
        config: Configuration of the data set on the hub.
        splits: Splits wanted, of those that the source has.
        file_split: Split that a single file stands for.

    Raises:
        SourceError: It does not exist, cannot be reached, or has none of the splits.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix in (".json", ".jsonl"):
            return {file_split: list(_read_json(path))}
        if path.suffix not in BUILDERS:
            raise SourceError(f"{path}: unknown kind of file; json, jsonl, parquet, arrow and csv are read")
    elif not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in FILES):
        raise SourceError(f"{path} does not exist")

    import datasets

    try:
        if path.is_file():
            loaded = datasets.load_dataset(BUILDERS[path.suffix], data_files={file_split: str(path)})
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path))
        else:
            loaded = datasets.load_dataset(source, config)
    except RuntimeError as error:
        # A data set with a loading script; every other RuntimeError is a failure of the library.
        if "scripts are no longer supported" not in str(error):
            raise
        raise SourceError(
            f"{source} is loaded by a script, which `datasets` does not run: download its data files and give one "
            "with --source"
        ) from error
    except (ConnectionError, OSError, datasets.exceptions.DatasetNotFoundError) as error:
        if path.exists():
            raise SourceError(f"{path} cannot be read: {error}") from error
        raise SourceError(
            f"cannot load {source!r} from the Hugging Face hub ({type(error).__name__}: {str(error)[:300]}). Without "
            "a network: download the data set where there is one, and give its folder or file with --source."
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise SourceError(f"{source} cannot be read as a data set: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return {file_split: list(loaded)}
    found = {name: list(loaded[name]) for name in splits if name in loaded}
    if not found:
        raise SourceError(f"{source} has the splits {sorted(loaded)}, none of {list(splits)}")
    return found


def _read_json(path: Path) -> Iterator[Any]:
    # Line by line, not through `datasets`, which gives up a whole file for one bad line.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path} is not JSON: {error}") from error
        return
    for line in text.split("\n"):
        if line.strip():
            try:
                line.encode()
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield error


def make_split(
    rows: list[Any],
    name: str,
    *,
    data_source: str,
    ability: str,
    read: Callable[[dict[str, Any]], Example],
    template: list[dict[str, str]],
) -> Split:
    """Turns the rows of a source into verl's, in their order.

    Args:
        rows: Rows, or the exceptions that reading them raised.
        name: Name of the split.
        data_source: Name of the data set for the reward.
        ability: Kind of task.
        read: Reads one row; raises `Dropped` for those to leave out.
        template: Chat messages, in which `{problem}` stands for the problem.
    """
    split = Split(name, [], defaultdict(int), [])
    for index, row in enumerate(tqdm(rows, desc=f"{data_source} {name}", unit="row", leave=False)):
        try:
            if isinstance(row, Exception):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"is {type(row).__name__}, not an object")
            example = read(row)
            (example.problem + example.ground_truth).encode()  # lone surrogates: no file can hold them
            split.rows.append(
                make_row(
                    data_source=example.data_source or data_source,
                    prompt=[
                        {**message, "content": message["content"].replace("{problem}", example.problem)}
                        for message in template
                    ],
                    ability=ability,
                    ground_truth=example.ground_truth,
                    split=name,
                    index=index,
                )
            )
        except Dropped as reason:
            split.dropped[str(reason)] += 1
        except (KeyError, ValueError, TypeError, AttributeError, StopIteration, RecursionError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            split.unreadable.append(f"row {index} of {data_source} {name}: {what}")
    return split


def mix(splits: list[Split], shares: list[float], seed: int) -> Split:
    """One split with the given shares of several, as large as the scarcest allows, in an order drawn by the seed.

    Raises:
        ValueError: Shares are not positive, or too few rows for them.
    """
    if len(shares) != len(splits) or min(shares) <= 0:
        raise ValueError(f"{len(splits)} sets need as many shares, all positive, not {shares}")
    size = min(len(split.rows) / share for split, share in zip(splits, shares, strict=True)) * sum(shares)
    counts = [int(size * share / sum(shares) + 1e-9) for share in shares]
    if 0 in counts:
        raise ValueError(f"too few rows for shares of {shares}: there are {[len(split.rows) for split in splits]}")
    generator = random.Random(seed)
    mixed = Split(splits[0].name, [], defaultdict(int), [each for split in splits for each in split.unreadable])
    for split, count in zip(splits, counts, strict=True):
        mixed.rows += generator.sample(split.rows, count)
        for reason, number in split.dropped.items():
            mixed.dropped[reason] += number
        if count < len(split.rows):
            mixed.dropped[f"more than its share of {split.rows[0]['data_source']}"] += len(split.rows) - count
    generator.shuffle(mixed.rows)
    return mixed
