"""What a run will cost before anything starts: operations, tokens, time on a named device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mtjax import tree
from mtjax.hardware import ALIASES, CHIPS

PEAK = {
    **{name: CHIPS[kind].flops for name, kind in ALIASES.items()},
    "tpu7x": 2 * CHIPS["TPU7x"].flops,  # a device is half a chip
    "a100": 312e12,
    "h100": 989e12,
    "cpu-core": 50e9,
}
"""Peak FLOP/s of a chip in bfloat16 without sparsity, from the vendors' data sheets; of a CPU core in float32, rounded."""


class Cost(NamedTuple):
    """Of one run: `positions` counts input and target places, padding included."""

    steps: int
    positions: int
    flops: float


class Device(NamedTuple):
    """Chips of a kind, and the share of their peak that training reaches."""

    name: str
    chips: int
    utilisation: float

    def seconds(self, flops: float) -> float:
        """Return how long so many operations take."""
        return flops / (PEAK[self.name] * self.chips * self.utilisation)

    def chip_hours(self, flops: float) -> float:
        """Return the chip-hours of so many operations."""
        return self.seconds(flops) * self.chips / 3600


def device(name: str, *, chips: int, utilisation: float) -> Device:
    """Name a device. Raises ValueError for one that is not in PEAK, and for a utilisation outside (0, 1]."""
    if name not in PEAK:
        raise tree.unknown_name("device", name, list(PEAK))
    if chips < 1 or not 0 < utilisation <= 1:
        raise ValueError(
            f"A device needs at least 1 chip and a utilisation in (0, 1], got {chips} and {utilisation}."
        )
    return Device(name, chips, utilisation)


def cost(arguments: Mapping[str, Any]) -> Cost:
    """Count what train.fit with these arguments will do."""
    data, steps = arguments["data"], arguments["train_steps"]
    positions = steps * data.batch_size * sum(data.lengths.values())
    return Cost(steps, positions, steps * arguments["model"].flops(data.batch_size, lengths=data.lengths))
