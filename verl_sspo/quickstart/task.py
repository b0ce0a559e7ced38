"""Careless carry: additions with worked steps, which a careless teacher gets wrong.

A problem is `695+800=`. Its solution adds digit by digit from the right, `a+b+carry=sum` for each column, and ends in
the answer, one digit wider than the terms:

    5+0+0=05;0+9+0=09;8+6+0=14:1495

The teacher of the warm-up knows the format and the addition tables, but most of the time it forgets to carry, and it
writes the two digits of a column in either order. A model that imitates it is systematically wrong, sometimes right,
and can learn to carry from the reward alone. The free order of the digits shows in the entropy.
"""

import random
from pathlib import Path

from verl_sspo.data.schema import make_row, write_rows

DATA_SOURCE = "arithmetic"


def problems(digits: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Draws different pairs of `digits`-digit terms, in random order.

    Args:
        digits: decimal digits of each term, at least 1.
        count: pairs to draw; (a, b) and (b, a) are two pairs.
        seed: random seed.

    Raises:
        ValueError: digits below 1, or fewer than `count` such pairs exist.
    """
    if digits < 1:
        raise ValueError(f"digits must be at least 1, got {digits}")
    low = 10 ** (digits - 1)
    terms = 10**digits - low
    if count > terms**2:
        raise ValueError(f"{count} problems were asked for, but only {terms**2} have {digits} digit(s): take fewer")
    return [(low + i // terms, low + i % terms) for i in random.Random(seed).sample(range(terms**2), count)]


def prompt_of(a: int, b: int) -> str:
    return f"{a}+{b}="


def careless_solution(a: int, b: int, digits: int, rng: random.Random, forget_carry: float = 0.7) -> str:
    """What the teacher writes after `a+b=`; with `forget_carry` 0, a correct solution."""
    carry, answer, steps = 0, "", []
    for column in range(digits):
        left, right = a // 10**column % 10, b // 10**column % 10
        if rng.random() < 0.5:
            left, right = right, left
        total = left + right + carry
        steps.append(f"{left}+{right}+{carry}={total:02d}")
        answer = f"{total % 10}{answer}"
        carry = total // 10
        if column < digits - 1 and rng.random() < forget_carry:
            carry = 0
    return ";".join(steps) + f":{carry}{answer}"


def prompt_length(digits: int) -> int:
    """Number of characters (= byte tokens) of a problem."""
    return 2 * digits + 2


def response_length(digits: int) -> int:
    """Number of tokens of a solution, with end of sequence: 32 for three digits."""
    return 10 * digits + 2


def write_dataset(directory: Path, digits: int, train_size: int, val_size: int, seed: int) -> None:
    """Writes `train.parquet` and `val.parquet` in verl's schema; no problem is in both.

    Raises:
        ValueError: there are fewer than `train_size + val_size` problems with so many digits.
    """
    drawn = problems(digits, train_size + val_size, seed)
    for split, pairs in (("train", drawn[:train_size]), ("val", drawn[train_size:])):
        rows = [
            make_row(
                data_source=DATA_SOURCE,
                prompt=[{"role": "user", "content": prompt_of(a, b)}],
                ability="math",
                ground_truth=str(a + b),
                split=split,
                index=index,
            )
            for index, (a, b) in enumerate(pairs)
        ]
        write_rows(rows, directory / f"{split}.parquet")
