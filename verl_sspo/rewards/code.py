"""Reward of programming tasks: does the program of the response pass its tests?

`ground_truth` is JSON, or the dict it stands for, in one of the forms the field uses:

- `{"inputs": [...], "outputs": [...]}`: standard input and output (APPS, TACO, Eurus-2-RL-Data).
- the same with `"fn_name"`: arguments and result of a function, or of a method of the class `Solution`. An input is a
  list of arguments, or a string with one JSON value a line. An output that is a string is JSON too, where it can be; a
  list of one may stand for its element (APPS).
- `{"test": "def check(candidate): ...", "entry_point": "f"}` (HumanEval), optionally with `"prompt"`, the code that
  the program completes: its functions are then the data set's own in the test.
- `{"asserts": ["assert f(1) == 2", ...]}` (MBPP), optionally with `"setup"`, code that runs before them.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import secrets
import threading
from collections.abc import Generator
from contextlib import closing
from functools import cache
from typing import Any

from verl_sspo.rewards import sandbox, sandbox_runner
from verl_sspo.rewards.sandbox import Limits, SandboxError, Verdict
from verl_sspo.rewards.sandbox_runner import Pairs, decode, encode

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+.-]*)")
_PYTHON = {"py", "python", "python3", "python2", "py3", "pypy", "pypy3"}


def extract_program(solution_str: str) -> str | None:
    """The last fenced block that says it is Python, else the last that says nothing; None where there is none.

    An unmarked block behind a Python block is what the program prints more often than it is a program.
    """
    blocks: list[tuple[str, list[str]]] = []
    indent, fence = 0, ""
    for line in solution_str.split("\n"):
        found = _FENCE.match(line)
        language = found[3].lower() if found else ""
        closes = found and fence and found[2].startswith(fence)
        if closes:
            fence = ""
        # A fence that says Python begins a block, also where it is the first to close another.
        if found and not fence and (language in _PYTHON if closes else "`" not in line[found.end() :]):
            indent, fence = len(found[1]), found[2]
            blocks.append((language, []))
        elif fence and not closes:
            # A block in a list is indented as its fence is.
            line = line[min(indent, len(line) - len(line.lstrip(" \t"))) :]
            # Some close a block at the end of its last line.
            if line.rstrip().endswith(fence) and line.count(fence) == 1:
                line, fence = line.rstrip().removesuffix(fence), ""
            blocks[-1][1].append(line + "\n")
    programs = {language in _PYTHON: body for language, body in blocks if language in {"", *_PYTHON} and any(body)}
    body = programs.get(True, programs.get(False))
    return None if body is None else "".join(body)


def score(
    solution_str: str,
    ground_truth: str | dict[str, Any],
    *,
    partial_credit: bool = False,
    test_timeout: float = Limits.test_timeout,
    program_timeout: float = Limits.program_timeout,
    memory_mb: int = Limits.memory_bytes >> 20,
    max_concurrent: int | None = None,
    sandbox_fusion_url: str | None = None,
    unsafe_without_sandbox: bool = False,
) -> dict[str, Any]:
    """Scores a response by running its program against tests.

    Args:
        solution_str: The response.
        ground_truth: The tests, in one of the forms above.
        partial_credit: The score is the share of tests passed, not all or nothing.
        test_timeout: Seconds for one test.
        program_timeout: Seconds for all tests of a program.
        memory_mb: Memory of a program, in MiB.
        max_concurrent: Programs that run at a time on this host; one for each processor by default.
        sandbox_fusion_url: Run programs on this SandboxFusion server, through verl's client, instead of locally.
        unsafe_without_sandbox: Run programs without any protection, with the rights of the caller.

    Raises:
        ValueError: `ground_truth` has none of the forms.
        SandboxError: The sandbox does not work on this host, or the SandboxFusion server does not.
    """
    tests = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if not isinstance(tests, dict) or not (
        {"inputs", "outputs"} <= tests.keys() or {"test", "entry_point"} <= tests.keys() or "asserts" in tests
    ):
        raise ValueError(
            "ground_truth of a programming task needs `inputs` and `outputs`, `test` and `entry_point`, or `asserts`"
        )
    program = extract_program(solution_str)
    if program is None:
        return {"error": "no code block"}
    # No source file can hold lone surrogates; a mark at its beginning is no part of it.
    program = program.encode(errors="replace").decode().removeprefix("\ufeff")
    limits = Limits(test_timeout=test_timeout, program_timeout=program_timeout, memory_bytes=memory_mb << 20)
    if len(program) > 1 << 20 or "\0" in program:
        verdict = Verdict(0, 1, "does not compile: too long, or with null characters")
    elif sandbox_fusion_url:
        verdict = _judge_on_fusion(sandbox_fusion_url, program, tests, limits, max_concurrent or 64)
    else:
        with sandbox.slot(max_concurrent):
            verdict = judge(
                program, tests, limits, all_tests=partial_credit, unsafe_without_sandbox=unsafe_without_sandbox
            )
    passed = bool(verdict.total) and verdict.passed == verdict.total
    share = verdict.passed / verdict.total if verdict.total else 0.0
    return {
        "score": share if partial_credit else float(passed),
        "acc": float(passed),
        "format": 1.0,
        "timeout": float(verdict.error == "timeout"),
        "error": verdict.error,
    }


def judge(
    program: str,
    tests: dict[str, Any],
    limits: Limits,
    *,
    all_tests: bool = False,
    unsafe_without_sandbox: bool = False,
) -> Verdict:
    """Runs a program against tests; stops at the first that fails unless `all_tests`."""
    if "inputs" in tests:
        results = sandbox.run_cases(program, _cases(tests), limits, unsafe_without_sandbox=unsafe_without_sandbox)
        return _judge_results(results, tests, all_tests)
    if "test" in tests:
        prompt, entry_point = tests.get("prompt") or "", tests["entry_point"]
        sources, context = [prompt, program], [prompt, tests["test"]]
        checks = [f"check({entry_point})"]
    else:
        entry_point, sources, checks = None, [program], list(tests["asserts"])
        setup = tests.get("setup") or []
        context = [setup] if isinstance(setup, str) else list(setup)
    return sandbox.run_checks(
        sources,
        checks,
        limits,
        context=context,
        entry_point=entry_point,
        all_checks=all_tests,
        unsafe_without_sandbox=unsafe_without_sandbox,
    )


# --- inputs and outputs ------------------------------------------------------------------------------------------


def _cases(tests: dict[str, Any]) -> list[dict[str, Any]]:
    """What `sandbox.run_cases` runs; the expected outputs stay here."""
    inputs, outputs, function = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"ground_truth has {len(inputs)} inputs and {len(outputs)} outputs")
    if function:
        return [{"call": (function, arguments_of(each))} for each in inputs]
    return [{"stdin": _text(each).encode(errors="replace")} for each in inputs]


def _judge_results(
    results: Generator[tuple[str, bytes], None, None], tests: dict[str, Any], all_tests: bool
) -> Verdict:
    outputs, function = tests["outputs"], tests.get("fn_name")
    passed, failure = 0, ""
    with closing(results):
        for expected in outputs:
            try:
                error, output = next(results)
            except TimeoutError:
                error, output = "timeout", b""
            except (StopIteration, ValueError):
                error, output = "the program broke off", b""
            if not error:
                same = _same_result(output, expected) if function else same_output(output, _text(expected))
                error = "" if same else "wrong answer"
            passed += not error
            failure = failure or error
            if error and not all_tests:
                break
    return Verdict(passed, len(outputs), failure)


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


# Every digit has one way to match: programs print long words.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# Far below the precision that any problem asks for, far above that of a float.
RELATIVE, ABSOLUTE = 1e-6, 1e-8


def same_output(output: bytes, expected: str) -> bool:
    """Whether two outputs have the same words on the same lines, blank lines left out.

    Where the expected word is a decimal fraction, a number within 1e-6 of it, relatively, is the same word.
    """
    printed = output.decode("utf-8", errors="replace")
    left, right = ([line.split() for line in text.split("\n") if line.strip()] for text in (printed, expected))
    return len(left) == len(right) and all(
        len(words) == len(wanted) and all(map(_same_word, words, wanted))
        for words, wanted in zip(left, right, strict=True)
    )


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if wanted.lstrip("+-").isdigit() or not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(wanted)):
        return False
    return math.isclose(float(word), float(wanted), rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def arguments_of(given: Any) -> list[Any]:
    """The arguments of a call, from a list or from lines of JSON.

    Raises:
        ValueError: A line is not JSON.
    """
    arguments = [json.loads(line) for line in given.split("\n") if line.strip()] if isinstance(given, str) else given
    return [_integer_keys(argument) for argument in (arguments if isinstance(arguments, list) else [arguments])]


def _integer_keys(value: Any) -> Any:
    # JSON made strings of a dictionary's integer keys.
    if isinstance(value, dict) and all(re.fullmatch(r"-?\d+", key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _same_result(output: bytes, expected: Any) -> bool:
    try:
        result = _as_json(decode(output, hashing=False))
    except (ValueError, RecursionError):  # the program wrote something else into the channel
        return False
    if isinstance(expected, str):
        return _same_value(result, _from_json(expected))
    # APPS and TACO wrap the expected result in a list of one.
    alternatives = [expected, expected[0]] if isinstance(expected, list) and len(expected) == 1 else [expected]
    return any(_same_value(result, _as_json(each)) for each in alternatives)


def _from_json(text: str) -> Any:
    """What a text says as JSON; itself where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _as_json(value: Any) -> Any:
    """Plain data as JSON holds it: tuples are lists, keys are strings."""
    if isinstance(value, Pairs):
        return {str(key): _as_json(item) for key, item in value}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _as_json(each) for key, each in value.items()}
    return value


def _same_value(result: Any, wanted: Any) -> bool:
    if isinstance(result, list) and isinstance(wanted, list):
        return len(result) == len(wanted) and all(map(_same_value, result, wanted))
    if isinstance(result, dict) and isinstance(wanted, dict):
        return result.keys() == wanted.keys() and all(_same_value(result[key], wanted[key]) for key in wanted)
    if type(wanted) is float and type(result) in (int, float):
        try:
            return math.isclose(result, wanted, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        except OverflowError:  # an integer beyond the floats
            return False
    if type(wanted) is int and type(result) is float:
        return result == wanted
    return type(result) is type(wanted) and result == wanted


# --- a remote sandbox --------------------------------------------------------------------------------------------

# The runner goes along: a program finds the names that it finds here, and a result comes back in the same encoding.
_REMOTE = """\
import sys
out, runner = sys.stdout, {{"__name__": "runner"}}
exec({runner!r}, runner)
module = runner["load"]({name!r}, {sources!r})
{last}
"""
_REMOTE_CALL = """\
name, arguments = runner["decode"]({call!r})
result = runner["find_function"](module, name)(*arguments)
print("\\n" + runner["encode"](result).hex(), file=out)
"""
# How a test ended, by the status that verl's client gives it. Any other says that the server did not run it.
_REMOTE_ERRORS = {
    "success": "",
    "runtime_error": "exception",
    "timeout": "timeout",
    "compile_timeout": "timeout",
    "compile_error": "does not compile",
    "compile_error_skipped": "does not compile",
}


@cache
def _fusion_semaphore(max_concurrent: int) -> threading.Semaphore:
    return threading.Semaphore(max_concurrent)


def _run_on_fusion(
    url: str, runs: list[tuple[str, str]], limits: Limits, max_concurrent: int
) -> Generator[tuple[str, str], None, None]:
    """Runs codes with their standard inputs on a SandboxFusion server, through verl's client.

    Yields:
        For each an error ("" if it ended well) and what it printed.

    Raises:
        SandboxError: The server did not run one of them.
    """
    from verl.utils.reward_score import sandbox_fusion

    codes, inputs = [code for code, _ in runs], [stdin for _, stdin in runs]
    _, ends = sandbox_fusion.check_correctness(
        url,
        # Outputs are not for the client to compare.
        {"inputs": inputs, "outputs": [None] * len(runs), "assert_case": codes},
        "",
        timeout=math.ceil(limits.test_timeout),
        memory_limit_mb=limits.memory_bytes >> 20,
        concurrent_semaphore=_fusion_semaphore(max_concurrent),
    )
    for end in ends:
        status = end["status"]
        if status not in _REMOTE_ERRORS:
            reason = end["api_request_error"] or end["api_response"]
            raise SandboxError(f"the SandboxFusion server {url} did not run a program: {status}: {reason}"[:1000])
        yield _REMOTE_ERRORS[status], end["stdout"] or ""


def _remote(sources: list[str], last: str = "", name: str = "solution") -> str:
    return _REMOTE.format(runner=inspect.getsource(sandbox_runner), name=name, sources=sources, last=last)


def _judge_on_fusion(url: str, program: str, tests: dict[str, Any], limits: Limits, max_concurrent: int) -> Verdict:
    """`judge` on a SandboxFusion server.

    There the checks of a data set share a process with the program: its verdicts on them can be forged.
    """
    if "inputs" in tests:
        cases = _cases(tests)
        if tests.get("fn_name"):
            runs = [(_remote([program], _REMOTE_CALL.format(call=encode(case["call"]))), "") for case in cases]
        else:
            runs = [(_remote([program], name="__main__"), case["stdin"].decode()) for case in cases]
        output_of = _returned if tests.get("fn_name") else _printed
        results = _run_on_fusion(url, runs, limits, max_concurrent)
        return _judge_results(((error, output_of(stdout)) for error, stdout in results), tests, all_tests=True)
    if "test" in tests:
        before, checks = [tests.get("prompt") or ""], [[tests["test"], f"check({tests['entry_point']})"]]
    else:
        setup = tests.get("setup") or []
        before, checks = [setup] if isinstance(setup, str) else setup, [[check] for check in tests["asserts"]]
    # What a program that ends before its check does not say.
    word = secrets.token_hex()
    runs = [(_remote([*before, program, *check], f"print({word!r}, file=out)"), "") for check in checks]
    results = _run_on_fusion(url, runs, limits, max_concurrent)
    errors = [error or ("" if word in stdout else "the program ended") for error, stdout in results]
    return Verdict(errors.count(""), len(errors), next(filter(None, errors), ""))


def _printed(stdout: str) -> bytes:
    return stdout.encode(errors="replace")


def _returned(stdout: str) -> bytes:
    """The last line, which `_REMOTE_CALL` wrote; nothing where the program ended before."""
    try:
        return bytes.fromhex(stdout.rstrip("\n").rpartition("\n")[2])
    except ValueError:
        return b""
