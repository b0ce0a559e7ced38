"""The rows that verl trains on, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Fixed, not inferred: verl concatenates lists of files, which must agree in every type.
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct({"split": pa.string(), "index": pa.int64()}),
    }
)


def make_row(
    *, data_source: str, prompt: list[dict[str, str]], ability: str, ground_truth: str, split: str, index: int
) -> dict[str, Any]:
    """One row of verl's parquet schema.

    Args:
        data_source: Name of the data set; `verl_sspo.rewards.compute_score` selects the reward by it.
        prompt: Chat messages, each `{"role": ..., "content": ...}`.
        ability: Kind of task, such as "math" or "code".
        ground_truth: What the reward compares with, as text (JSON if it is more than an answer).
        split: Split the row belongs to, such as "train" or "test".
        index: Number of the row in its source.
    """
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index},
    }


def write_splits(splits: Mapping[Path, Iterable[dict[str, Any]]]) -> None:
    """Writes all parquet files before it replaces any: if one fails, old files stay as they were.

    Raises:
        ValueError: A file would have no rows.
        OSError: A file cannot be written.
    """
    parts = {path: path.with_name(f".{path.name}.part") for path in splits}
    try:
        for path, rows in splits.items():
            if not (rows := list(rows)):
                raise ValueError(f"no rows to write to {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), parts[path])
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def write_rows(rows: Iterable[dict[str, Any]], path: str | os.PathLike[str]) -> Path:
    """`write_splits` for one file; returns its path."""
    write_splits({Path(path): rows})
    return Path(path)
