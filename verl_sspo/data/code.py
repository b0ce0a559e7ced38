"""Reads rows of programming sets: a problem and the tests that its solution must pass."""

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

from verl_sspo.data.prepare import Dropped, Example, column_of, text_of
from verl_sspo.rewards import CODE
from verl_sspo.rewards.code import tests_of
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
            raise ValueError(f"tests are not Python: {source!r:.80}")
        try:
            ast.parse(source)
        except SyntaxError as error:
            raise ValueError(f"tests are not Python: {error}") from error


def _tests(tests: Any) -> dict[str, Any]:
    """Tests in the form that the reward takes; a row without tests is dropped."""
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise ValueError(f"tests are not JSON: {error}") from error
    if not tests or (isinstance(tests, dict) and tests.get("inputs") == tests.get("outputs") == []):
        raise Dropped("no tests")
    return tests_of(tests)


def read_code(row: dict[str, Any]) -> Example:
    """Rows of APPS, TACO and TACO-verified, DeepCoder, MBPP, and Eurus-2-RL-Data or others in verl's own schema."""
    if "reward_model" in row:
        if row.get("ability", "code") != "code":
            raise Dropped(f"ability {row['ability']}")
        messages = row[column_of(row, "prompt")]
        question = next((each for each in messages if each["role"] == "user"), None)
        if question is None:
            raise ValueError("no user message in column prompt")
        tests = _tests(row["reward_model"]["ground_truth"])
        # The reward cannot grade a data_source that it does not know: such rows take the task's.
        known = row.get("data_source") in CODE
        return Example(
            text_of(question, "content"), json.dumps(tests), data_source=row["data_source"] if known else None
        )
    if "test_list" in row:
        return read_mbpp(row)
    tests = _tests(row[column_of(row, "tests", "input_output")])
    return _stated(text_of(row, "problem", "question"), tests, row.get("starter_code"))


def _stated(problem: str, tests: dict[str, Any], starter_code: str | None) -> Example:
    """The problem, with what the tests expect of a program: a function, or standard input and output."""
    if tests.get("fn_name"):
        problem += f"\n\nWrite the function `{tests['fn_name']}`."
        if starter := (starter_code or "").strip():
            problem += f" Begin with:\n```python\n{starter}\n```"
    else:
        problem += f"\n\n{STANDARD}"
    return Example(problem, json.dumps(tests))


def read_humaneval(row: dict[str, Any]) -> Example:
    """A function to complete, and a `check` that calls it."""
    tests = {name: row[column_of(row, name)] for name in ("prompt", "test", "entry_point")}
    _check_python(tests["test"], tests["entry_point"])
    problem = f"Complete this function:\n```python\n{text_of(row, 'prompt')}\n```"
    return Example(problem, json.dumps(tests))


def read_mbpp(row: dict[str, Any]) -> Example:
    """A task in words with asserts, from the full or the sanitized version."""
    asserts = row[column_of(row, "test_list")]
    if not isinstance(asserts, list):
        raise ValueError("column test_list is not a list")
    if not asserts:
        raise Dropped("no tests")
    given = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    setup = [each for each in given if each.strip()]
    _check_python(*asserts, *setup)
    # The program's own classes and their objects cannot be sent to the checker or back: `root = Node(1)` in the setup,
    # or `f(Pair(1, 2))`. A capitalised name is the tested function if it is the only name, otherwise a class.
    names = {name for name in global_names("\n".join([*setup, *asserts])) if not hasattr(builtins, name)}
    names -= provided_names(names).keys()
    if re.search(r"^\w+\s*=", "\n".join(setup), re.MULTILINE) or (
        len(names) > 1 and any(name[0].isupper() for name in names)
    ):
        raise Dropped("tests need objects of the program's own classes")
    problem = f"{text_of(row, 'text', 'prompt')}\n\nYour program must pass these tests:\n```python\n"
    problem += "\n".join(asserts) + "\n```"
    return Example(problem, json.dumps({"asserts": asserts, "setup": setup}))


def read_livecodebench(row: dict[str, Any]) -> Example:
    """`question_content` with `public_test_cases` and `private_test_cases`; the function's name is in `metadata`."""
    public, private = text_of(row, "public_test_cases"), row.get("private_test_cases")
    tests = _tests(json.loads(public) + _private_tests(private if isinstance(private, str) else ""))
    if name := json.loads(row.get("metadata") or "{}").get("func_name"):
        tests["fn_name"] = name
    return _stated(text_of(row, "question_content"), tests, row.get("starter_code"))


class _TextOnly(pickle.Unpickler):
    """Unpickles text only; a pickle with anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"private tests contain {module}.{name}: only text is read")


def _private_tests(field: str) -> list[dict[str, Any]]:
    """JSON, or base64 of compressed pickled JSON, as LiveCodeBench hides it from search engines."""
    if field.lstrip().startswith("["):
        return json.loads(field)
    try:
        return json.loads(_TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(field)))).load())
    except (zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private tests cannot be decoded: {error}") from error
