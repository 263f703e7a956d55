"""What a run will cost before anything starts: operations, tokens, time on a named device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Of one run: `positions` counts input and target places, padding included."""

    steps: int
    positions: int
    flops: float

    def seconds(self, *, peak: float, devices: int, utilisation: float) -> float:
        """Return the time of training at a share of the devices' peak (FLOP/s each)."""
        return self.flops / (peak * devices * utilisation)


def cost(arguments: Mapping[str, Any]) -> Cost:
    """Count what train.fit with these arguments will do."""
    data, steps = arguments["data"], arguments["train_steps"]
    positions = steps * data.batch_size * sum(data.lengths.values())
    return Cost(steps, positions, steps * arguments["model"].flops(data.batch_size, lengths=data.lengths))
