"""Rows of programming sets: a problem and the tests its solution must pass."""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import re
import zlib
from typing import Any

from verl_sspo.data.mathematics import problem_of
from verl_sspo.data.prepare import Dropped, Example
from verl_sspo.rewards import CODE
from verl_sspo.rewards.code import arguments_of
from verl_sspo.rewards.sandbox_runner import global_names, provided_names

TEMPLATES = {
    "code": [
        {"role": "user", "content": "{problem}\n\nPut the whole program into one ```python code block at the end."}
    ]
}
STANDARD = "Write a Python program that reads from standard input and writes to standard output."


def _check_python(*sources: Any) -> None:
    for source in sources:
        if not isinstance(source, str) or not source.strip():
            raise ValueError(f"tests are not Python: {source!r}"[:200])
        try:
            ast.parse(source)
        except SyntaxError as error:
            raise ValueError(f"tests are not Python: {error}") from error


def _function_of(test: dict[str, Any]) -> str:
    """The function that a test calls, or "": DeepCoder names it in the test, LiveCodeBench in `metadata`."""
    metadata = test.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    return test.get("fn_name") or metadata.get("func_name") or ""


def _tests(tests: Any) -> dict[str, Any]:
    """Inputs and outputs in the form that the reward takes, from the forms they come in."""
    tests = json.loads(tests) if isinstance(tests, str) else tests
    if isinstance(tests, list):  # DeepCoder, LiveCodeBench: one object a test
        names = {_function_of(each) for each in tests}
        if len(names) > 1:
            raise ValueError(f"tests call several functions, or some none: {sorted(names)}")
        tests = {
            "inputs": [each["input"] for each in tests],
            "outputs": [each["output"] for each in tests],
            "fn_name": "".join(names),
        }
    if not isinstance(tests, dict):
        raise ValueError("tests are neither an object nor a list")
    if {"test", "entry_point"} <= tests.keys() or "asserts" in tests:
        return tests
    inputs, outputs = tests["inputs"], tests["outputs"]
    if not (isinstance(inputs, list) and isinstance(outputs, list)):
        raise ValueError("inputs and outputs are not lists")
    if not inputs:
        raise Dropped("no tests")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    # Other languages spell a missing function name as null or "".
    name = {"fn_name": tests["fn_name"]} if tests.get("fn_name") else {}
    if name:
        for each in inputs:
            arguments_of(each)
    return {"inputs": inputs, "outputs": outputs, **name}


def read_code(row: dict[str, Any]) -> Example:
    """Rows of APPS, TACO and TACO-verified, DeepCoder, MBPP, and Eurus-2-RL-Data or others in verl's own schema."""
    if "reward_model" in row:
        if row.get("ability", "code") != "code":
            raise Dropped(f"ability {row['ability']}")
        question = next(each for each in row["prompt"] if each["role"] == "user")
        tests = _tests(row["reward_model"]["ground_truth"])
        # A name that the reward does not know would stop the training: such rows take the task's.
        known = row.get("data_source") in CODE
        return Example(
            problem_of(question, "content"), json.dumps(tests), data_source=row["data_source"] if known else None
        )
    if "test_list" in row:
        return read_mbpp(row)
    tests = _tests(row["tests"] if "tests" in row else row["input_output"])
    return _stated(problem_of(row, "problem", "question"), tests, row.get("starter_code"))


def _stated(problem: str, tests: dict[str, Any], starter_code: str | None) -> Example:
    """With what the tests expect of a program: a function, or standard input and output."""
    if tests.get("fn_name"):
        problem += f"\n\nWrite the function `{tests['fn_name']}`."
        if starter := (starter_code or "").strip():
            problem += f" Begin with:\n```python\n{starter}\n```"
    else:
        problem += f"\n\n{STANDARD}"
    return Example(problem, json.dumps(tests))


def read_humaneval(row: dict[str, Any]) -> Example:
    """A function to complete, and a `check` that calls it."""
    _check_python(row["test"], row["entry_point"])
    problem = f"Complete this function:\n```python\n{row['prompt'].rstrip()}\n```"
    tests = {"prompt": row["prompt"], "test": row["test"], "entry_point": row["entry_point"]}
    return Example(problem, json.dumps(tests))


def read_mbpp(row: dict[str, Any]) -> Example:
    """A task in words with asserts, in the full and in the sanitized version."""
    asserts = row["test_list"]
    if not isinstance(asserts, list):
        raise ValueError("`test_list` is not a list")
    if not asserts:
        raise Dropped("no tests")
    given = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    setup = [each for each in given if each.strip()]
    _check_python(*asserts, *setup)
    # A class of the program's own cannot cross into the checker, nor its objects back: `root = Node(1)` in the setup,
    # or `f(Pair(1, 2))`. The one function of a test may begin with a capital; a second such name is a class.
    names = _names_of_the_program([*setup, *asserts])
    if re.search(r"^\w+\s*=", "\n".join(setup), re.MULTILINE) or (
        len(names) > 1 and any(name[0].isupper() for name in names)
    ):
        raise Dropped("tests need objects of the program's own classes")
    problem = f"{row.get('text') or row['prompt']}\n\nYour program must pass these tests:\n```python\n"
    problem += "\n".join(asserts) + "\n```"
    return Example(problem, json.dumps({"asserts": asserts, "setup": setup}))


def _names_of_the_program(sources: list[str]) -> set[str]:
    """What tests look up and neither define nor find in Python or the judge."""
    names = global_names("\n".join(sources))
    return {name for name in names if not hasattr(builtins, name)} - provided_names(names).keys()


def read_livecodebench(row: dict[str, Any]) -> Example:
    """`question_content` with `public_test_cases` and `private_test_cases`; the function's name is in `metadata`."""
    tests = _tests(json.loads(row["public_test_cases"]) + _private_tests(row["private_test_cases"]))
    if name := json.loads(row.get("metadata") or "{}").get("func_name"):
        tests["fn_name"] = name
    return _stated(problem_of(row, "question_content"), tests, row.get("starter_code"))


class _TextOnly(pickle.Unpickler):
    """Reads a pickled text; a pickle that asks for anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"private tests ask for {module}.{name}: only a text is read")


def _private_tests(field: str) -> list[dict[str, Any]]:
    """JSON, or base64 of compressed pickled JSON, as LiveCodeBench hides it from search engines."""
    if field.lstrip().startswith("["):
        return json.loads(field)
    try:
        return json.loads(_TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(field)))).load())
    except (zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private tests cannot be decoded: {error}") from error
