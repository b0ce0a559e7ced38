"""Interquartile means and bootstrap intervals over seeds (the protocol of arXiv:2108.13264), by scipy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure over runs: `value` with a 95% interval, which a single run does not have (None)."""

    value: float
    low: float | None
    high: float | None

    def text(self, scale: float = 1.0, digits: int = 3, signed: bool = False) -> str:
        sign = "+" if signed else ""
        body = f"{scale * self.value:{sign}.{digits}f}"
        if self.low is None or self.high is None:
            return body
        return f"{body} [{scale * self.low:{sign}.{digits}f}, {scale * self.high:{sign}.{digits}f}]"


def interquartile_mean(values: Sequence[float]) -> Estimate | None:
    """The mean without the lowest and the highest quarter of the values, rounded down, so with fewer than four of them
    the mean. Percentile bootstrap over the values."""
    return _estimate(values, lambda x, axis: stats.trim_mean(x, 0.25, axis=axis))


def mean(values: Sequence[float]) -> Estimate | None:
    """The mean, with a percentile bootstrap over the values."""
    return _estimate(values, np.mean)


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Estimate | None:
    """The mean difference to the baseline over the seeds that both have; the bootstrap draws pairs."""
    seeds = sorted(values.keys() & baseline.keys())
    return mean([values[seed] - baseline[seed] for seed in seeds])


def _estimate(values: Sequence[float], statistic: object) -> Estimate | None:
    data = np.array([value for value in values if math.isfinite(value)])
    if not len(data):
        return None
    if len(data) == 1:
        return Estimate(float(data[0]), None, None)
    result = stats.bootstrap(
        (data,), statistic, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0), vectorized=True
    )
    low, high = result.confidence_interval
    return Estimate(float(statistic(data, axis=0)), float(low), float(high))  # type: ignore[operator]
