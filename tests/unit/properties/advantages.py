"""Group-relative advantages: equal to exact arithmetic, group by group."""

import math
from decimal import Context, Decimal
from fractions import Fraction

import torch
from hypothesis import strategies as st

from properties import Property
from verl_sspo.algorithm.advantage import group_relative_advantages

_EXACT = Context(prec=60, Emax=10**6, Emin=-(10**6))
# Rewards as tasks give them, rewards that rounding makes almost equal, and the ends of float32.
REWARDS = st.sampled_from((0.0, 1.0, -1.0, 0.1, 0.5, 1e-45, 1e-30, 3.4e38, -3.4e38)) | st.floats(
    width=32, allow_nan=False, allow_infinity=False
)
NONFINITE = (math.nan, math.inf, -math.inf)


def _decimal(value: Fraction) -> Decimal:
    return _EXACT.divide(Decimal(value.numerator), Decimal(value.denominator))


def _exactly(rewards: list[float], options: dict) -> tuple[list[Decimal], Decimal]:
    """Exact advantages of one group, and a bound on the error that the rounding of float64 may cause."""
    exact = [Fraction(reward) for reward in rewards]
    size = len(exact)
    if size == 1:
        deviations, std = exact, Decimal(1)
    else:
        mean = sum(exact) / size
        from_mean = [reward - mean for reward in exact]
        std = _EXACT.sqrt(_decimal(sum(d * d for d in from_mean) / (size - 1)))
        std = max(std, Decimal(options["std_floor"]))
        others = [(sum(exact) - reward) / (size - 1) for reward in exact]
        leave_one_out = options["baseline"] == "leave_one_out"
        deviations = [r - other for r, other in zip(exact, others, strict=True)] if leave_one_out else from_mean
    scale = std + Decimal("1e-6") if options["normalize_by_std"] else Decimal(1)
    advantages = [_EXACT.divide(_decimal(deviation), scale) for deviation in deviations]
    return advantages, max(map(abs, advantages)) * size * Decimal("4e-16")


def are_exact(rewards: list[tuple[int, float]], options: dict, dtype: torch.dtype) -> None:
    """The advantages equal those of exact arithmetic. A non-finite reward spoils only its own group."""
    groups = torch.tensor([group for group, _ in rewards], dtype=torch.int64)
    values = torch.tensor([reward for _, reward in rewards], dtype=torch.float64).to(dtype)
    advantages = group_relative_advantages(values, groups, **options)
    assert advantages.dtype == dtype
    for group in set(groups.tolist()):
        own, ours = values[groups == group].tolist(), advantages[groups == group]
        if not all(map(math.isfinite, own)):
            assert ours.isnan().all(), f"rewards {own} give {ours.tolist()}"
            continue
        if len(set(own)) == 1 and len(own) > 1:
            assert (ours == 0).all(), f"equal rewards {own} give {ours.tolist()}"
        theirs, error = _exactly(own, options)
        for a, b in zip(ours.tolist(), theirs, strict=True):
            rounded = torch.tensor(float(b), dtype=torch.float64).to(dtype).item()
            if math.isinf(rounded):
                assert a == rounded
            else:
                bound = float(error) + 2 * torch.finfo(dtype).eps * abs(rounded) + torch.finfo(dtype).tiny
                assert abs(a - rounded) <= bound, f"rewards {own} give {a}, exactly {b}"


PROPERTIES = {
    "advantages": Property(
        are_exact,
        {
            "rewards": st.lists(st.tuples(st.integers(0, 4), REWARDS | st.sampled_from(NONFINITE)), max_size=20),
            "options": st.fixed_dictionaries(
                {
                    "normalize_by_std": st.booleans(),
                    "baseline": st.sampled_from(("mean", "leave_one_out")),
                    "std_floor": st.sampled_from((0.0, 0.1, 1.0)),
                }
            ),
            "dtype": st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
        },
    )
}
