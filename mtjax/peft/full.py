"""Full fine-tuning: every parameter trains.

frozen = {};  trainable = params;  merge = trainable
"""

from __future__ import annotations

from mtjax.types import Peft


def full() -> Peft:
    """Train every parameter."""

    def split(key, params):
        del key
        return {}, params

    def merge(frozen, trainable):
        del frozen
        return trainable

    return Peft(split, merge)
