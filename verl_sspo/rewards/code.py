"""Reward of programming tasks: does the program of the response pass its tests?

`ground_truth` is JSON text, or the decoded object, in one of these common forms:

- `{"inputs": [...], "outputs": [...]}`: standard input and output (APPS, TACO, Eurus-2-RL-Data).
- the same with `"fn_name"`: arguments and result of a function, or of a method of the class `Solution`. An input is a
  list of arguments, or a string with one argument per line. Strings that are JSON are decoded, others are kept. An
  output that is a list of one element may stand for that element (APPS).
- `[{"input": ..., "output": ...}, ...]`: the same, one object per test (DeepCoder, LiveCodeBench).
- `{"test": "def check(candidate): ...", "entry_point": "f"}` (HumanEval), optionally with `"prompt"`, the code that
  the program completes. The test then uses the prompt's helper functions as the data set wrote them.
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
_PYTHON = re.compile(r"py(thon|py)?[\d.]*", re.IGNORECASE)


def extract_program(solution_str: str) -> str | None:
    """The last fenced block marked as Python, else the last unmarked one; None if there is none.

    An unmarked block after a Python block is usually the program's output. Blocks inside the thinking and blocks of
    comments only do not count. A response without any fence is taken as a program.
    """
    solution_str = solution_str.lstrip("\ufeff").rpartition("</think>")[2]
    if solution_str.lstrip().startswith("<think>"):
        return None
    if "```" not in solution_str and "~~~" not in solution_str:
        return solution_str if solution_str.strip() else None
    blocks: list[tuple[bool, list[str]]] = []
    indent, fence = 0, ""
    for line in solution_str.split("\n"):
        # Words may precede a fence marked as Python.
        words, ticks, language = line.rpartition("```")
        if not fence and words.strip() and "`" not in words and _PYTHON.fullmatch(language.strip()):
            line = ticks + language
        found = _FENCE.match(line)
        python = bool(found and _PYTHON.fullmatch(found[3]))
        closes = found and fence and found[2].startswith(fence)
        if closes:
            fence = ""
        # A fence marked as Python opens a block, even if it has just closed another one.
        if found and not fence and (python if closes else "`" not in line[found.end() :]):
            indent, fence = len(found[1]), found[2]
            # A block in another language is skipped with its lines.
            blocks += [(python, [])] if python or not found[3] else []
            body = blocks[-1][1] if python or not found[3] else []
        elif fence and not closes:
            # A block in a list is indented like its fence.
            line = line[min(indent, len(line) - len(line.lstrip(" \t"))) :]
            # Some models close a block at the end of its last line.
            if line.rstrip().endswith(fence) and line.count(fence) == 1:
                line, fence = line.rstrip().removesuffix(fence), ""
            body.append(line + "\n")
    programs = {
        python: body for python, body in blocks if any(line.strip() and line.lstrip()[0] != "#" for line in body)
    }
    program = programs.get(True, programs.get(False))
    return None if program is None else "".join(program)


def score(
    solution_str: str,
    ground_truth: Any,
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
        partial_credit: Score the fraction of tests passed instead of all or nothing.
        test_timeout: Seconds for one test.
        program_timeout: Seconds for all tests of a program.
        memory_mb: Memory of a program, in MiB.
        max_concurrent: Programs that run at a time on this host (default: one per processor), or tests on a
            SandboxFusion server (default: 64).
        sandbox_fusion_url: Run programs on this SandboxFusion server, through verl's client, instead of locally.
        unsafe_without_sandbox: Run programs without any protection, with the rights of the caller.

    Raises:
        ValueError: The tests cannot be read; `compute_score` counts the row as ungradable.
        SandboxError: The sandbox on this host, or the SandboxFusion server, does not work.
    """
    tests = tests_of(ground_truth)
    program = extract_program(solution_str)
    if program is None:
        return {"error": "no code block"}
    # A source file cannot hold lone surrogates, and a byte order mark is not part of the program.
    program = program.encode(errors="replace").decode().removeprefix("\ufeff")
    limits = Limits(test_timeout, program_timeout, memory_mb << 20, unsafe=unsafe_without_sandbox)
    if len(program) > 1 << 20 or "\0" in program:
        verdict = Verdict(0, 1, "does not compile: too long, or with null characters")
    elif sandbox_fusion_url:
        verdict = _grade_on_fusion(sandbox_fusion_url, program, tests, limits, max_concurrent or 64)
    else:
        with sandbox.slot(max_concurrent):
            verdict = grade(program, tests, limits, all_tests=partial_credit)
    passed = float(verdict.passed == verdict.total)
    return {
        "score": verdict.passed / verdict.total if partial_credit else passed,
        "acc": passed,
        "format": float("```" in solution_str or "~~~" in solution_str),
        "timeout": float(verdict.error == "timeout"),
        "error": verdict.error,
    }


def grade(program: str, tests: dict[str, Any], limits: Limits, *, all_tests: bool = False) -> Verdict:
    """Runs a program against what `tests_of` returns; stops at the first test that fails unless `all_tests`."""
    if "inputs" in tests:
        results = sandbox.run_cases(program, _cases(tests), limits)
        return _compare(results, tests, all_tests)
    prompt, entry_point = tests.get("prompt", ""), tests.get("entry_point")
    return sandbox.run_checks(
        [prompt, program],
        tests.get("asserts") or [f"check({entry_point})"],
        limits,
        context=[prompt, *tests.get("setup", []), tests.get("test", "")],
        entry_point=entry_point,
        all_checks=all_tests,
    )


# --- tests -------------------------------------------------------------------------------------------------------


def tests_of(ground_truth: Any) -> dict[str, Any]:
    """The tests of a row in one of three forms: `inputs` and `outputs`; `test` and `entry_point`; `asserts`.

    Raises:
        ValueError: There are no tests, or they have none of these forms.
    """
    try:
        tests = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(tests, list) and all(isinstance(each, dict) and {"input", "output"} <= each.keys() for each in tests):
        names = {_function_of(each) for each in tests}
        if len(names) > 1:
            raise ValueError(f"tests call different functions, or only some call one: {sorted(names)}")
        pairs = {"inputs": [each["input"] for each in tests], "outputs": [each["output"] for each in tests]}
        tests = pairs | {"fn_name": "".join(names)}
    form: dict[str, Any]
    match tests:
        case {"inputs": list() as inputs, "outputs": list() as outputs}:
            if len(inputs) != len(outputs):
                raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
            form, sources = {"inputs": inputs, "outputs": outputs}, []
            if tests.get("fn_name"):  # other languages write a missing function name as null or ""
                form["fn_name"] = str(tests["fn_name"])
        case {"test": test, "entry_point": entry_point}:
            form = {"prompt": tests.get("prompt") or "", "test": test, "entry_point": entry_point}
            sources = list(form.values())
        case {"asserts": list() as asserts}:
            setup = tests.get("setup") or []
            form = {"asserts": asserts, "setup": setup if isinstance(setup, list) else [setup]}
            sources = asserts + form["setup"]
        case _:
            raise ValueError("tests need lists `inputs` and `outputs`, `test` and `entry_point`, or a list `asserts`")
    if [] in (form.get("inputs"), form.get("asserts")):
        raise ValueError("no tests")
    if not all(isinstance(source, str) and "\0" not in source for source in sources):
        raise ValueError("tests are not Python: not a text")
    return form


def _function_of(test: dict[str, Any]) -> str:
    """The function that a test calls, or "": DeepCoder names it in the test, LiveCodeBench in `metadata`."""
    metadata = test.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    return test.get("fn_name") or metadata.get("func_name") or ""


def _cases(tests: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases for `sandbox.run_cases`; the expected outputs stay here."""
    if function := tests.get("fn_name"):
        return [{"call": (function, _arguments(each))} for each in tests["inputs"]]
    return [{"stdin": _text(each).encode(errors="replace")} for each in tests["inputs"]]


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(given: Any) -> list[Any]:
    """The arguments of a call, from a list, or from a text that is JSON as a whole or line by line."""
    if isinstance(given, str):
        whole = _from_text(given)
        given = [whole] if whole is not given else [_from_text(line) for line in given.split("\n") if line.strip()]
    return [_integer_keys(argument) for argument in (given if isinstance(given, list) else [given])]


def _integer_keys(value: Any) -> Any:
    # JSON turned a dictionary's integer keys into strings.
    if isinstance(value, dict) and all(re.fullmatch(r"-?\d+", key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _from_text(text: str) -> Any:
    """A text decoded as JSON, or as Python's True, False or None; unchanged if it is neither."""
    python = {"True": True, "False": False, "None": None}
    try:
        return python[text] if text in python else json.loads(text)
    except (ValueError, RecursionError):
        return text


# --- comparing ---------------------------------------------------------------------------------------------------


def _compare(results: Generator[tuple[str, bytes], None, None], tests: dict[str, Any], all_tests: bool) -> Verdict:
    outputs, function = tests["outputs"], tests.get("fn_name")
    floats = any(map(_has_float, outputs))
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
                same = _same_result(output, expected) if function else same_output(output, _text(expected), floats)
                error = "" if same else "wrong answer"
            passed += not error
            failure = failure or error
            if error and not all_tests:
                break
    return Verdict(passed, len(outputs), failure)


# Each digit can match in only one way, since programs print long words.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _has_float(expected: Any) -> bool:
    words = _text(expected).split()
    return any(_NUMBER.fullmatch(word) and not word.lstrip("+-").isdigit() for word in words)


def same_output(output: bytes, expected: str, floats: bool) -> bool:
    """Whether two outputs have the same words on the same lines, ignoring blank lines.

    If the task has `floats`, numbers only need to be `close`; otherwise every word must be the same.
    """
    printed = output.decode("utf-8", errors="replace")
    left, right = ([line.split() for line in text.split("\n") if line.strip()] for text in (printed, expected))
    return [len(words) for words in left] == [len(words) for words in right] and all(
        word == wanted
        or (floats and _NUMBER.fullmatch(word) and _NUMBER.fullmatch(wanted) and close(float(word), float(wanted)))
        for words, line in zip(left, right, strict=True)
        for word, wanted in zip(words, line, strict=True)
    )


def close(value: float, wanted: float) -> bool:
    """Whether two numbers are equal within the tolerance for tasks with floats.

    That is 1e-6 relative, as usual in programming contests, but at most 1e-3: 10,000,001 is not 10,000,000.0. The last
    term allows for the rounding of floats themselves.
    """
    bound = max(min(1e-6 * abs(wanted), 1e-3), 1e-12 * max(1.0, abs(wanted)))
    return abs(value - wanted) <= bound < math.inf


def _same_result(output: bytes, expected: Any) -> bool:
    # APPS and TACO wrap the expected result in a list of one.
    if isinstance(expected, str):
        alternatives = [_from_text(expected)]
    else:
        alternatives = [expected, *(expected if isinstance(expected, list) and len(expected) == 1 else [])]
    try:
        result = _as_json(decode(output, hashing=False))
        return any(_same_value(result, _as_json(each)) for each in alternatives)
    except (ValueError, RecursionError):  # the program wrote something else into the channel
        return False


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
    if {type(result), type(wanted)} <= {int, float}:
        try:
            return result == wanted or (type(wanted) is float and close(float(result), wanted))
        except OverflowError:  # an integer too large for a float
            return False
    return type(result) is type(wanted) and result == wanted


# --- a remote sandbox --------------------------------------------------------------------------------------------

# The runner's source is sent along: a program finds the same names as here, and results come back in the same encoding.
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
print({word!r} + runner["encode"](result).decode(), file=out)
"""
# How a test ended, by the status from verl's client. Any other status means that the server did not run it.
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


def _grade_on_fusion(url: str, program: str, tests: dict[str, Any], limits: Limits, max_concurrent: int) -> Verdict:
    """`grade` on a SandboxFusion server. Checks share a process with the program there, so it can forge verdicts.

    Raises:
        SandboxError: The server did not run one of the tests.
    """
    from verl.utils.reward_score import sandbox_fusion

    word = secrets.token_hex()  # secret, so a program that ends early cannot print it
    function, cases = tests.get("fn_name"), _cases(tests) if "inputs" in tests else []

    def remote(*sources: str, last: str = f"print({word!r}, file=out)", name: str = "solution") -> str:
        return _REMOTE.format(runner=inspect.getsource(sandbox_runner), name=name, sources=list(sources), last=last)

    if function:
        calls = [_REMOTE_CALL.format(call=encode(case["call"]), word=word) for case in cases]
        codes = [remote(program, last=call) for call in calls]
    elif cases:
        codes = [remote(program, last="", name="__main__")] * len(cases)
    else:
        context = [tests.get("prompt", ""), *tests.get("setup", []), program, tests.get("test", "")]
        codes = [remote(*context, each) for each in tests.get("asserts") or [f"check({tests['entry_point']})"]]
    _, ends = sandbox_fusion.check_correctness(
        url,
        # Outputs are compared here, not by the client.
        {
            "inputs": [case.get("stdin", b"").decode() for case in cases] or [""] * len(codes),
            "outputs": [None] * len(codes),
            "assert_case": codes,
        },
        "",
        timeout=math.ceil(limits.test_timeout),
        memory_limit_mb=limits.memory_bytes >> 20,
        concurrent_semaphore=_fusion_semaphore(max_concurrent),
    )
    if broken := next((end for end in ends if end["status"] not in _REMOTE_ERRORS), None):
        reason = f"{broken['status']}: {broken['api_request_error'] or broken['api_response']}"
        raise SandboxError(f"the SandboxFusion server {url} did not run a program: {reason}"[:1000])
    results = [(_REMOTE_ERRORS[end["status"]], end["stdout"] or "") for end in ends]
    if cases:
        outputs = ((error, stdout.partition(word)[2] if function else stdout) for error, stdout in results)
        return _compare(((error, text.encode(errors="replace")) for error, text in outputs), tests, all_tests=True)
    errors = [error or ("" if word in stdout else "the program ended") for error, stdout in results]
    return Verdict(errors.count(""), len(errors), next(filter(None, errors), ""))
