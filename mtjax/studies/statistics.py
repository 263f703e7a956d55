"""Means with bootstrap intervals over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SAMPLES = 10_000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over runs with its bootstrap interval; without one where there is a single run."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def excludes_zero(self) -> bool | None:
        """Tell whether the interval lies on one side of zero; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def estimate(values: Sequence[float], *, samples: int = SAMPLES, seed: int = 0) -> Estimate:
    """Return the mean with its 95 % percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Raises ValueError on no value, and on one that is not finite.
    """
    array = np.asarray(values, np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"A mean needs finite values, got {array.tolist()}.")
    mean = float(array.mean())
    if len(array) == 1:
        return Estimate(mean, None, None, 1)
    drawn = np.random.default_rng(seed).integers(len(array), size=(samples, len(array)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(array[drawn].mean(axis=1), [tail, 100 - tail])
    return Estimate(mean, float(low), float(high), len(array))


def paired(values: Mapping[object, float], baseline: Mapping[object, float]) -> Estimate | None:
    """Return the mean difference from the baseline over the units that both have; None where they share none."""
    shared = [unit for unit in values if unit in baseline]
    return estimate([values[unit] - baseline[unit] for unit in shared]) if shared else None


def comparisons_note(estimates: Sequence[Estimate]) -> str:
    """State how many comparisons there are, and how many of their intervals exclude zero."""
    with_interval = [e for e in estimates if e.low is not None]
    if not with_interval:
        return f"{len(estimates)} comparisons, all of one pair of runs: no interval, so no difference is established."
    outside = sum(bool(e.excludes_zero()) for e in with_interval)
    return (
        f"{len(estimates)} comparisons, not corrected for their number; {outside} of {len(with_interval)} with an "
        f"interval exclude zero, where about {(1 - CONFIDENCE) * len(with_interval):.1f} would by chance alone."
    )
