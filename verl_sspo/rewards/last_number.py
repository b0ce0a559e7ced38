"""Reward of the addition task and the word problems: is the last number of the response right?"""

import re

# Thousands may be separated by commas. A minus after a digit is an operation, not a sign.
_NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")


def score(solution_str: str, ground_truth: str) -> dict[str, float]:
    """Scores a response by the last number in it.

    Args:
        solution_str: The response, without special tokens.
        ground_truth: The answer, in decimal digits.

    Returns:
        `score` and `acc`: 1.0 if the last number equals the answer (leading zeros do not matter), else 0.0.
    """
    numbers = _NUMBER.findall(solution_str)
    # Compared as text: a response may contain a number of thousands of digits, which Python refuses to read.
    correct = float(bool(numbers) and numbers[-1].replace(",", "").lstrip("0") == ground_truth.lstrip("0"))
    return {"score": correct, "acc": correct}
