"""Rewards: any response gets a score in bounded time, and an answer is found in any noise."""

import json
import re
import time

from hypothesis import strategies as st

from properties import Property
from verl_sspo.rewards import COLUMNS, compute_score
from verl_sspo.rewards.answers import is_equal
from verl_sspo.rewards.code import extract_program, same_output, tests_of

# Pieces of answers, as models and data sets write them.
_WORDS = r"""
    \boxed{ \boxed \fbox{ \framebox{ <answer> </answer> <think> </think> #### ##### { } ( ) [ ] \{ \} \left( \right)
    \frac{ \frac12 \dfrac \sqrt \sqrt[3]{ \text{ \mathrm{ \begin{pmatrix} \end{pmatrix} \begin{ \end{ & \\ \cup \pm
    \mp \emptyset \infty \pi \in \le \mid \dots ... \% % $ $$ \$ \( \) \[ \] ^ _ ^\circ ^{10} _8 _{10} = == < > + - *
    / , ; : . \times \cdot \overline{ \binom{ ! | ~ 0 1 2 3 10 007 1,000 0.5 .5 5. 1e5 1e999 9^9 x y a e i pi and or
    cm inches dollars million − × ½ ² ° π € <|im_end|> ``` ```python ~~~ def return print( # ' " \x \0 \
"""
_SIGNS = (" ", "\n", "\t", "\r\n", "\u2028", "\x00", "\ufeff", "\ud800", "\u0660", "\u00b2")
PIECES = st.sampled_from((*_WORDS.split(), *_SIGNS))
TEXT = st.lists(PIECES | st.text(max_size=4), max_size=30).map("".join)
# A few pieces, repeated many times: this makes parsers slow.
LONG = st.lists(st.tuples(TEXT, st.integers(1, 2000)), min_size=1, max_size=3).map(
    lambda parts: "".join((piece * times)[:20_000] for piece, times in parts)
)
GOLDS = st.sampled_from(
    ("72", "-3", "1,000", "0.5", r"\frac{3}{4}", r"(1,2)", r"\{1,2\}", r"2\sqrt{3}", "x^2+1", "C", r"\text{Evelyn}")
)
NUMBERS = st.integers(-(10**9), 10**9)
# Seconds of processor time that this thread may need for one response. Child processes have their own time limit.
SECONDS = 3.0


def get_a_score(response: str, gold: str, options: dict) -> None:
    """Mathematics: any response has a score in [0, 1] in bounded time."""
    for source in ("openai/gsm8k", "HuggingFaceH4/MATH-500"):
        for text in (response, rf"\boxed{{{response}}}"):
            started = time.thread_time()
            scored = compute_score(source, text, gold, **options)
            assert time.thread_time() - started < SECONDS
            assert scored.keys() == COLUMNS.keys()
            assert 0.0 <= scored["score"] <= 1.0 + options.get("format_reward", 0.0)
            assert scored["acc"] in (0.0, 1.0)


def find_the_answer(before: str, gold: str, after: str) -> None:
    """Mathematics: the last answer outside the thinking counts, whatever is around it."""
    before, after = re.sub("think", "", before), re.sub("box|answer|####|think", "", after)
    for form in (rf"\boxed{{{gold}}}", rf"<answer>{gold}</answer>", rf"<answer>so \boxed{{{gold}}}</answer>"):
        scored = compute_score("HuggingFaceH4/MATH-500", f"{before}\nSo {form}\n{after}", gold)
        assert scored["score"] == 1.0, form


def find_the_number(before: str, number: int, after: str) -> None:
    """In gsm8k the number after the last #### counts, in arithmetic the last number."""
    before, after = re.sub("think", "", before), re.sub("box|answer|####|think", "", after)
    assert compute_score("openai/gsm8k", f"{before}\n#### {number:,}\n{after}", str(number))["score"] == 1.0
    no_digits = re.sub("[0-9]", "", after)
    text = f"{before} {abs(number)} {no_digits}"
    assert compute_score("arithmetic", text, str(abs(number)))["score"] == 1.0
    assert compute_score("arithmetic", text, str(abs(number) + 1))["score"] == 0.0


def keep_the_sign(letters: str, rest: str) -> None:
    """Mathematics: an answer with the opposite sign is wrong, whatever its letters and the words after it."""
    for form in (letters, rf"\frac{{{letters}}}{{2a}}", rf"2^{{{letters}}}"):
        answer, opposite = f"{form}{rest}", f"-{form}{rest}"
        assert not is_equal(answer, opposite), answer
        assert not is_equal(opposite, answer), answer


def find_the_program(before: str, program: str, after: str) -> None:
    """Code: the Python block is found in any text, in bounded time."""
    started = time.thread_time()
    extract_program(before)
    assert time.thread_time() - started < SECONDS
    before, program, after = (re.sub("`{3,}|~{3,}|think>", "", text) for text in (before, program, after))
    program = f"x = 1\n{program}"
    found = extract_program(f"{before}\n```python\n{program}\n```\n{after}")
    assert found == f"{program}\n"


def compare_outputs(output: bytes, expected: str, floats: bool) -> None:
    """Code: any output is compared in bounded time, and the expected output is right."""
    started = time.thread_time()
    same_output(output, expected, floats)
    assert time.thread_time() - started < SECONDS
    written = expected.encode(errors="replace")
    assert same_output(written, written.decode(), floats)


def read_the_tests(truth: str) -> None:
    """Code: any ground truth gives tests in one of three forms, or a ValueError."""
    try:
        tests = tests_of(truth)
    except ValueError:
        return
    assert len(tests.get("inputs", [])) == len(tests.get("outputs", []))
    assert tests_of(json.dumps(tests)) == tests


# Ground truths of programming tasks: valid keys, with valid and invalid values.
_VALUES = st.none() | st.booleans() | st.integers() | st.sampled_from(["f", "", "\0", "assert f()", "{}"])
_LISTS = st.lists(_VALUES | st.lists(_VALUES, max_size=2), max_size=3)
_KEYS = ("inputs", "outputs", "fn_name", "test", "entry_point", "prompt", "asserts", "setup", "input", "output")
_TEST = st.dictionaries(st.sampled_from((*_KEYS, "metadata")), _VALUES | _LISTS, max_size=5)
TESTS = _TEST | st.lists(_TEST, max_size=3)
CASES = {
    "mbpp": {"asserts": ["assert f(1) == 2"]},
    "openai_humaneval": {"entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == 2"},
    "apps": {"inputs": ["1\n"], "outputs": ["2\n"]},
    "taco": {"fn_name": "f", "inputs": [[1]], "outputs": [2]},
}
# Lines of programs that never give the answer.
LINES = st.sampled_from(
    (
        *("def f(x):", "    return 3", "    return x", "    yield x", "    f(x)", "class f:", "    pass", "exit()"),
        *("print(0)", "import os, sys", "sys.exit(0)", "os._exit(0)", "os.close(1)", "raise BaseException"),
        *("input()", "print('\\0' * 9)", "print(2, file=open('x', 'w'))", "while 1: pass", "f = None", "f = 'ü'", "#"),
        *("sys.stdout.buffer.write(b'\\xff')", "open('/etc/passwd').read()", "lambda: (", "'''", "del f", "\\"),
    )
)  # fmt: skip


def run_in_the_sandbox(lines: list[str], odd: str, source: str) -> None:
    """Code: any program is graded, and one that does not know the answer does not pass."""
    program = "\n".join([*lines, odd.replace("2", "")])
    scored = compute_score(
        source,
        f"```python\n{program}\n```",
        json.dumps(CASES[source]),
        test_timeout=2.0,
        program_timeout=4.0,
        memory_mb=256,
    )
    assert scored.keys() == COLUMNS.keys()
    assert scored["score"] == 0.0, scored


PROPERTIES = {
    "rewards.score": Property(
        get_a_score,
        {
            "response": TEXT | LONG,
            "gold": GOLDS | TEXT,
            "options": st.sampled_from(({}, {"format_reward": 0.5})),
        },
        examples=50,
    ),
    "rewards.answer": Property(find_the_answer, {"before": TEXT | LONG, "gold": GOLDS, "after": TEXT}),
    "rewards.number": Property(find_the_number, {"before": TEXT | LONG, "number": NUMBERS, "after": TEXT}),
    "rewards.sign": Property(
        keep_the_sign,
        {
            "letters": st.text("abcdeikmnrstxyzABCGMR", min_size=1, max_size=6),
            "rest": st.sampled_from(
                ("", "+1", r"\text{ cm}", r" \text{ for all } n", r" \text{ (double root)}", r"\pi")
            ),
        },
    ),
    "rewards.program": Property(find_the_program, {"before": TEXT | LONG, "program": TEXT, "after": TEXT}),
    "rewards.output": Property(
        compare_outputs,
        {
            "output": st.binary(max_size=200) | LONG.map(lambda s: s.encode(errors="replace")),
            "expected": TEXT | LONG,
            "floats": st.booleans(),
        },
    ),
    "rewards.tests": Property(read_the_tests, {"truth": TEXT | TESTS.map(json.dumps)}),
    "rewards.sandbox": Property(
        run_in_the_sandbox,
        {"lines": st.lists(LINES, max_size=6), "odd": TEXT, "source": st.sampled_from(sorted(CASES))},
        examples=5,
        program="bwrap",
    ),
}
