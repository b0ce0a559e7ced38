"""Equal answers count in any form. Different answers never do."""

import json
import os
import string
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_sspo.rewards import COLUMNS, compute_score
from verl_sspo.rewards.answers import SECONDS, is_equal
from verl_sspo.rewards.mathematics import extract_answer, has_tags, score

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("VERL_SSPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
JUDGED = SHARED.parent / "cases" / "judge.jsonl"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data in {SHARED} (VERL_SSPO_SHARED_DATA)")
MATH = "HuggingFaceH4/MATH-500"


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _accepts(gold, answer):
    return compute_score(MATH, rf"So it is \boxed{{{answer}}}.", gold)["acc"] == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 72", "72"),
        ("#### 1\n#### 2", "2"),
        (r"\boxed{1}, so \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}.", r"\{1, \{2\}\}"),
        (r"\boxed 7 is it", "7"),
        (r"\fbox{3}", "3"),
        ("<answer> 5 </answer>", "5"),
        (r"<think>\boxed{1}</think><answer>so \boxed{5}</answer>", "5"),
        (r"<answer>4</answer> no, \boxed{5}", "5"),
        (r"\boxed{5}" + "\n#### Conclusion", "5"),
        (r"\boxed{5}" + "\n#### 6", "6"),
        ("#### Step 1\n no answer", "Step 1"),
        (r"\boxed{1} \boxed{never closed", "1"),
        ("no answer at all 5", None),
        ("", None),
        (r"\boxed{", None),
        (r"\boxedanswer{5}", None),
        (r"\boxed{42}" + "\n#### 2. Verification", "42"),
        (r"\boxed{42}" + "\n#### 2.5 hours", "2.5 hours"),
        (r"\boxed{5}. Answer format: \boxed{}", "5"),
        (r"\boxed{5}. Answer format: \boxed{ }", "5"),
        (r"<think>\boxed{5}</think> It is 5.", None),
        (r"<think>It is \boxed{5}, but", None),
        (r"It is \boxed{4}</think> \boxed{5}", "5"),
        (r"\boxed{4} or \boxed{5}", "4, 5"),
        (r"$\boxed{4}$ and $\boxed{5}$", "4, 5"),
        (r"\boxed{4} / \boxed{5}", "4, 5"),
        (r"\boxed{4} and \boxed{4}", "4"),
        (r"\boxed{4}. No: \boxed{5}", "5"),
        (r"\boxed{1 + \boxed{5}}", "1 + {5}"),
        (r"\boxed{}", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


EQUAL = [
    # numbers
    ("5", "5"), ("70000", "70,000"), ("70000", "$70,000.00"), ("1{,}234", "1234"), ("1,234", r"1\,234"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"), (r"\$32,\!348", "32348"), (r"137 \frac{1}{2}", "137.5"),
    ("33", "033"), ("12", "12.0"), ("-3", "−3"), ("10^{10}", "10000000000"), (r"3\times 10^5", "300000"),
    (r"\frac{1}{2}", "0.5"), (r"\frac12", r"\dfrac{1}{2}"), (r"1\frac{1}{2}", "1.5"), ("1 1/2", r"\frac32"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"0.\overline{3}", "1/3"), ("7/2", "3 1/2"), ("$5$", "5."),
    # percent, degrees, money, units
    (r"50\%", "50"), (r"50\%", "0.5"), ("50", r"50\%"), ("0.5", "50%"), (r"90^\circ", "90"), ("90", r"90^{\circ}"),
    ("18", "18 dollars"), (r"\$1,000", "1000"), (r"5\text{ cm}", "5"), (r"10\text{ inches}", "10 in"),
    (r"5\text{ cm}^2", r"5\text{ square centimeters}"), (r"\frac{9}{2}", r"4.5\text{ hours}"),
    ("1 000", "1000"), ("5", "2+3=5"), (r"5\text{ cm}^3", r"5\text{ cubic centimeters}"),
    (r"2\sqrt{2}\text{ units}", r"2\sqrt2"), (r"12\pi \text{ square inches}", r"12\pi\text{ in}^2"),
    (r"\frac{\pi}{3}", r"60^\circ"), (r"15\mbox{ cm}^2", "15"),
    # words and choices, times and ratios
    ("7:00 p.m.", r"7:00 \text{ p.m.}"), ("1:2", "1 : 2"),
    (r"\text{Evelyn}", "Evelyn"), (r"\text{(C)}", "C"), ("C", "(C)"), (r"\text{(C)}", r"\textbf{(C)}"),
    (r"\text{even}", r"\text{Even}"),
    # named values
    ("x=5", "5"), ("5", "x = 5"), ("2x+1", "y=2x+1"), ("y=2x+1", "2x+1=y"),
    # tuples, intervals, sets, lists, matrices
    ("(1,2)", r"\left(1, 2\right)"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"), (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", "2, 1"), ("1,2", r"2 \text{ and } 1"), ("x=1,x=2", "1,2"), ("[0,1)", r"\left[0,1\right)"),
    (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty) \cup (-\infty,0)"), (r"\emptyset", r"\{\}"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\begin{pmatrix}1\\ \frac12\end{pmatrix}", r"\begin{bmatrix} 1 \\ 0.5 \end{bmatrix}"),
    (r"\pm 3", "-3, 3"), (r"x \in [-2,7]", "[-2,7]"), ("0,1,-1", "-1,0,1"),
    # bases
    ("52_8", "52_{8}"), (r"1010_{\text{two}}", "1010_2"),
    # formulas
    (r"\sqrt{12}", r"2\sqrt3"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("x^2+2x+1", "(x+1)^2"),
    (r"\pi", "π"), ("6+9i", "9i+6"), (r"\frac{3}{4}x", "0.75x"), (r"11\sqrt2", r"\sqrt{242}"), ("2^{10}", "1024"),
    ("5!", "120"), (r"\binom{5}{2}", "10"), (r"\log_2 8", "3"), (r"x \le 3", r"3 \ge x"),
    ("(x+1)(x+2)", "(x+2)(x+1)"),
    # products of letters
    ("xyz-1", "-1+xyz"), ("abc", "cba"), (r"\frac{GMm}{r}", "GMm/r"), (r"-\frac{GMm}{2a}", "-GMm/(2a)"),
    ("3abc", "3cba"), ("2xy", "2yx"), ("sin(2x)", r"\sin 2x"), ("2sqrt(3)", r"2\sqrt3"), ("4abc+1", "1+4cab"),
    ("x(x+1)", "x^2+x"),
    # words
    ("east-west", r"\text{east west}"), ("Yes", "yes"), ("yes", r"\text{Yes}"), ("A, B", "B, A"),
    ("no solution", "No solution."),
    (r"\text{Monday}", "monday"), ("7:00 PM", r"7:00\text{ p.m.}"),
    ("x=1 \\text{ (double root)}", r"x = 1\text{ (Double root)}"),
    (r"n\pi \text{ for integer } n", r"n \pi\text{ for integer }n"),
    (r"\begin{cases}-x&x<0\\x&x\ge0\end{cases}", r"\begin{cases} -x, & x < 0 \\ x, & 0\le x \end{cases}"),
    (r"f(x)=\begin{cases}-x&x<0\\x&x\ge0\end{cases}", r"\begin{cases} -x, & x < 0 \\ x, & x\ge 0 \end{cases}"),
    # complex numbers
    (r"\frac{3}{2}i", r"\frac{3i}{2}"), (r"\frac15+\frac35 i", r"\frac{1+3i}{5}"), (r"2+2i\sqrt3", r"2+2\sqrt3i"),
    (r"3\sqrt2 i", r"3i\sqrt2"), ("2+2i", "2(1+i)"), ("6-5i", "6+(-5)i"), ("-i", "-1i"), ("3-4i", "(2-i)^2"),
    (r"\frac{3}{2}\mathrm{i}", r"\frac{3i}{2}"), ("i(1+i)", "i-1"), (r"e^{i\pi/2}", "i"), ("z=3i+1", "1+3i"),
    (r"\sum_{i=1}^n i", r"\sum_{i=1}^{n} i"), ("a_i+1", "1+a_i"),
    ("z^2=2+2i", "z^2=2(1+i)"), (r"1\le i\le n", r"1 \leq i \leq n"), ("x<i+1", "x<1+i"),
    # words around a number
    ("9", r"9 \text{ pairs of shoes}"), ("16", r"16 \text{ slices of pizza}"), ("10", r"10 \text{ pounds of food}"),
    ("5", r"5 \text{ cups of coffee and milk}"), ("7", r"7 \text{ trips to the store}"), ("21", "21 pages of the book"),
    ("30", r"30 \text{ times}"), ("12", r"\text{12 students}"), ("18", r"\text{The answer is } 18"),
    ("2", r"\text{Total} = 2"), ("18", "Answer: 18"), ("18", r"\text{The final answer is 18.}"), ("5", "5cm"),
    ("5", "5 km/h"), ("5", "5 oz"), ("12", "12 US dollars"), ("2", "2nd"), ("3", "3 lbs"), ("1", "1 day"),
    ("5", "5 cups"),
    # plus-minus
    (r"\{1\pm\sqrt5,-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"), (r"-2, 1\pm\sqrt5", r"\{1+\sqrt5,-2,1-\sqrt5\}"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}"),
    (r"x=1\pm\sqrt2, x=3", r"3, 1-\sqrt2, 1+\sqrt2"),
    (r"\pm1, \pm2", "1,-1,2,-2"), (r"(2, \pm 1)", "(2,1), (2,-1)"),
    # named tuples, and dollar signs in lists
    ("(1,2)", "(x,y)=(1,2)"), ("(a,b)=(1,1)", "(1,1)"), ("(x,y)=(1,2)", "(x, y) = (1, 2)"),
    ("(3,4)", r"(r,\theta) = (3,4)"),
    ("(x_1,x_2)=(1,2)", "(1,2)"), ("(1,2),(3,4)", "$(1,2)$, $(3,4)$"), (r"1,\{2,3\}", r"$\{3,2\}$ and $1$"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"A=\begin{pmatrix}1\\2\end{pmatrix}"), (r"x_1=5", "x_{1}=5"),
    ("(x,y)=(1,2), (x,y)=(3,4)", "(1,2), (3,4)"),
    # Markdown
    ("18", "**18**"), ("18", "`18`"), ("18", "**18**."), ("18", "**$18$**"), ("18", "**Answer: $18$**"),
]  # fmt: skip
DIFFERENT = [
    ("5", "6"), ("1", "-1"), ("10", "1,0"), ("1.5", "15"), ("18", "18.0001"), ("123", "1,23"), ("5", "55"),
    ("12", "1 2"), ("1,000", "1"), ("0.1", "0.10000000001"), ("1234", "1,2,3,4"), ("2", "2^2"), ("5^2", "52"),
    ("1/3", "0.333333"), (r"\sqrt2", "1.414214"), (r"\pi", "3.14"), (r"\pi", "3.141592653589793"),
    ("50", r"0.5\%"), (r"\$20", r"20\%"), (r"5\text{ cm}", r"5\text{ m}"), (r"12\text{ feet}", r"12\text{ inches}"),
    (r"\$5", r"5\text{ cents}"), ("5", "5 million"), ("5", "5x"), (r"5\text{ cm}", "5 m"), ("12 m", "12 cm"),
    ("(1+2t, 3t)", "(3,3)"), ("3x+2y+5c", "3x+2y+5"),
    ("3", r"3\pi"), ("6", "6i"),
    ("(1,2)", r"\{1,2\}"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[0,1)", "[0,1]"), ("(3,4)", "(3,4,5)"),
    ("1,2", "1,2,3"), ("1", "1,2"), (r"\{1\}", "2"), ("1,2", "x=1,y=2"), ("5", "5 or 6"), (r"1 \pm i", "1+i"),
    ("0", r"\emptyset"), (r"\infty", r"-\infty"), ("(0,1)", "0<x<1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    ("52_8", "52"), ("52_8", "52_9"), ("52_8", "42"),
    (r"\text{Evelyn}", "evenly"), (r"\text{(A)}", "B"), (r"\text{no solution}", "0"),
    (r"\text{north}", r"\text{thorn}"),
    ("x", "y"), ("2x", "2y"), ("x>3", r"x\ge 3"), ("y=2x", "y=2x+1"), ("a+b", "a-b"), (r"\frac{1}{x}", "x"),
    ("3R^2", "3r^2"), (r"12\pi\text{ cm}", r"12\pi\text{ m}"), (r"\text{no}\text{ solution}", r"\text{no}"),
    (r"\pm 3", "3"), (r"x \in [-2,7]", "[-2,7)"), (r"\text{A and B}", r"\text{A}"), ("2.5", "2,5"),
    ("6", "5=6"), ("0.5", r"0.5\%"), ("12 cm^2", "12 cm^3"), (r"12\text{ cm}", r"12\text{ cm}^2"),
    ("3:4", "3:5"), ("3", "3:4"), ("2:30", "2:45"), (r"10\text{ a.m.}", r"10\text{ p.m.}"), ("x", ""), ("", ""),
    # signs, brackets and case beside letters
    (r"-\frac{GMm}{2a}", r"\frac{GMm}{2a}"), ("-mgh", "mgh"), ("Ae^{-ktx}", "Ae^{ktx}"), ("3-abc", "3(abc)"),
    ("(abc)^2", "abc^2"), ("2:-3", "2:3"), (r"\frac{GM^2m}{r}", r"\frac{GMm^2}{r}"), ("-abcd", "abcd"),
    (r"\begin{cases}-x&x<0\\x&x\ge0\end{cases}", r"\begin{cases}x&x<0\\-x&x\ge0\end{cases}"),
    (r"f(x)=\begin{cases}-x&x<0\\x&x\ge0\end{cases}", r"f(x)=\begin{cases}x&x<0\\-x&x\ge0\end{cases}"),
    (r"\begin{cases}1\\2\end{cases}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"-\frac{\pi}{4}+n\pi \text{ for integer } n", r"\frac{\pi}{4}+n\pi \text{ for integer } n"),
    (r"x=-1 \text{ (double root)}", r"x=1 \text{ (double root)}"), (r"-1\text{ mod }5", r"1\text{ mod }5"),
    (r"2\operatorname{cis}(-30^\circ)", r"2\operatorname{cis}(30^\circ)"), ("2cis(-30)", "-2cis(30)"),
    (r"\{x: x\ge-2 \text{ and } x\ne3\}", r"\{x: x\ge 2 \text{ and } x\ne3\}"),
    (r"\frac{12}{3}n \text{ for any } n", r"\frac{1}{23}n \text{ for any } n"), ("all real numbers except 0", "0"),
    (r"1.5n\text{ for all }n", r"15n\text{ for all }n"), (r"R\text{ for } x>0", r"r\text{ for } x>0"),
    ("0", "not 0"), ("sin 2x", "2 sin x"), (r"\text{east}", "seat"), (r"\angle ABC", r"\angle BAC"),
    (r"-2\mathrm{i}", "2i"), ("2^{xyz}", "2xyz"),
    # letters beside a number
    ("2", "2xy"), ("3", "3abc"), ("3", "3ab/c"), ("2", "2x/y"), ("3", "3xyz^2"), ("5", "5 xy"), ("5", r"5\text{ if }n"),
    # complex numbers
    ("3+4i", "3-4i"), ("3+4i", "4+3i"), ("i", "-i"), ("i", "1"), ("i", "I"), ("3E", "3e"), ("z^2=3i", "z^2=4i"),
    ("zi=3i", "zi=4i"),
    ("x^2=-1", "x^2=-4"), ("x^2<-1", "x^2<-4"), ("x^2+i=3", "x^2+2i=3"), ("2xi=1", "3xi=1"),
    ("i^2", "1"), (r"3\mathrm{i}", "3"),
    # words around a number
    ("3", r"\frac{1}{2} \text{ of } 3"), (r"\frac{1}{2}", r"\frac{1}{2} \text{ of } x"), ("3", r"3 \text{ or } 5"),
    ("5", r"3 \text{ or } 5"),
    ("2", r"2 \text{ to } 3"), ("3", r"2 \text{ to } 3"), ("2", r"2 \text{ by } 3"), ("3", "3 or more"),
    ("3", r"3 \text{ or } x"),
    ("3", r"3 \text{ times } x"), ("3", r"3 \text{ times } 5"), ("2", "2 to the fifth"), ("6", r"6 \text{ over } \pi"),
    ("5", r"5 \text{ and a half}"), ("2", r"\text{Total} = 3"), (r"\text{Total}=2", r"\text{Rest}=2"),
    ("12", r"\text{13 students}"),
    ("1", r"\text{1 or 2}"), ("18", r"\text{The answer is } 81"), ("12", r"\text{not 12}"),
    # plus-minus, named tuples, lists
    (r"\{1\pm\sqrt5,-2\}", r"-2, 1+\sqrt5"), (r"\{1\pm\sqrt5,-2\}", r"2, 1+\sqrt5, 1-\sqrt5"), (r"\pm1,2", r"1, \pm 2"),
    (r"1\pm\sqrt2", r"\sqrt2\pm1"), ("(1,2)", "(x,y)=(2,1)"), ("(x,y)=(1,2)", "(y,x)=(1,2)"),
    ("(x,y)=(1,2)", r"\{1,2\}"),
    ("(1,2),(3,4)", "$(1,2)$, $(4,3)$"), ("(1,2),(3,4)", "1,2,3,4"), ("x=1", r"\{1,2\}"), ("18", "**19**"),
    ("18", "`18` or 19"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_answers_count_in_other_forms(gold, answer):
    assert is_equal(gold, answer)
    # Either one may be the gold answer.
    assert is_equal(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_never_count(gold, answer):
    assert not is_equal(gold, answer)
    assert not is_equal(answer, gold)


# --- judged responses --------------------------------------------------------------------------------------------


OWN = _rows(Path(__file__).with_name("answers.jsonl"))


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in OWN}))
def test_own_cases(kind):
    """Written before the grader was tried on them. `refused` marks right answers that the grader does not accept."""
    rows = [row for row in OWN if row["kind"] == kind]
    scores = [compute_score(row["data_source"], row["response"], row["gold"]) for row in rows]
    expected = [(float(row["right"] and "refused" not in row), 0.0) for row in rows]
    found = [(score["acc"], score["ungradable"]) for score in scores]
    assert [row for row, *each in zip(rows, expected, found, strict=True) if each[0] != each[1]] == []


@pytest.mark.skipif(not JUDGED.is_file(), reason=f"no judged cases in {JUDGED}")
def test_cases_from_public_reports():
    rows = [row for row in _rows(JUDGED) if row["kind"] == "math"]
    accepted = [compute_score(row["data_source"], row["response"], row["gold"])["acc"] == 1.0 for row in rows]
    wrong = [row for row, right in zip(rows, accepted, strict=True) if right and not row["right"]]
    refused = [row for row, right in zip(rows, accepted, strict=True) if row["right"] and not right]
    assert not wrong
    assert len(refused) <= 0.1 * sum(row["right"] for row in rows)


def _table(name):
    lines = (ROOT / "docs" / name).read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").replace(r"\|", "\0").split("|")]
        for line in lines
        if line[:3] == "| `"
    ]
    return [tuple(cell.strip("`").replace("\0", "|") for cell in row[:3]) for row in cells]


@pytest.mark.parametrize(("gold", "answer", "verdict"), _table("graders.md"))
def test_the_page_says_what_the_grader_does(gold, answer, verdict):
    assert _accepts(gold, answer) is {"right": True, "wrong": False}[verdict]


@pytest.mark.parametrize("letter", sorted(set(string.ascii_letters) - set("eiEI")))
def test_a_variable_is_no_unit(letter):
    # e and i are constants, and math-verify reads E and I as the same.
    assert not is_equal("3", f"3{letter}")
    assert not is_equal(f"x+2{letter}" if letter != "x" else "y+2x", "x+2")
    assert is_equal(f"2{letter}+1", f"1+2{letter}")


def test_score_of_answer_and_format():
    tagged = "<think>2 + 2</think>\n<answer>4</answer>"
    assert score(tagged, "4", format_reward=0.5)["score"] == 1.5
    assert score(r"\boxed{4}", "4", format_reward=0.5)["score"] == 1.0
    assert score(tagged, "5", format_reward=0.5)["score"] == 0.5
    assert score(tagged, "5", format_reward=0.5)["acc"] == 0.0
    assert score(tagged, "4")["score"] == 1.0


@pytest.mark.parametrize(
    ("response", "formed"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("a</think> <answer>b</answer>", True),  # the prompt ended with <think>
        ("<think>a</think><answer></answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b</answer> more", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<think>a<think>b</think><answer>b</answer>", False),
        (r"\boxed{b}", False),
    ],
)
def test_has_tags(response, formed):
    assert has_tags(response) is formed


@pytest.mark.parametrize("form", ["<answer>**{}**</answer>", "#### **{}**", "<answer>`{}`</answer>", "#### `{}`."])
@pytest.mark.parametrize("before", ["", r"\boxed{17}" + "\n"])
def test_markdown_around_an_answer(form, before):
    assert score(before + form.format(18), "18")["acc"] == 1.0
    assert score(before + form.format(81), "18")["acc"] == 0.0


def test_ground_truth_may_be_a_whole_solution():
    assert score(r"\boxed{72}", "48 + 24 = 72\n#### 72")["acc"] == 1.0
    assert score("#### 3", r"the answer is \boxed{3}")["acc"] == 1.0


# --- time --------------------------------------------------------------------------------------------------------

PATHOLOGICAL = [
    r"9^{9^{9}} + \sqrt{2}",  # 370 million digits
    "*".join(["9^{30000}"] * 90),
    r"\binom{9999}{4999}" * 50,
    "9999!" * 100,
    "x^{x^{x^{x}}}",
    "(" * 480 + "1" + ")" * 480,
    r"\frac{" * 150,
    r"\sin " * 150 + "x",
    "+".join(rf"\tan(10^{{{power}}}x)" for power in range(60)),
    "=".join(["x"] * 400),
]


@pytest.mark.parametrize("answer", PATHOLOGICAL, ids=lambda answer: answer[:12])
@pytest.mark.parametrize("gold", ["7", "x+y", r"\sqrt{2}", "(1,2)", "x<3"])
def test_a_pathological_answer_costs_a_bounded_time(gold, answer):
    started = time.thread_time()
    assert not _accepts(gold, answer)
    # Processor time: SECONDS for the formulas, and 1 for the longest step between two checks of the clock.
    assert time.thread_time() - started < SECONDS + 1


def test_threads_do_not_disturb_each_other():
    forms = [(rf"\sqrt{{{2 * i * i}}}", rf"{i}\sqrt2", rf"{i}\sqrt3") for i in range(1, 9)]
    slow, gold = PATHOLOGICAL[1], "x+y"
    verdicts = {}

    def one(thread):
        _accepts(gold, slow)
        verdicts[thread] = [_accepts(right, other) for right, *others in forms for other in others]

    threads = [threading.Thread(target=one, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(4), [True, False] * len(forms))


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 20_000,
        "#### 1\n" * 20_000,
        r"\boxed{" * 20_000,
        "<think>" + "a b " * 50_000 + "</think><answer>" + " " * 50_000 + "</answer>",
        rf"\boxed{{{'1,' * 900}}}",
        rf"\boxed{{{'(' * 1900}}}",
        rf"\boxed{{{'1' * 1900}_}}",
        "{" * 100_000,
    ],
)
def test_long_text_is_read_in_a_bounded_time(text):
    started = time.thread_time()
    assert score(text, "(7,8)", format_reward=0.5)["acc"] == 0.0
    assert time.thread_time() - started < SECONDS + 2


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.text("\\{}()[]frac boxed#<answer>/sqrtx^_0123456789.,%$&=+-", max_size=80))
def test_any_text_gets_a_bounded_score(text):
    for response in (text, rf"\boxed{{{text}}}", f"<answer>{text}</answer>", f"#### {text}"):
        for gold in (r"\frac{3}{4}", "(1,2)", text):
            scored = compute_score(MATH, response, gold)
            assert scored.keys() == COLUMNS.keys()
            assert scored["score"] in (0.0, 1.0)


# --- variants ----------------------------------------------------------------------------------------------------


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_equal_only_to_themselves(gold, answer):
    forms = (f"{answer}", f"{answer:,}", f"{answer}.0", f"${answer}$", rf"\frac{{{answer * 3}}}{{3}}", f"{answer} cm")
    for form in forms:
        assert is_equal(str(gold), form) is (gold == answer)
        assert is_equal(str(answer), form)


@given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
def test_fractions_are_equal_only_to_themselves(gold, answer):
    def latex(value):
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    assert is_equal(latex(gold), f"{answer.numerator}/{answer.denominator}") is (gold == answer)
    assert is_equal(latex(answer), rf"\dfrac{{{-2 * answer.numerator}}}{{{-2 * answer.denominator}}}")


small = st.integers(-30, 30)
positive = st.integers(1, 30)


@given(positive, positive, positive)
def test_surds_are_equal_only_to_themselves(outside, inside, other):
    gold = rf"\sqrt{{{outside * outside * inside}}}"
    assert is_equal(gold, rf"{outside}\sqrt{{{inside}}}")
    assert is_equal(rf"\frac{{1}}{{{gold}}}", rf"\frac{{{gold}}}{{{outside * outside * inside}}}")
    assert is_equal(gold, rf"{outside}\sqrt{{{other}}}") is (inside == other)


@settings(deadline=None)
@given(small, small, small, small)
def test_polynomials_are_equal_only_to_themselves(a, b, c, d):
    gold = f"(x+({a}))(x+({b}))"
    expanded = f"x^2{a + b:+d}x{a * b:+d}"
    assert is_equal(gold, expanded)
    assert is_equal(gold, f"(x+({c}))(x+({d}))") is ({a, b} == {c, d} and a + b == c + d)
    assert not is_equal(gold, f"{expanded}+x^{{-90}}")


@settings(deadline=None)
@given(small.filter(bool), small, small.filter(bool), small)
def test_equations_are_equal_to_their_multiples_only(slope, shift, factor, other):
    gold = f"y={slope}x{shift:+d}"
    assert is_equal(gold, f"{factor}y={slope * factor}x{shift * factor:+d}".replace("+-", "-"))
    assert is_equal(gold, f"{slope}x-y{shift:+d}=0")
    assert is_equal(gold, f"{slope}x-y{other:+d}=0") is (shift == other)
    for nothing in ("0=0", "1=1", "0=1", "y=y", f"{slope}={slope}", f"y-y={shift}-{shift}"):
        assert not is_equal(gold, nothing)


@settings(deadline=None)
@given(small, small.filter(bool), small, st.sampled_from(["<", ">", r"\le", r"\ge"]))
def test_inequalities_are_equal_to_their_intervals_only(bound, factor, other, sign):
    open_, low = sign in "<>", sign in ("<", r"\le")
    interval = rf"(-\infty,{bound}{')' if open_ else ']'}" if low else rf"{'(' if open_ else '['}{bound},\infty)"
    flipped = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]
    gold = rf"x {sign} {bound}"
    assert is_equal(gold, interval)
    assert is_equal(interval, gold)
    assert is_equal(gold, rf"{bound} {flipped} x")
    assert is_equal(gold, rf"{factor}x {sign if factor > 0 else flipped} {factor * bound}")
    assert is_equal(gold, rf"x {sign} {other}") is (bound == other)
    assert not is_equal(gold, rf"x {flipped} {bound}")
    assert not is_equal(gold, str(bound))


@settings(deadline=None)
@given(st.lists(small, min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False), small)
def test_lists_are_equal_in_any_order_to_nothing_more_or_less(numbers, random, more):
    gold = ", ".join(map(str, numbers))
    shuffled = random.sample(numbers, len(numbers))
    names = [f"x={number}" for number in shuffled]
    last = [*map(str, shuffled[:-1]), rf"\text{{ and }} {shuffled[-1]}"]
    for form in (
        ", ".join(map(str, shuffled)),
        ";".join(map(str, shuffled)),
        r"\text{ or }".join(names),
        " ".join(last),
    ):
        assert is_equal(gold, form) or (form == " ".join(last) and len(last) > 2)
    assert not is_equal(gold, f"{gold}, {more}")
    assert not is_equal(gold, ", ".join(map(str, numbers[1:])))
    assert not is_equal(str(numbers[0]), gold)
    assert is_equal(f"({gold})", "(" + ", ".join(map(str, shuffled)) + ")") is (numbers == shuffled)


@given(st.sampled_from([("m", "cm", 100), ("kg", "g", 1000), ("hours", "minutes", 60), ("ft", "inches", 12)]), positive)
def test_units_are_converted_and_never_exchanged(units, value):
    large, little, ratio = units
    gold = rf"{value}\text{{ {large}}}"
    assert is_equal(gold, rf"{value * ratio}\text{{ {little}}}")
    assert is_equal(gold, str(value))
    assert is_equal(str(value), gold)
    assert not is_equal(gold, rf"{value}\text{{ {little}}}")
    assert not is_equal(gold, str(value * ratio))
    assert not is_equal(str(value), rf"{value * ratio}\text{{ {little}}}")
    assert not is_equal(gold, rf"{value}\text{{ {large}}}^2")


@settings(deadline=None)
@given(st.integers(20, 3000), st.integers(20, 3000))
def test_values_close_to_0_or_1_are_told_apart(first, second):
    for form in (r"\frac{{1}}{{3^{{{}}}}}", r"1-2^{{-{}}}", r"\frac{{1}}{{{}!}}", r"\left(\frac57\right)^{{{}}}"):
        assert is_equal(form.format(first), form.format(second)) is (first == second)
        for near in ("0", "1", "0+1"):
            assert not is_equal(form.format(first), near)
            assert not is_equal(near, form.format(first))


# --- rows that cannot be graded ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "truth"), [(MATH, ""), (MATH, None), (MATH, {"a": 1}), ("no_such_set", "5"), ("taco", "no json")]
)
def test_a_bad_row_scores_0_and_is_shown_once(source, truth, caplog):
    for _ in range(3):
        scored = compute_score(source, r"\boxed{5}", truth, {"index": f"{source} {truth}"})
        assert scored.keys() == COLUMNS.keys()
        assert (scored["score"], scored["acc"], scored["ungradable"]) == (0.0, 0.0, 1.0)
    (record,) = caplog.records
    assert f"row {source} {truth} of {source}" in record.getMessage()


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="partial_credits"):
        compute_score(MATH, r"\boxed{5}", "5", partial_credits=True)


# --- real rows ---------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "gsm8k_test.jsonl"])
def test_gsm8k_gold_solutions_and_no_other_number(name):
    for row in _rows(SHARED / name):
        gold = row["answer"].rpartition("####")[2].strip()
        assert compute_score("openai/gsm8k", row["answer"], gold)["score"] == 1.0
        assert compute_score("openai/gsm8k", rf"so \boxed{{{gold}}}", gold)["score"] == 1.0
        number = int(gold.replace(",", ""))
        for other in (number + 1, number - 1, -number or 3, number * 10 or 7, number / 7 + 1, f"{number}.5"):
            assert compute_score("openai/gsm8k", f"#### {other}", gold)["score"] == 0.0, (gold, other)


@needs_data
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "gsm8k_test.jsonl", "math_sample.jsonl"])
def test_no_gold_answer_of_a_data_set_accepts_what_says_nothing(name):
    rows = _rows(SHARED / name)
    golds = [row["answer"].rpartition("####")[2].strip() for row in rows]
    accepted = Counter()
    for gold, following in zip(golds, golds[1:] + golds[:1], strict=True):
        same = is_equal(gold, following)
        assert same == (gold.removeprefix("x=") == following.removeprefix("x="))
        for nothing in ("0=1", "1=1", "x=x", "0=0", "", " ", f"{gold}, {gold}", f"{gold}, {following}", f"0$ ${gold}"):
            accepted[nothing] += _accepts(gold, nothing)
        assert _accepts(gold, gold)
        assert not _accepts(gold, f"({gold})+1")
    assert not +accepted


@needs_data
def test_math_gold_solutions_and_not_the_next_answer():
    rows = _rows(SHARED / "math_sample.jsonl")
    for row, following in zip(rows, rows[1:] + rows[:1], strict=True):
        source = "DigitalLearningGmbH/MATH-lighteval"
        assert compute_score(source, row["solution"], row["answer"])["score"] == 1.0
        same = row["answer"].removeprefix("x=") == following["answer"].removeprefix("x=")
        scored = compute_score(source, following["solution"], row["answer"])
        assert scored["score"] == float(same), (row["answer"], following["answer"])
