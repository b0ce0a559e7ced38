r"""Reward of mathematics: is the final answer of the response the right one?

The answer is the content of the last `\boxed{}` or `<answer>` tag, or follows the last `####`, outside the thinking.
`answers` reads and compares it.
"""

from __future__ import annotations

import re

from verl_sspo.rewards.answers import MAX_LENGTH, is_equal, read_formula
from verl_sspo.rewards.notation import clean


def score(
    solution_str: str, ground_truth: str, answer_line: bool = False, *, format_reward: float = 0.0
) -> dict[str, float | str]:
    """Scores a response by its final answer.

    Args:
        solution_str: The response.
        ground_truth: The answer, or a whole solution with the answer in its last box or after its last `####`.
        answer_line: Whether a line `Answer: 13` also counts as an answer; DAPO's prompt asks for one.
        format_reward: Added to the score if the whole response is `<think>...</think><answer>...</answer>`: the
            reward for answer plus format of arXiv:2602.19345 (restated; the weight is the caller's choice). `format`
            then says whether the response has this form, otherwise whether it has an answer at all.

    Raises:
        ValueError: The ground truth is not an answer.
    """
    if not isinstance(ground_truth, str | int | float) or not str(ground_truth).strip():
        raise ValueError(f"ground_truth is not an answer: {ground_truth!r}"[:200])
    answer = extract_answer(solution_str, answer_line)
    gold = extract_answer(str(ground_truth))
    correct, error = False, ""
    if answer is None:
        error = "no answer"
    else:
        try:
            correct = is_equal(str(ground_truth) if gold is None else gold, answer)
            error = "" if correct else "wrong answer"
        except TimeoutError:
            error = "timeout"
    formatted = answer is not None if not format_reward else has_tags(solution_str)
    return {
        "score": float(correct) + format_reward * formatted,
        "acc": float(correct),
        "format": float(formatted),
        "timeout": float(error == "timeout"),
        "error": error,
        "pred": (answer or "")[:MAX_LENGTH],
    }


def has_tags(response: str) -> bool:
    """Whether a response is one `<think>` and one `<answer>` element, in this order, and nothing else."""
    # A prompt may end with the opening tag: then the response begins after it.
    whole = response if response.lstrip().startswith("<think>") else "<think>" + response
    found = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*\S.*)</answer>\s*", whole, re.DOTALL)
    return bool(found) and all(whole.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))


_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_BETWEEN_BOXES = re.compile(r"[\s$.]*(?:[,;/]|,?\s*\b(?:and|or))[\s$]*")


def _closing(text: str, start: int) -> int | None:
    """The index after the brace that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return start + found.end()
    return None


def _last_box(text: str) -> tuple[int, str] | None:
    """Place and content of the last box, or of the last boxes if "or", "and" or a comma joins them."""
    boxes: list[tuple[int, int, str]] = []  # from the last to the first
    for found in reversed(list(_BOX.finditer(text))[-50:]):
        start, end = found.end(), None
        if text[start : start + 1] == "{":
            end = _closing(text, start)
            inner = text[start + 1 : end - 1] if end else ""
        elif bare := re.match(r"[^\s$]+", text[start:]):  # \boxed 5
            end, inner = start + bare.end(), bare[0]
        if end and inner.strip():
            while boxes and boxes[-1][0] < end:  # boxes inside this one
                boxes.pop()
            boxes.append((found.start(), end, _BOX.sub("", inner)))
    if not boxes:
        return None
    count = 1
    while count < len(boxes) and _BETWEEN_BOXES.fullmatch(text[boxes[count][1] : boxes[count - 1][0]]):
        count += 1
    return boxes[0][0], ", ".join(dict.fromkeys(inner.strip() for *_, inner in reversed(boxes[:count])))


def extract_answer(text: str, answer_line: bool = False) -> str | None:
    r"""The final answer of a response, or None: the last `\boxed{}` or `<answer>`, else what follows the last `####`.

    A line after `####` wins over an earlier box if it is a number; otherwise, like `2. Proof`, it counts as a heading.
    Empty boxes and the thinking do not count.

    Args:
        text: The response.
        answer_line: Whether the last line `Answer: ...` counts like a box.
    """
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:  # cut off while thinking
        return None
    found: list[tuple[int, str]] = []
    if box := _last_box(text):
        found.append(box)
    tags = [(tag.start(1), tag[1]) for tag in re.finditer(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)]
    if answer_line:
        tags += [(line.start(1), line[1].strip("* ")) for line in re.finditer(r"(?i)\banswer\**:([^\n]+)", text)]
    if tags:
        place, inner = max(tags)
        inner_box = _last_box(inner)
        found.append((place + len(inner), inner_box[1] if inner_box else inner))
    lines = [(line.start(), line[1]) for line in re.finditer(r"####[ \t]*([^\n]*)", text)]
    found += [line for line in lines[-50:] if _is_number(line[1])] if found else lines[-1:]
    return max(found)[1].strip() if found else None


def _is_number(line: str) -> bool:
    if len(line) > 200 or re.match(r"\d+\.\s+[a-zA-Z]", line):  # a heading
        return False
    found = read_formula(clean(line))
    return found is not None and found.is_number
