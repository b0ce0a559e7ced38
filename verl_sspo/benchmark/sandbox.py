"""The sandbox of the code reward beside verl's prime_code, on the same programs and tests.

prime_code runs programs with the caller's rights: only the harmless ones of this file ever reach it.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from verl.utils.reward_score import prime_code

from verl_sspo.benchmark.table import Column, NotMeasuredError, Row, Section
from verl_sspo.benchmark.timing import Spread, interleave
from verl_sspo.rewards import code
from verl_sspo.rewards.sandbox import SandboxError

TESTS = 8  # of each program

# Programs that read a number and print one, and the function they should compute; the third is wrong.
PROGRAMS: tuple[tuple[str, Callable[[int], int], bool], ...] = (
    ("print(sum(range(int(input()) + 1)))", lambda n: n * (n + 1) // 2, True),
    ("n = int(input())\nwords = sorted(str(i) for i in range(n))\nprint(len(words))", lambda n: n, True),
    ("n = int(input())\nprint(n * n - 1)", lambda n: n * n, False),
    ("n = int(input())\na, b = 0, 1\nfor _ in range(2 * n):\n    a, b = b, a + b\nprint(a - a + n)", lambda n: n, True),
)

COLUMNS = (
    Column("judge", "{judge}"),
    Column("at a time", "{workers}"),
    Column("programs", "{programs}"),
    Column("programs/s", "{programs_per_second:.1f}"),
    Column("ms", "{ms:.0f}"),
    Column("quartiles", "{ms_q1:.0f} to {ms_q3:.0f}"),
    Column("programs/s / prime_code's", "{to_prime_code:.2f}"),
)


def tasks_of(count: int) -> list[tuple[str, str, bool]]:
    """Responses with their tests as JSON, and whether the program is right."""
    tasks = []
    for i in range(count):
        program, function, right = PROGRAMS[i % len(PROGRAMS)]
        numbers = range(i + 1, i + 1 + TESTS)
        tests = {"inputs": [f"{n}\n" for n in numbers], "outputs": [f"{function(n)}\n" for n in numbers]}
        tasks.append((f"```python\n{program}\n```", json.dumps(tests), right))
    return tasks


def sandboxed(response: str, tests: str) -> bool:
    """Whether the project's reward finds the program right."""
    scored = code.score(response, tests, partial_credit=True)
    return scored["acc"] == 1.0


def unsandboxed(response: str, tests: str) -> bool:
    """The same by prime_code, called as verl's `default_compute_score` does."""
    share, _metadata = prime_code.compute_score(response, tests, continuous=True)
    return share == 1


JUDGES = {"sandbox": sandboxed, "prime_code": unsandboxed}


def judge_all(judge: Callable[[str, str], bool], tasks: list[tuple[str, str, bool]], workers: int) -> None:
    """Judges every task, `workers` at a time in threads, as verl's reward loop does.

    Raises:
        RuntimeError: a verdict is wrong; then the time means nothing.
    """
    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(lambda task: judge(task[0], task[1]), tasks))
    if verdicts != [right for _, _, right in tasks]:
        raise RuntimeError(f"{judge.__name__} misjudged a program: {verdicts}")


def measure(programs: int, seconds: float) -> list[Section]:
    """Programs judged per second, one at a time and one for each core; `seconds` for the timing of one."""
    tasks = tasks_of(programs)
    try:
        judge_all(sandboxed, tasks[:1], workers=1)
    except SandboxError as error:
        raise NotMeasuredError(str(error)) from error
    rows: list[Row] = []
    for workers in sorted({1, len(os.sched_getaffinity(0))}):
        calls = {name: partial(judge_all, judge, tasks, workers) for name, judge in JUDGES.items()}
        spreads = interleave(calls, seconds)
        rows += rows_of(programs, workers, spreads)
    note = (
        f"Programs of {TESTS} tests on standard input, three in four right. The sandbox runs every test in a process "
        "of its own behind namespaces, limits and a system call filter; prime_code runs all of them in one process "
        "with the caller's rights, and those of a wrong program once more, a process each."
    )
    return [Section("Judging programs", note, COLUMNS, rows)]


def rows_of(programs: int, workers: int, spreads: dict[str, Spread]) -> list[Row]:
    return [
        {"judge": name, "workers": workers, "programs": programs, "programs_per_second": programs / spread.median}
        | spread.in_ms()
        | {"to_prime_code": spreads["prime_code"].median / spread.median}
        for name, spread in spreads.items()
    ]
