"""Prepares a data set for verl: verl-sspo prepare-data TASK [--source ...] [--output DIR]

    verl-sspo prepare-data gsm8k
    verl-sspo prepare-data math --levels all
    verl-sspo prepare-data math500 --source /data/MATH-500/test.jsonl --output data/math500
    verl-sspo prepare-data code --source likaixin/TACO-verified
    verl-sspo prepare-data gsm8k_deepmath --source /data/gsm8k /data/deepmath
    verl-sspo prepare-data word-problems --levels two-steps

Writes one parquet file per split, all or none. gsm8k_deepmath mixes both training splits, half and half. A row that
cannot be used stops the command, which prints its file, line and the reason; --skip-bad leaves such rows out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from verl_sspo.cli import at_least, output_folder
from verl_sspo.data import word_problems
from verl_sspo.data.prepare import Split, listed, mix
from verl_sspo.data.schema import write_splits
from verl_sspo.data.sources import SourceError
from verl_sspo.data.tasks import LEVELS, MIXES, TASKS, prepare


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verl-sspo prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*TASKS, *MIXES, word_problems.TASK]
    parser.add_argument("task", metavar="TASK", choices=names, help=", ".join(names))
    parser.add_argument(
        "--source",
        nargs="+",
        metavar="PATH_OR_HUB_ID",
        help="file (json, jsonl, parquet, arrow, csv), folder, or data set on the Hugging Face hub; two for a mix "
        "(default: the original on the hub)",
    )
    parser.add_argument("--config", help="configuration of the data set: a name on the hub, or a subfolder")
    parser.add_argument("--split", help="read only this split; also the split that a single file holds")
    parser.add_argument("--output", type=output_folder, metavar="DIR", help="folder to write (default: data/TASK)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in that folder")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out rows that cannot be used and rows that repeat a problem"
    )
    parser.add_argument(
        "--template",
        help="prompt: boxed, think (<think> and <answer> tags) or hashes (####) for mathematics, code for code, or "
        "your own text with {problem} in it",
    )
    parser.add_argument(
        "--levels",
        nargs="+",
        help=f"levels of math to keep (1 to 5, or all; default: 3 4 5) or of {word_problems.TASK} to make "
        f"({', '.join(word_problems.LEVELS)}; default: the first)",
    )
    parser.add_argument("--limit", type=at_least(1), help="keep only the first LIMIT rows of each split")
    parser.add_argument("--seed", type=int, default=0, help="seed for rows and order of a mix, and for word problems")
    options = parser.parse_args(arguments)
    if options.task == word_problems.TASK:
        for name in ("source", "config", "split", "template", "skip_bad"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} has no effect here: word problems are generated, not read")
    options.tasks = MIXES.get(options.task, (options.task,))
    options.source = options.source or [None] * len(options.tasks)
    if len(options.source) != len(options.tasks):
        parser.error(f"{options.task} needs {len(options.tasks)} sources")
    if options.split is not None and (not options.split or Path(options.split).name != options.split):
        parser.error(f"{options.split!r} is not a name for a split")  # it becomes the name of a file
    known = {"math": {*"12345", "all"}, word_problems.TASK: set(word_problems.LEVELS)}.get(options.task, set())
    if unknown := sorted(set(options.levels or ()) - known):
        parser.error(f"no level {unknown[0]!r} of {options.task}: {', '.join(sorted(known)) or 'it has no levels'}")
    options.output = options.output or output_folder(f"data/{options.task}")
    there = sorted(path.name for path in options.output.glob("*.parquet"))
    if there and not options.overwrite:
        parser.error(f"{options.output} holds {', '.join(there)}: --overwrite replaces them, --output names another")
    return options


def build(options: argparse.Namespace) -> list[Split]:
    """The splits to write. Bad and repeated rows are listed on stderr.

    Raises:
        SourceError: A source cannot be read.
        ValueError: There are bad rows and no --skip-bad, or no row is left.
    """
    if options.task == word_problems.TASK:
        prepared = [word_problems.make_splits(options.levels or list(word_problems.LEVELS)[:1], options.seed)]
    else:
        levels = LEVELS if options.levels is None else frozenset(options.levels)
        prepared = [
            prepare(
                task,
                source=source,
                config=options.config,
                split=options.split,
                template=options.template,
                levels=None if "all" in levels else levels,
                keep_repeated=not options.skip_bad,
            )
            for task, source in zip(options.tasks, options.source, strict=True)
        ]
    bad = False
    for task, splits in zip(options.tasks, prepared, strict=True):
        for split in splits:
            done = "left out" if options.skip_bad else "kept"
            if split.bad:
                bad = True
                print(f"{task} {split.name}: rows that cannot be used:\n{listed(split.bad)}", file=sys.stderr)
            if split.repeated:
                print(f"{task} {split.name}: repeated rows, {done}:\n{listed(split.repeated)}", file=sys.stderr)
        if not any(split.rows for split in splits) and (options.skip_bad or not bad):
            left_out = ", ".join(f"{count} {reason}" for split in splits for reason, count in split.dropped.items())
            raise ValueError(f"no row of {task} is left" + (f" (left out: {left_out})" if left_out else ""))
    if bad and not options.skip_bad:
        raise ValueError("nothing is written: correct these rows, or leave them out with --skip-bad")
    splits = prepared[0] if len(prepared) == 1 else [mix([splits[0] for splits in prepared], options.seed)]
    for split in splits:
        if options.limit is not None and len(split.rows) > options.limit:
            split.dropped["beyond --limit"] = len(split.rows) - options.limit
            del split.rows[options.limit :]
    return splits


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        splits = build(options)
        # An empty split is not an error: Eurus has no code in its validation split.
        kept = {options.output / f"{split.name}.parquet": split.rows for split in splits if split.rows}
        write_splits(kept)
    except (SourceError, ValueError) as error:
        print(f"prepare-data: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"prepare-data: cannot write to {options.output}, nothing is changed there: {error}", file=sys.stderr)
        return 1
    print("\n".join([*(split.summary() for split in splits), *(f"wrote {path}" for path in kept)]))
    return 0
