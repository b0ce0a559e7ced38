"""Reward of the careless-carry additions: is the last number of the response the sum?"""

import re


def score(solution_str: str, ground_truth: str) -> dict[str, float]:
    """Scores a response by the last number in it.

    Args:
        solution_str: the response, special tokens left out.
        ground_truth: the sum, in decimal digits.

    Returns:
        `score` and `acc`: 1.0 if the last run of digits equals the sum (leading zeros do not matter), else 0.0.
    """
    numbers = re.findall(r"[0-9]+", solution_str)
    # Compared as text: Python refuses to read a number of thousands of digits, and a response may hold one.
    correct = float(bool(numbers) and numbers[-1].lstrip("0") == ground_truth.lstrip("0"))
    return {"score": correct, "acc": correct}
