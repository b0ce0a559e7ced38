"""A program counts as right exactly if its tests pass, in every format of tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_sspo.rewards import COLUMNS, code, compute_score
from verl_sspo.rewards.code import close, extract_program, same_output
from verl_sspo.rewards.sandbox import SandboxError, Verdict

pytestmark = pytest.mark.timeout(300)
FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(os.environ.get("VERL_SSPO_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed (apt-get install bubblewrap)"
)


def _block(program):
    return f"Here it is:\n\n```python\n{program}\n```\nDone."


def _score(program, tests, data_source="taco", **options):
    return compute_score(data_source, _block(program), json.dumps(tests), **options)["score"]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\nprints\n```text\nb\n```", "a\n"),
        ("```python\nx = '''```'''\n```", "x = '''```'''\n"),
        ("```python\na", "a\n"),
        ("1. so\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("```python\na\n```\nprints\n```\n5\n```", "a\n"),
        ("```python\na\n```python\nb\n```", "b\n"),
        ("```\na\n```\n```\n```", "a\n"),
        ("```python\na\n``` prints\n5", "a\n"),
        ("```python\na\n    return x```", "a\n    return x\n"),
        ("```python\na\nb``` \nprints\n```\n5\n```", "a\nb\n"),
        ("```python\na  # ```b```\nc\n```", "a  # ```b```\nc\n"),
        ("~~~python\na```\nb\n~~~", "a```\nb\n"),
        ("so ```x``` is\n```x```\nno block", None),
        ("~~~python\na\n~~~", "a\n"),
        ("Here is the code: ```python\na\n```", "a\n"),
        ("Here: ```Python3.8 \r\na\n```", "a\n"),
        ("```python3.8\na\n```", "a\n"),
        ("\ufeff```python\na\n```", "a\n"),
        ("```python\na\n```\n```python\n# end\n\n```", "a\n"),
        ("```python\na\n```\n```bash\npython a.py\n```", "a\n"),
        ("```text\n```python\na\n```", "a\n"),
        # Thinking is not part of the answer.
        ("<think>\n```python\na\n```\n", None),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n</think> So:\n```\nb\n```", "b\n"),
        # Without a code fence, the whole response is the program.
        ("print(1)", "print(1)"),
        ("<think>x</think>\nprint(1)", "\nprint(1)"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
        ("```" + " " * 1_000_000, None),
        ("", None),
    ],
)
def test_extract_program(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        (b"1 2\n3\n", "1 2\n3", True),
        (b"1  2 \r\n\n3", "1 2\n3\n", True),
        (b"1 2 3", "1 2\n3", False),
        (b"YES", "Yes", False),
        (b"1 2", "2 1", False),
        (b"", "", True),
        (b"", "1", False),
        (b"1\n1", "1", False),
        (b"\x00\xff", "1", False),
    ],
)
def test_same_words_on_the_same_lines(output, expected, same):
    assert same_output(output, expected, floats=False) is same
    assert same_output(output, expected, floats=True) is same


# Printed, expected, and whether this is right in a task with floats. In a task without floats all are wrong.
@pytest.mark.parametrize(
    ("printed", "expected", "right"),
    [
        ("0.333333333", "0.3333333333333333", True),
        ("0.3334", "0.3333333333333333", False),
        ("0.34", "0.3333", False),
        ("2", "2.0", True),
        ("2.0", "2", True),  # if another test of the task has a float
        ("5.5e-17", "0.0", True),  # 0.1 + 0.2 - 0.3
        ("0", "0.00000001", False),
        ("1e5", "100000.0", True),
        ("10000001", "10000000.0", False),
        ("1234567.90", "1234567.89", False),
        ("1234567.8900001", "1234567.89", True),
        ("1e300", "1.0000000000000001e300", True),
        ("1e999", "1.5", False),
        ("1.5", "1e999", False),
        ("1e500", "1e400", False),
        ("nan", "0.5", False),
        ("0.5", "nan", False),
        ("+1", "1", True),
        ("1_0", "10.0", False),
        ("\u0661.5", "1.5", False),
    ],
)
def test_numbers_may_differ_where_the_task_has_floats(printed, expected, right):
    assert same_output(printed.encode(), expected, floats=True) is right
    assert not same_output(printed.encode(), expected, floats=False)


@given(st.floats(1e-6, 1e12), st.floats(-1, 1))
def test_close_is_never_more_than_a_thousandth_and_never_less_than_rounding(wanted, part):
    bound = min(1e-6 * wanted, 1e-3)
    assert close(wanted + part * 0.99 * bound, wanted) or bound < 1e-12 * max(1, wanted)
    assert close(float(repr(wanted * (1 + 2**-52))), wanted)
    assert not close(wanted + 2e-3, wanted) or wanted > 1e9
    assert not close(wanted * (1 + 2e-6), wanted) or wanted < 1e-6


@needs_bubblewrap
@pytest.mark.parametrize(
    ("printed", "outputs", "score"),
    [
        ("1.0", ["1"], 0.0),
        ("1.0", [1], 0.0),
        ("1", ["1.0"], 1.0),
        ("1.0", ["1", "0.5"], 0.5),
        ("True", [True], 1.0),
        ("1", [True], 0.0),
        ("true", [True], 0.0),
        ("1.10", ["1.1"], 1.0),
        ("v1.10", ["v1.1"], 0.0),
    ],
)
def test_floats_of_the_whole_task(printed, outputs, score):
    tests = {"inputs": [""] * len(outputs), "outputs": outputs}
    assert _score(f"print({printed!r})", tests, partial_credit=True) == score


def test_outputs_made_to_be_slow_are_graded():
    # Quadratic work on any of these would take hours, and the test's timeout would end it.
    prime = (1 << 61) - 1  # integers are hashed modulo this prime: multiples collide
    numbers = [k * prime for k in range(300_000)]
    assert not same_output(b"1" * 1_000_000 + b"x", "0.5", floats=True)
    assert not code._same_result(json.dumps({"d": [[k, None] for k in numbers]}).encode(), {"1": None})
    assert not code._same_result(json.dumps({"e": numbers}).encode(), [1])
    ends = [{"i": "-" + "f" * 1_500_000}, {"i": "f" * 1_500_000}, {"i": "f" * 700_000}]
    assert not code._same_result(json.dumps({"r": ends}).encode(), [1])


@needs_bubblewrap
@pytest.mark.parametrize(
    "program",
    [
        "print(1)\nexit()",
        "import sys\nprint(1)\nsys.stdout.close()",
        "import sys\nsys.__stdout__.write('1')",
        "out = open(1, 'w')\nout.write('1')",
        "class A:\n  def __del__(self): print(1)\na = A()",
        "import io, sys\nout = sys.stdout\nsys.stdout = io.StringIO()\nprint(1)\nout.write(sys.stdout.getvalue())",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return f(n - 1) if n else 1\nprint(f(20_000))",
        pytest.param(
            "import sys\nsys.setrecursionlimit(10**6)\n"
            "@lru_cache(None)\ndef f(n): return f(n - 1) if n else 1\nprint(f(20_000))",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 12),
                reason="Python 3.12 limits recursion through C code",
            ),
        ),
        "import resource as r\nr.setrlimit(r.RLIMIT_STACK, (r.RLIM_INFINITY, r.RLIM_INFINITY))\nprint(1)",
        "\ufeffprint(1)",
    ],
)
def test_programs_may_end_and_recurse_as_they_are_used_to(program):
    assert _score(program, {"inputs": [""], "outputs": ["1"]}) == 1.0


@needs_bubblewrap
def test_standard_input_and_output():
    tests = {"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}
    program = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
    assert _score(program, tests) == 1.0
    assert _score("print(3)", tests) == 0.0
    assert _score("print(3)", tests, partial_credit=True) == 0.5
    assert _score(program + "\nraise ValueError", tests) == 0.0


@needs_bubblewrap
def test_functions():
    program = (
        "class Solution:\n    def twoSum(self, a: List[int], t: int) -> List[int]:\n        return (0, len(a) - t)"
    )
    lines = {"fn_name": "twoSum", "inputs": ["[1, 2, 3]\n2"], "outputs": ["[0, 1]"]}
    assert _score(program, lines) == 1.0
    assert _score(program, {"fn_name": "twoSum", "inputs": [[[1, 2, 3], 2]], "outputs": [[[0, 1]]]}) == 1.0
    assert _score(program, {"fn_name": "twoSum", "inputs": [[[1, 2, 3], 2]], "outputs": [[0, 2]]}) == 0.0
    # The first element does not count as the list.
    assert _score("def f(x): return 0", {"fn_name": "f", "inputs": ["1"], "outputs": ["[0, 1]"]}) == 0.0
    assert _score("def f(x): return True", {"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}) == 0.0
    assert _score("def f(x): return 'ab'", {"fn_name": "f", "inputs": [["x"]], "outputs": ["ab"]}) == 1.0
    assert _score("def f(d): return d[1]", {"fn_name": "f", "inputs": ['{"1": 5}'], "outputs": ["5"]}) == 1.0
    assert _score("def g(x): return 1", {"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}) == 0.0


@needs_bubblewrap
@pytest.mark.parametrize(
    ("returned", "outputs", "score"),
    [
        # An expected text is read as JSON.
        ("x", ["5", "7"], 1.0),
        ("str(x)", ["5", "7"], 0.0),
        ("x", ["[5]", "[7]"], 0.0),
        ("[x]", ["[5]", "[7]"], 1.0),
        ("str(x)", ['"5"', '"7"'], 1.0),
        ("'a' * x", ["aaaaa", "aaaaaaa"], 1.0),
        # In the data set's own list, a list of one element may stand for that element.
        ("x", [[5], [7]], 1.0),
        ("[x]", [[5], [7]], 1.0),
        ("str(x)", [["5"], ["7"]], 1.0),
        ("str(x)", [[5], [7]], 0.0),
        # Numbers are equal as in Python, but truth values are not numbers.
        ("x * 1.0", ["5", "7"], 1.0),
        ("x + 1e-9", ["5", "7"], 0.0),
        ("x + 1e-9", ["5.0", "7.0"], 1.0),
        ("x + 1e-9", [5.0, 7.0], 1.0),
        ("[x + 1e-9, x]", ["[5.0, 5]", "[7.0, 7]"], 1.0),
        ("[x, x + 1e-9]", ["[5.0, 5]", "[7.0, 7]"], 0.0),
        ("str(x + 1e-9)", ['"5.0"', '"7.0"'], 0.0),
        ("10**7 + 1", ["10000000.0", "10000000.0"], 0.0),
        ("float(2**53)", [2**53 + 1, 2**53 + 1], 0.0),
        ("10**400", ["1.5", "1.5"], 0.0),
        # Truth values, numbers and texts never equal each other.
        ("x > 0", ["true", "true"], 1.0),
        ("x > 0", ["True", "True"], 1.0),
        ("x > 0", [True, True], 1.0),
        ("x > 0", ["1", "1"], 0.0),
        ("x > 0", ['"1"', '"1"'], 0.0),
        ("x > 0", ['"True"', '"True"'], 0.0),
        ("'True'", ["True", "True"], 0.0),
        ("1", ["true", "true"], 0.0),
        ("1", [True, True], 0.0),
        ("1", ['"1"', '"1"'], 0.0),
        ("'1'", ['"1"', '"1"'], 1.0),
        ("'1'", ["1", "1"], 0.0),
        ("None", ["null", "None"], 1.0),
        ("0", ["null", "null"], 0.0),
        ("0", ["false", "false"], 0.0),
        ("[True]", ["[1]", "[1]"], 0.0),
        ("{'a': 1}", ['{"a": true}', '{"a": true}'], 0.0),
        ("None", [[], []], 0.0),
        ("[x * 1.0]", ["[5]", "[7]"], 1.0),
        ("x", ["5.0", "7.0"], 1.0),
        ("x > 0", [1, 1], 0.0),
        ("x // x", ["true", "true"], 0.0),
        ("x / x", [True, True], 0.0),
        ("x > 0", ["1.0", "1.0"], 0.0),
        # An iterator does not equal a list in Python.
        ("iter([x])", ["[5]", "[7]"], 0.0),
    ],
)
def test_results_of_functions(returned, outputs, score):
    tests = {"fn_name": "f", "inputs": ["5", "7"], "outputs": outputs}
    assert _score(f"def f(x): return {returned}", tests) == score


@needs_bubblewrap
def test_asserts():
    tests = {
        "asserts": ["assert set(f([1, 1, 2])) == {1, 2}", "assert math.isclose(g(2), 1.41421, rel_tol=1e-4)"],
        "setup": "import math",
    }
    program = "def f(a): return sorted(set(a))\ndef g(x): return x ** 0.5"
    assert _score(program, tests, "mbpp") == 1.0
    assert _score(program.replace("0.5", "0.6"), tests, "mbpp") == 0.0
    assert _score(program.replace("0.5", "0.6"), tests, "mbpp", partial_credit=True) == 0.5


@needs_bubblewrap
def test_own_exceptions_are_seen_as_what_they_derive_from():
    program = "class Bad(ValueError): pass\ndef f(x): raise Bad"
    check = "try:\n    f(1)\nexcept ValueError:\n    pass"
    assert _score(program, {"asserts": [check]}, "mbpp") == 1.0
    assert _score(program, {"asserts": [check.replace("ValueError", "KeyError")]}, "mbpp") == 0.0


@needs_bubblewrap
def test_response_may_be_the_body_alone():
    tests = {"prompt": "def f(x):\n    'Twice x.'\n", "test": "def check(c):\n    assert c(2) == 4", "entry_point": "f"}
    assert _score("    return 2 * x", tests, "openai_humaneval") == 1.0
    assert _score("    return 3 * x", tests, "openai_humaneval") == 0.0


@needs_bubblewrap
def test_helpers_of_the_data_set_are_its_own():
    prompt = "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\ndef root(xs):\n    'A root.'\n"
    test = "def check(candidate):\n    assert abs(poly([1, 1], candidate([1, 1]))) < 1e-6"
    tests = {"prompt": prompt, "test": test, "entry_point": "root"}
    assert _score("def root(xs): return -1", tests, "openai_humaneval") == 1.0
    assert _score("def root(xs): return 0 * poly(xs, 1) - 1", tests, "openai_humaneval") == 1.0
    assert _score("def poly(xs, x): return 0\ndef root(xs): return 5", tests, "openai_humaneval") == 0.0


@pytest.mark.parametrize(
    "truth",
    [
        *("{}", "[]", "true", "1", '"1"', "null", '{"inputs": [1]}', '{"test": "x"}', "no json", "[" * 100_000, ""),
        *('{"inputs": ["", ""], "outputs": ["1"]}', '{"inputs": [], "outputs": []}', '{"inputs": "1", "outputs": "1"}'),
        *(
            '{"asserts": []}',
            '{"asserts": "assert f()"}',
            '{"asserts": [1]}',
            '{"asserts": ["assert f()"], "setup": 1}',
        ),
        *('{"test": null, "entry_point": "f"}', '{"test": "def check(c): pass", "entry_point": 1}'),
        *('[{"input": "1"}]', '[{"input": "1", "output": "1", "metadata": "no json"}]'),
        '[{"input": "1", "output": "1"}, {"input": [1], "output": 1, "fn_name": "f"}]',
        None,
        3,
    ],
)
def test_tests_that_cannot_be_read_are_one_kind_of_error(truth):
    # compute_score gives such a row 0 and counts it as ungradable.
    with pytest.raises(ValueError):  # noqa: PT011
        code.score(_block("print(1)"), truth)
    assert compute_score("taco", _block("print(1)"), truth)["ungradable"] == 1.0


@needs_bubblewrap
@pytest.mark.parametrize(
    ("given", "body", "score"),
    [
        ("ab", "a == ('ab',)", 1.0),
        ("ab\ncd", "a == ('ab', 'cd')", 1.0),
        ("ab\n[1]", "a == ('ab', [1])", 1.0),
        ("[\n1,\n2\n]", "a == ([1, 2],)", 1.0),
        ("True\nNone", "a == (True, None)", 1.0),
        ('"1"\n1', "a == ('1', 1)", 1.0),
        ("", "a == ()", 1.0),
        (7, "a == (7,)", 1.0),
    ],
)
def test_inputs_that_are_not_json_are_texts(given, body, score):
    tests = {"fn_name": "f", "inputs": [given], "outputs": ["true"]}
    assert _score(f"def f(*a): return {body}", tests) == score


@needs_bubblewrap
def test_tests_one_by_one():
    pairs = [{"input": "1", "output": "2", "testtype": "stdin"}, {"input": "2", "output": "3"}]
    assert _score("print(int(input()) + 1)", pairs) == 1.0
    assert _score("print(2)", pairs) == 0.0
    named = [{"input": "1", "output": "2", "metadata": {"func_name": "f"}}]
    assert _score("def f(x): return x + 1", named) == 1.0


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "check", "score"),
    [
        # Names from Python's library are the checker's own, even if the program defines them.
        ("def isclose(*a, **k): return True\ndef f(x): return 0", "assert isclose(f(1), 3)", 0.0),
        ("def f(x): return 3.0", "assert isclose(f(1), 3)", 1.0),
        ("def Counter(x): return 1\ndef f(x): return x", "assert Counter(f('ab')) == Counter('ba')", 1.0),
        ("def Counter(x): return 1\ndef f(x): return 'x'", "assert Counter(f('ab')) == Counter('ba')", 0.0),
        ("def deepcopy(x): return 1\ndef f(x): return 5", "assert deepcopy(f(1)) == deepcopy([1])", 0.0),
        # But if the check calls nothing else, the program's definition is what is tested.
        ("def gcd(a, b): return 2", "assert gcd(4, 6) == 2", 1.0),
        ("def gcd(a, b): return 1", "assert gcd(4, 6) == 2", 0.0),
        ("def f(x): return 1", "assert gcd(4, 6) == 2", 0.0),
        ("from array import array\ndef f(): return array('i', [1, 2])", "assert list(f()) == [1, 2]", 1.0),
        ("from array import array\ndef f(): return array('i', [1, 2])", "assert f() == (1, 2)", 0.0),
    ],
)
def test_checks_use_their_own_library(program, check, score):
    assert _score(program, {"asserts": [check]}, "mbpp") == score


# --- SandboxFusion -----------------------------------------------------------------------------------------------

URL = "http://host:8080/run_code"
FUSION = {"sandbox_fusion_url": URL, "test_timeout": 100.0}  # these tests are not about time


@pytest.fixture
def fusion(monkeypatch):
    """A stand-in for the server, below verl's client: it runs each request. Returns the list of requests."""
    import requests

    asked = []

    def post(url, *, data, **_):
        request = json.loads(data)
        asked.append((url, request))
        command = [sys.executable, "-I", "-c", request["code"]]
        try:
            run = subprocess.run(
                command, input=request["stdin"].encode(), capture_output=True, timeout=request["run_timeout"]
            )
            result = {"status": "Finished", "return_code": run.returncode, "stdout": run.stdout.decode()}
        except subprocess.TimeoutExpired:
            result = {"status": "TimeLimitExceeded", "return_code": None, "stdout": ""}
        response = requests.Response()
        response.status_code = 200
        well = result["return_code"] == 0
        response._content = json.dumps({"status": "Success" if well else "Failed", "run_result": result}).encode()
        return response

    monkeypatch.setattr(requests, "post", post)
    return asked


F = "def f(x, y=0):\n    return "


@pytest.mark.parametrize(
    ("program", "tests", "score"),
    [
        (F + "x + y", {"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]}, 1.0),
        (F + "x - y", {"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]}, 0.0),
        (F + "'ab'", {"fn_name": "f", "inputs": ["1"], "outputs": ['"ab"']}, 1.0),
        (F + "[x, x]", {"fn_name": "f", "inputs": ["1\n"], "outputs": ["[1,1]"]}, 1.0),
        (F + "(x[1], print(x))", {"fn_name": "f", "inputs": ['{"1": 5}\n\n'], "outputs": ["[5, null]"]}, 1.0),
        (F + "str(x)", {"fn_name": "f", "inputs": ["5"], "outputs": ["5"]}, 0.0),
        (F + "print(5)", {"fn_name": "f", "inputs": ["5"], "outputs": ["5"]}, 0.0),
        ("print(5)\nexit()", {"fn_name": "f", "inputs": ["5"], "outputs": ["5"]}, 0.0),
        (
            "from __future__ import annotations\nclass Solution:\n    def f(self, a: List[int]): return Counter(a)[2]\n"
            "if __name__ == '__main__':\n    print(input())",
            {"fn_name": "f", "inputs": [[[2, 2]]], "outputs": [2]},
            1.0,
        ),
        ("print(3)", {"inputs": ["", ""], "outputs": ["3 \n", "3"]}, 1.0),
        ("print(3)", {"inputs": ["", ""], "outputs": ["3", "4"]}, 0.0),
        ("print(1/3)", {"inputs": [""], "outputs": ["0.3333333333"]}, 1.0),
        ("a = input()\nb = input()\nprint(a + b, 'é```')", {"inputs": [["3", "4"]], "outputs": ["34 é```"]}, 1.0),
        (
            "@lru_cache\ndef f(n): return n\nif __name__ == '__main__':\n    print(f(int(input())))\n    exit()",
            {"inputs": ["7\n"], "outputs": ["7"]},
            1.0,
        ),
        (F + "x", {"asserts": ["assert f(1) == 1", "assert math.isclose(f(2), 2)"], "setup": ["import math"]}, 1.0),
        (F + "x", {"asserts": ["assert f(1) == 1", "assert f(2) == 1"]}, 0.0),
        (F + "x\nexit()", {"asserts": ["assert f(1) == 2"]}, 0.0),
        ("    return 2 * x", {"prompt": "def f(x):\n    'Twice.'\n", "test": "def check(c): assert c(2) == 4"}, 1.0),
        ("    return x", {"prompt": "def f(x):\n    'Twice.'\n", "test": "def check(c): assert c(2) == 4"}, 0.0),
    ],
)
def test_sandbox_fusion_grades_as_the_local_sandbox_does(fusion, program, tests, score):
    tests = tests | ({"entry_point": "f"} if "test" in tests else {})
    assert _score(program, tests, **FUSION) == score
    assert {url for url, _ in fusion} == {URL}
    assert len(fusion) == len(tests.get("inputs") or tests.get("asserts") or [1])
    assert _score(program, tests, unsafe_without_sandbox=True, test_timeout=100.0, program_timeout=100.0) == score


def test_sandbox_fusion_gives_partial_credit(fusion):
    tests = {"inputs": ["1", "2"], "outputs": ["1", "1"]}
    assert _score("print(input())", tests, partial_credit=True, **FUSION) == 0.5
    tests = {"asserts": ["assert f(1) == 1", "assert f(2) == 1"]}
    assert _score(F + "x", tests, partial_credit=True, **FUSION) == 0.5


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("print(2)", "wrong answer"),
        ("1 / 0", "exception"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("x = '\0'", "does not compile: too long, or with null characters"),
    ],
)
def test_sandbox_fusion_says_why(fusion, program, error):
    truth = json.dumps({"inputs": [""], "outputs": ["1"]})
    options = FUSION | ({"test_timeout": 0.5} if error == "timeout" else {})
    scored = compute_score("taco", _block(program), truth, **options)
    assert (scored["score"], scored["error"], scored["timeout"]) == (0.0, error, float(error == "timeout"))


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (404, "{}"),
        (500, "out of memory"),
        (200, "no json"),
        (200, "{}"),
        (200, '{"status": "SandboxError", "message": "no disk"}'),
        (200, '{"status": "Failed"}'),
        (200, '{"status": "Success"}'),
        (200, '{"status": "Asleep"}'),
    ],
)
@pytest.mark.parametrize("tests", [{"inputs": [""], "outputs": ["1"]}, {"asserts": ["assert True"]}])
def test_a_broken_sandbox_fusion_is_an_error_not_a_score(monkeypatch, status, answer, tests):
    import requests

    response = requests.Response()
    response.status_code, response._content = status, answer.encode()
    monkeypatch.setattr(requests, "post", lambda *_, **__: response)
    with pytest.raises(SandboxError, match="host:8080"):
        _score("print(1)", tests, **FUSION)


def test_no_sandbox_fusion_at_all_is_an_error_not_a_score():
    with pytest.raises(SandboxError, match="refused"):
        _score("print(1)", {"inputs": [""], "outputs": ["1"]}, sandbox_fusion_url="http://127.0.0.1:9/run_code")


def test_every_row_has_the_same_columns(monkeypatch):
    monkeypatch.setattr(code, "grade", lambda *_, **__: Verdict(1, 1))
    options = {"partial_credit": True, "format_reward": 0.1}
    for source, response, truth in (
        ("taco", _block("pass"), '{"inputs": [""], "outputs": [""]}'),
        ("taco", "nothing", '{"inputs": [""], "outputs": [""]}'),
        ("openai/gsm8k", "#### 1", "1"),
        ("aime24", "nothing", "1"),
    ):
        assert compute_score(source, response, truth, **options).keys() == COLUMNS.keys()


@needs_bubblewrap
@settings(max_examples=15, deadline=None)
@given(st.text(max_size=100), st.sampled_from(["inputs", "asserts"]))
def test_any_text_gets_a_bounded_score(text, form):
    tests = {"inputs": {"inputs": [""], "outputs": ["42"]}, "asserts": {"asserts": ["assert f() == 42"]}}[form]
    for response in (text, _block(text)):
        assert compute_score("taco", response, json.dumps(tests), test_timeout=2.0)["score"] == 0.0


# --- real rows ---------------------------------------------------------------------------------------------------

# Objects of the program's own classes, and others that are not plain data, are not passed to the checker.
REFUSED = {"in-place (LeetCode) no return", "mbpp class", "mbpp class as arg", "mbpp re match", "mbpp defaultdict get"}


@needs_bubblewrap
def test_public_reports():
    cases = SHARED.parent / "cases" / "judge.jsonl"
    if not cases.is_file():
        pytest.skip(f"needs the cases of {cases} (VERL_SSPO_SHARED_DATA)")
    rows = [row for row in map(json.loads, cases.read_text().splitlines()) if row["kind"] == "code"]
    # Python 3.12 limits recursion through C code.
    refused = REFUSED | ({"cpython#112215 recursion"} if sys.version_info >= (3, 12) else set())
    for row in rows:
        endless = "while" in row["response"] or row["source"] == "hack hash flood"
        options = {"test_timeout": 3.0} if endless else {"test_timeout": 60.0, "program_timeout": 90.0}
        try:
            scored = code.score(row["response"], row["gold"], **options)
        except ValueError as error:
            scored = {"score": 0.0, "error": str(error)}
        assert scored.get("score", 0.0) == (row["right"] and row["source"] not in refused), (row, scored)
    assert len(rows) > 90


def _mutants(row):
    """Programs that must fail: one without a body, and one with wrong results."""
    name = row["entry_point"]
    whole = row["prompt"] + row["canonical_solution"]
    yield row["prompt"] + "    pass\n"
    yield whole + f"\n\n_right = {name}\ndef {name}(*a):\n    r = _right(*a)\n    return OFF\n".replace(
        "OFF",
        "not r if r is True or r is False else r + 1 if isinstance(r, (int, float)) else r + 'x' if isinstance(r, str) "
        "else r[:-1] if r else [0] if isinstance(r, list) else 0",
    )


@needs_bubblewrap
@pytest.mark.parametrize("with_prompt", [True, False])
def test_humaneval_canonical_solutions_pass_and_mutants_fail(with_prompt):
    for line in (FIXTURES / "humaneval.jsonl").read_text().splitlines():
        row = json.loads(line)
        tests = {"test": row["test"], "entry_point": row["entry_point"]}
        tests |= {"prompt": row["prompt"]} if with_prompt else {}
        assert _score(row["prompt"] + row["canonical_solution"], tests, "openai_humaneval") == 1.0, row["task_id"]
        for mutant in _mutants(row):
            assert _score(mutant, tests, "openai_humaneval") == 0.0, (row["task_id"], mutant)
