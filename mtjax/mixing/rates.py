"""How often each task is drawn: factories of types.Rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtjax import tree
from mtjax.types import Rates


def proportional(*, maximum: float | None = None, temperature: float = 1.0, scale: float = 1.0) -> Rates:
    """Rate = min(scale * examples, maximum) ** (1 / temperature).

    Source: arXiv:1910.10683, section 3.5.2; the order of scale, cap and temperature is
    seqio.mixing_rate_num_examples's.
    """
    if temperature <= 0 or scale <= 0 or (maximum is not None and maximum <= 0):
        raise ValueError(
            f"temperature {temperature}, scale {scale} and maximum {maximum} of proportional rates must be positive."
        )

    def rates(sizes_T: np.ndarray, names: Sequence[str]) -> np.ndarray:
        capped = np.minimum(sizes_T * scale, np.inf if maximum is None else maximum)
        return capped ** (1.0 / temperature)

    return static(rates)


def equal() -> Rates:
    """Draw every task equally often."""
    return static(lambda sizes_T, names: np.ones(len(names)))


def explicit(rates: Mapping[str, float]) -> Rates:
    """Draw by given rates. Every task of the mixture needs one; 0 leaves a task out on purpose."""

    def lookup(sizes_T: np.ndarray, names: Sequence[str]) -> list[float]:
        for name in rates:
            if name not in names:
                raise tree.unknown_name("task in rates", name, names)
        if missing := [name for name in names if name not in rates]:
            raise ValueError(
                f"No rate for task {missing[0]!r} ({len(missing)} without); give 0 to leave one out."
            )
        return [rates[name] for name in names]

    return static(lookup)


def static(function: Any) -> Rates:
    """Rates that never change: function(sizes_T, names) -> rates_T, called once."""

    def init(sizes_T: Sequence[float], names: Sequence[str]) -> dict[str, list[float]]:
        rates_T = checked(function(np.asarray(sizes_T, np.float64), tuple(names)), names)
        return {"rates": rates_T.tolist()}

    return Rates(
        init=init,
        rates=lambda state, step: np.asarray(state["rates"]),
        observe=lambda state, metrics: state,
    )


def checked(rates_T: Sequence[float] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return rates as float64 [T]. Raises ValueError where one is negative or not finite, or all are zero."""
    array = np.asarray(rates_T, np.float64)
    for rate, name in zip(array, names, strict=True):
        if not np.isfinite(rate) or rate < 0:
            raise ValueError(f"Task {name!r} has rate {rate}; rates must be finite and not negative.")
    if not array.any():
        raise ValueError(f"All rates are zero ({len(names)} tasks, the first {list(names)[:3]}).")
    return array
