"""Rows of mathematics sets: a problem and its final answer."""

from __future__ import annotations

from typing import Any

from verl_sspo.data.prepare import Dropped, Example
from verl_sspo.rewards.mathematics import extract_answer

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
# How arXiv:2602.19345 asks for answers, restated: the words are our choice, the tags the paper's.
TAGS = (
    "Think about the problem first, then answer. Enclose your reasoning in <think> </think> tags and the final answer "
    "in <answer> </answer> tags: <think> reasoning </think> <answer> final answer </answer>."
)
TEMPLATES = {
    "boxed": [{"role": "user", "content": "{problem}\n\n" + INSTRUCTION}],
    "think": [{"role": "system", "content": TAGS}, {"role": "user", "content": "{problem}"}],
    "hashes": [
        {
            "role": "user",
            "content": '{problem}\n\nLet\'s think step by step and output the final answer after "####".',
        }
    ],
}


def _answer(row: dict[str, Any], *fields: str) -> str:
    """The first of the fields that is there; of a solution, its final answer."""
    for field in fields:
        value = row.get(field)
        if isinstance(value, list) and len(value) == 1:  # several answers cannot be told from one set of them
            (value,) = value
        if value is not None:
            if type(value) not in (str, int, float) or value != value:
                raise ValueError(f"`{field}` is no answer: {value!r}"[:200])
            text = str(value).strip()
            answer = extract_answer(text)
            if answer is None and field == "solution":
                raise ValueError(f"no final answer in `{field}`")
            if not (text if answer is None else answer):
                raise ValueError(f"`{field}` is empty")
            return text if answer is None else answer
    raise ValueError(f"has none of the fields {', '.join(fields)}")


def problem_of(row: dict[str, Any], *fields: str) -> str:
    """The first of the fields that holds a text."""
    for field in fields:
        if isinstance(row.get(field), str) and row[field].strip():
            return row[field].strip()
    raise ValueError(f"has none of the fields {', '.join(fields)}")


def read_gsm8k(row: dict[str, Any]) -> Example:
    """`question` and `answer`, a solution that ends with `#### 72`."""
    answer = str(row["answer"])
    if "####" not in answer:
        raise ValueError("no `####` in `answer`")
    # The digits alone: some answers have thousands separators.
    number = answer.rpartition("####")[2].strip().replace(",", "")
    if not number:
        raise ValueError("nothing behind `####` in `answer`")
    return Example(problem_of(row, "question"), number)


def read_mathematics(row: dict[str, Any]) -> Example:
    """`problem` or `question`; `answer`, `final_answer`, or the box in `solution`."""
    return Example(
        problem_of(row, "problem", "question"), _answer(row, "answer", "final_answer", "expected_answer", "solution")
    )


def read_math(row: dict[str, Any], levels: frozenset[int] | None) -> Example:
    """As `read_mathematics`, of the given levels of difficulty ("Level 3", or 3) only, where the source has levels."""
    if levels is not None and "level" in row:
        digits = [letter for letter in str(row["level"]) if letter.isdigit()]
        if len(digits) != 1:
            raise Dropped("level unknown (--levels all keeps these)")
        if int(digits[0]) not in levels:
            raise Dropped(f"level {digits[0]}")
    return read_mathematics(row)


def read_olympiadbench(row: dict[str, Any]) -> Example:
    """`question`, behind its `context` where it has one; `final_answer`, a list with one text or several."""
    answers = row["final_answer"]
    if not answers:
        raise Dropped("asks for a proof")
    if isinstance(answers, str):
        raise ValueError(f"final_answer must be a list of texts, not the text {answers!r}")
    example = read_mathematics(row | {"final_answer": ", ".join(answers)})
    context = (row.get("context") or "").strip()
    return Example(f"{context}\n\n{example.problem}" if context else example.problem, example.ground_truth)
