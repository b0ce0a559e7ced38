"""Reads rows of mathematics sets: a problem and its final answer."""

from __future__ import annotations

from typing import Any

from verl_sspo.data.prepare import Dropped, Example, column_of, text_of
from verl_sspo.rewards.mathematics import extract_answer

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
# The tags in which arXiv:2602.19345 asks for answers, restated; the words are our choice.
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


def _answer(row: dict[str, Any], *names: str) -> str:
    """The first of the columns that is not null; for a solution, its final answer."""
    column = column_of(row, *names)
    value = row[column]
    if isinstance(value, list) and len(value) == 1:  # more could be several answers or one set
        (value,) = value
    if type(value) not in (str, int, float) or value != value:
        raise ValueError(f"column {column} is not an answer: {value!r:.80}")
    text = str(value).strip()
    answer = extract_answer(text)
    if answer is None and column == "solution":
        raise ValueError("no final answer in column solution")
    if not (text if answer is None else answer):
        raise ValueError(f"column {column} is empty")
    return text if answer is None else answer


def read_gsm8k(row: dict[str, Any]) -> Example:
    """`question` and `answer`, a solution that ends with `#### 72`."""
    _, hashes, number = text_of(row, "answer").rpartition("####")
    if not hashes or not number.strip():
        raise ValueError(f"no number after #### in column answer: {row['answer'][-40:]!r}")
    # Only the digits: some answers have thousands separators.
    return Example(text_of(row, "question"), number.strip().replace(",", ""))


def read_mathematics(row: dict[str, Any]) -> Example:
    """`problem` or `question`; `answer`, `final_answer`, `expected_answer`, or the answer in `solution`."""
    return Example(
        text_of(row, "problem", "question"), _answer(row, "answer", "final_answer", "expected_answer", "solution")
    )


def read_math(row: dict[str, Any], levels: frozenset[str] | None) -> Example:
    """`problem`, and an answer as in `read_mathematics`; only the given levels of difficulty ("Level 3", or 3)."""
    text_of(row, "problem")  # a row without this column is from another data set
    if levels is not None:
        if "level" not in row:
            raise ValueError("no column level: --levels all keeps such rows")
        digits = [letter for letter in str(row["level"]) if letter.isdigit()]
        if len(digits) != 1:
            raise Dropped("level unknown (--levels all keeps these)")
        if digits[0] not in levels:
            raise Dropped(f"level {digits[0]}")
    return read_mathematics(row)


def read_olympiadbench(row: dict[str, Any]) -> Example:
    """`question`, after its `context` if there is one; `final_answer`, a list of one or more texts."""
    if "final_answer" in row and not row["final_answer"]:
        raise Dropped("asks for a proof")
    answers = row[column_of(row, "final_answer")]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"column final_answer must be a list of texts: {answers!r:.80}")
    example = read_mathematics(row | {"final_answer": ", ".join(answers)})
    context = (row.get("context") or "").strip()
    return Example(f"{context}\n\n{example.problem}" if context else example.problem, example.ground_truth)
