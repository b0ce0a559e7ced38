"""Compares the code grader's sandbox with verl's prime_code, on the same programs and tests.

prime_code runs programs with the caller's rights. It only gets the harmless programs of this file.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pandas as pd
from verl.utils.reward_score import prime_code

from verl_sspo.benchmark.measure import Section, side_by_side
from verl_sspo.rewards import code
from verl_sspo.rewards.sandbox import SandboxError

TESTS = 8  # per program

# Programs that read a number and print one, the function they should compute, and whether they do.
PROGRAMS: tuple[tuple[str, Callable[[int], int], bool], ...] = (
    ("print(sum(range(int(input()) + 1)))", lambda n: n * (n + 1) // 2, True),
    ("print(len(sorted(str(i) for i in range(int(input())))))", lambda n: n, True),
    ("n = int(input())\nprint(n * n - 1)", lambda n: n * n, False),
)


def tasks_of(count: int) -> list[tuple[str, str, bool]]:
    """Responses, their tests as JSON, and whether the program is right."""
    tasks = []
    for i in range(count):
        program, function, right = PROGRAMS[i % len(PROGRAMS)]
        numbers = range(i + 1, i + 1 + TESTS)
        tests = {"inputs": [f"{n}\n" for n in numbers], "outputs": [f"{function(n)}\n" for n in numbers]}
        tasks.append((f"```python\n{program}\n```", json.dumps(tests), right))
    return tasks


def sandboxed(response: str, tests: str) -> bool:
    """Whether this project's grader accepts the program."""
    return code.score(response, tests, partial_credit=True)["acc"] == 1.0


def unsandboxed(response: str, tests: str) -> bool:
    """Whether prime_code accepts it, called as in verl's `default_compute_score`."""
    return prime_code.compute_score(response, tests, continuous=True)[0] == 1


def grade_all(grader: Callable[[str, str], bool], tasks: list[tuple[str, str, bool]], workers: int) -> None:
    """Grades every task, `workers` at a time in threads, as verl's reward loop does.

    Raises:
        RuntimeError: a grade is wrong, so the time means nothing.
    """
    with ThreadPoolExecutor(workers) as pool:
        grades = list(pool.map(lambda task: grader(task[0], task[1]), tasks))
    if grades != [right for _, _, right in tasks]:
        raise RuntimeError(f"{grader.__name__} graded a program wrongly: {grades}")


def measure(programs: int, seconds: float) -> list[Section]:
    """Programs graded per second, one at a time and one per core. Each is timed for `seconds`."""
    title = "Grading programs"
    tasks = tasks_of(programs)
    try:
        grade_all(sandboxed, tasks[:1], workers=1)
    except SandboxError as error:
        return [Section(title, f"Not measured: {error}", pd.DataFrame())]
    tables = []
    for workers in sorted({1, len(os.sched_getaffinity(0))}):
        graders = {"sandbox": sandboxed, "prime_code": unsandboxed}
        table = side_by_side(
            {name: partial(grade_all, each, tasks, workers) for name, each in graders.items()}, seconds
        )
        table.insert(0, "at a time", workers)
        table["programs/s"] = 1e3 * programs / table["ms"]
        table["/ prime_code"] = table["programs/s"] / table.loc["prime_code", "programs/s"]
        tables.append(table)
    note = (
        f"{programs} programs with {TESTS} tests each on standard input, two in three right; milliseconds (median, "
        "quartiles). The sandbox runs every test in a process of its own; prime_code runs all of them in one process "
        "with the caller's rights, and those of a wrong program again, one process each."
    )
    return [Section(title, note, pd.concat(tables))]
