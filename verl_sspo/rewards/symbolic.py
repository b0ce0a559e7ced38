"""Symbolic equality by math-verify, in child processes that can be killed.

A computer algebra system can take for ever on an expression that a model writes, and verl scores in threads, where no
signal arrives. `equal` asks a child process and kills it when time is up.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

START_SECONDS = 120.0  # importing sympy, on a busy host
MEMORY_BYTES = 4 << 30
_COUNT = max(1, min(4, (os.cpu_count() or 2) // 2))
_places = threading.BoundedSemaphore(_COUNT)
_idle: list[_Worker] = []


def _forget() -> None:
    # Child processes answer to one process: a fork of it starts its own.
    global _places
    _idle.clear()
    _places = threading.BoundedSemaphore(_COUNT)


os.register_at_fork(after_in_child=_forget)


class _Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.pending = b""
        if self.read_line(time.monotonic() + START_SECONDS) is None:
            self.kill()
            raise RuntimeError(f"math-verify does not start: run `{sys.executable} -m {__name__}` to see why")

    def read_line(self, deadline: float) -> bytes | None:
        """A line of the answer; None if the deadline passed or the process is gone."""
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN)
        while b"\n" not in self.pending:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            part = os.read(self.stdout.fileno(), 1 << 16)
            if not part:
                return None
            self.pending += part
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()


class Budget:
    """Time left for the formulas of one answer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def equal(gold: str, answer: str, budget: Budget) -> bool:
    """Whether two LaTeX expressions are equal; False where math-verify can read only one of them.

    Args:
        gold: The right answer.
        answer: The answer to judge.
        budget: What this takes is taken from it. Waiting for a free child process, or for the start of one, costs
            nothing: an answer does not pay for its neighbours.

    Raises:
        TimeoutError: Nothing of the budget is left.
    """
    with _places:
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
        started = time.monotonic()
        deadline = started + budget.seconds
        try:
            worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            worker.stdin.flush()
            line = worker.read_line(deadline)
        except BaseException:
            worker.kill()
            raise
        budget.seconds -= time.monotonic() - started
        if line is None:
            late = time.monotonic() >= deadline
            worker.kill()
            if late:
                raise TimeoutError
            return False  # out of memory, or a crash of the interpreter
        _idle.append(worker)
        return bool(json.loads(line))


def main() -> None:
    """Answers pairs of expressions, one JSON line each, until the input ends."""
    import dataclasses
    import logging
    import resource

    import sympy
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # Units are the caller's: math-verify takes the t of 1+2t for tonnes, and drops it.
    normalization = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
    latex = [LatexExtractionConfig(normalization_config=normalization)]

    def with_known_symbols(expression: Any) -> Any:
        # math-verify has no imaginary unit, and guesses from how each side is spelled whether its variables are real.
        # In a relation they are not: sympy would decide it, x^2 = -1 and x^2 = -4 alike.
        if not isinstance(expression, sympy.Basic):
            return expression
        relation = bool(expression.atoms(sympy.core.relational.Relational))
        symbols = [each for each in expression.free_symbols if isinstance(each, sympy.Symbol)]
        known = {each: sympy.Symbol(each.name, real=None if relation else True) for each in symbols}
        return expression.xreplace(
            {each: sympy.I if each.name == "i" and not relation else known[each] for each in symbols}
        )

    def read(expression: str) -> list:
        found = parse(f"${expression}$", latex, fallback_mode="no_fallback", parsing_timeout=None)
        return [with_known_symbols(each) for each in found]

    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            # 30 digits: a decimal that is only close to a surd is another number.
            same = verify(
                read(gold), read(answer), float_rounding=30, numeric_precision=60, strict=True, timeout_seconds=None
            )
        except (Exception, RecursionError):
            same = False
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    main()
