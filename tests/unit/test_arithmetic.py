import random
import re

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_sspo.compose import RECIPES, compose_config
from verl_sspo.quickstart import task as arithmetic
from verl_sspo.rewards.last_number import score


class NeverSwap(random.Random):
    """Always returns 0.99: digits are never swapped, and carries are forgotten only if `forget_carry` is 1."""

    def random(self):
        return 0.99


def test_correct_solution_by_hand():
    solution = arithmetic.careless_solution(695, 807, 3, NeverSwap(), forget_carry=0.0)
    assert solution == "5+7+0=12;9+0+1=10;6+8+1=15:1502"


def test_careless_solution_by_hand():
    # The carry of 12 is forgotten, so the next column is 09. The last column's carry is written down, not passed on.
    solution = arithmetic.careless_solution(695, 807, 3, NeverSwap(), forget_carry=1.0)
    assert solution == "5+7+0=12;9+0+0=09;6+8+0=14:1492"


@given(st.integers(1, 5), st.data())
def test_teacher_without_carelessness_is_right(digits, data):
    term = st.integers(10 ** (digits - 1), 10**digits - 1)
    a, b = data.draw(term), data.draw(term)
    solution = arithmetic.careless_solution(a, b, digits, random.Random(0), forget_carry=0.0)
    assert int(solution.split(":")[1]) == a + b
    assert len(arithmetic.prompt_of(a, b)) == arithmetic.prompt_length(digits)
    # One more for the end-of-sequence token.
    assert len(solution) + 1 == arithmetic.response_length(digits)


@pytest.mark.parametrize("digits", range(1, 6))
def test_the_recipe_has_room_for_problem_and_solution(digits):
    data = compose_config("quickstart", [f"task.digits={digits}"], RECIPES).data
    assert data.max_prompt_length == arithmetic.prompt_length(digits)
    assert data.max_response_length == arithmetic.response_length(digits)


def test_teacher_forgets_and_swaps_as_often_as_it_should():
    rng = random.Random(0)
    solutions = [arithmetic.careless_solution(65, 28, 2, rng) for _ in range(4000)]
    right = sum(score(solution, "93")["score"] for solution in solutions) / 4000
    swapped = sum(solution.startswith("8+5") for solution in solutions) / 4000
    assert right == pytest.approx(0.3, abs=0.03)
    assert swapped == pytest.approx(0.5, abs=0.03)


def test_problems_are_different_repeatable_and_of_the_right_width():
    drawn = arithmetic.problems(2, 500, seed=3)
    assert len(set(drawn)) == 500
    assert drawn == arithmetic.problems(2, 500, seed=3)
    assert drawn != arithmetic.problems(2, 500, seed=4)
    assert all(10 <= term <= 99 for pair in drawn for term in pair)


def test_all_problems_of_one_digit():
    assert sorted(arithmetic.problems(1, 81, seed=0)) == [(a, b) for a in range(1, 10) for b in range(1, 10)]
    with pytest.raises(ValueError, match="only 81"):
        arithmetic.problems(1, 82, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        arithmetic.problems(0, 1, seed=0)


def test_dataset_has_verls_columns_and_disjoint_splits(tmp_path):
    arithmetic.write_dataset(tmp_path, digits=2, train_size=40, val_size=10, seed=0)
    train, val = (pq.read_table(tmp_path / f"{split}.parquet").to_pylist() for split in ("train", "val"))
    assert (len(train), len(val)) == (40, 10)
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in val}
    for row in train + val:
        a, b = map(int, re.fullmatch(r"(\d\d)\+(\d\d)=", row["prompt"][0]["content"]).groups())
        assert row["data_source"] == "arithmetic"
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(a + b)}
    assert val[3]["extra_info"] == {"split": "val", "index": 3}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("5+7+0=12;9+0+1=10;6+8+1=15:1502", 1.0),
        ("1502", 1.0),
        ("01502", 1.0),
        ("1502 is right", 1.0),
        ("1502:1503", 0.0),
        ("150", 0.0),
        ("11502", 0.0),
        ("", 0.0),
        ("no number", 0.0),
        # Digits of other scripts do not count as numbers.
        ("1502 ٣", 1.0),
        # More digits than Python converts to an int.
        ("9" * 10_000, 0.0),
    ],
)
def test_reward(response, reward):
    assert score(response, "1502") == {"score": reward, "acc": reward}
