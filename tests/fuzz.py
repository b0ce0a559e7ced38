#!/usr/bin/env python
"""Tries the properties of tests/unit/properties on as many inputs as the time allows, and counts them.

    python tests/fuzz.py                                    every property, an hour in all
    python tests/fuzz.py --minutes 5 --only loss,rewards    those whose names begin so
    python tests/fuzz.py --seed 7                           the same inputs again

An input for which a property does not hold is printed as the call that fails, and its property is left out of further
rounds. Such inputs are kept in .hypothesis/ and tried first the next time. Exit status 1 if there were any.
"""

import argparse
import contextlib
import functools
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "unit"))
from test_fuzz import PROPERTIES  # noqa: E402

# Inputs of a property before it is the next one's turn, as a multiple of what its test tries.
ROUND = 20


class TimeIsUpError(BaseException):
    """Ends a round at once: Hypothesis takes it for no failure of the property."""


def counted(name: str, check: Callable[..., None], counts: Counter[str], end: float) -> Callable[..., None]:
    @functools.wraps(check)
    def count(**inputs) -> None:
        if time.monotonic() > end:
            raise TimeIsUpError
        counts[name] += 1
        check(**inputs)

    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)g)")
    parser.add_argument("--only", default="", help=f"beginnings of names, of {', '.join(PROPERTIES)}")
    parser.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    arguments = parser.parse_args()
    names = [name for name in PROPERTIES if name.startswith(tuple(arguments.only.split(",")))]
    for name in list(names):
        if (program := PROPERTIES[name].program) and shutil.which(program) is None:
            print(f"{name} is left out: {program} is not installed")
            names.remove(name)
    if not names:
        parser.error(f"nothing to do: --only takes beginnings of {', '.join(PROPERTIES)}")

    base = random.randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {base}", flush=True)
    # With a seed, what earlier runs found would be tried first and change what follows.
    database = (
        DirectoryBasedExampleDatabase(REPOSITORY / ".hypothesis" / "examples") if arguments.seed is None else None
    )
    counts, seconds = Counter[str](), Counter[str]()
    failures: dict[str, str] = {}
    started = time.monotonic()
    end, number = started + 60 * arguments.minutes, 0
    with contextlib.suppress(KeyboardInterrupt, TimeIsUpError):
        while time.monotonic() < end and len(failures) < len(names):
            for name in names:
                if name in failures or time.monotonic() >= end:
                    continue
                each, begun = PROPERTIES[name], time.monotonic()
                options = settings(
                    max_examples=ROUND * each.examples,
                    database=database,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                )
                attempt = seed(base + number)(options(given(**each.inputs)(counted(name, each.check, counts, end))))
                try:
                    attempt()
                except Exception:
                    failures[name] = traceback.format_exc()
                    print(f"{name} DOES NOT HOLD\n{failures[name]}", flush=True)
                finally:
                    seconds[name] += time.monotonic() - begun
                    print(f"{name}: {counts[name]} inputs, {seconds[name]:.0f} s", flush=True)
            number += 1

    print("\n| property | inputs | seconds | |\n|---|---|---|---|")
    for name in names:
        print(f"| {name} | {counts[name]} | {seconds[name]:.0f} | {'does not hold' if name in failures else ''} |")
    print(f"| all | {counts.total()} | {time.monotonic() - started:.0f} | {len(failures)} do not hold |")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
