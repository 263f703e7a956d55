"""What a chip can do, by the kind that jax reports: the roofs of `mtjax compile`'s estimates."""

from __future__ import annotations

import re
from typing import NamedTuple

from mtjax import tree


class Chip(NamedTuple):
    """One device as jax counts them: a TPU chip, of TPU7x one of a chip's two halves."""

    flops: float  # bf16 operations a second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: (
        float  # bytes a second over one link, one way; a torus has two links along each of its axes
    )
    network_bandwidth: float  # bytes a second between slices, a chip's share of its host's network cards
    torus_dims: int
    wraps_from: int  # an axis of a slice closes to a ring where its size is a multiple of this


GIB = 1 << 30
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.228e12, 45e9, 6.25e9, 3, 4),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.819e12, 45e9, 3.125e9, 2, 16),
    "TPU v5": Chip(459e12, 95 * GIB, 2.765e12, 90e9, 6.25e9, 3, 4),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.638e12, 90e9, 12.5e9, 2, 16),
    "TPU7x": Chip(2307e12 / 2, 96 * GIB, 7.38e12 / 2, 90e9 / 2, 6.25e9, 3, 4),
}
"""Peaks, memory and interconnect: https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x ("interchip
interconnect bandwidth" there counts all links, both ways). What of a link is reached one way, and the share of
the network (network cards a host over its chips): https://jax-ml.github.io/scaling-book/tpus. A v5e or v6e
slice wraps around only where an axis is a whole pod's 16; v4 and later cubes from 4 on."""

ALIASES = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
"""The first part of a topology's name, as in v5e:16x16, to the kind of its devices."""


def chip(kind: str) -> Chip | None:
    """Return what is known of a kind of device; None for CPUs.

    Raises ValueError for an accelerator that the table lacks.
    """
    if kind in CHIPS or kind == "cpu":
        return CHIPS.get(kind)
    raise tree.unknown_name("kind of device", kind, list(CHIPS))


def topology_kind(name: str) -> str:
    """Return the kind of device of a topology such as v5e:16x16 or cpu:8.

    Raises ValueError for a name of another form and an unknown kind.
    """
    if not re.fullmatch(r"\w+:\d+(x\d+)*", name):
        raise ValueError(
            f"--topology={name!r} must be a kind and its shape, such as v5e:16x16, v5p:4x4x4 or cpu:8."
        )
    kind = name.partition(":")[0]
    if kind == "cpu":
        return "cpu"
    if kind not in ALIASES:
        raise tree.unknown_name("topology", kind, [*ALIASES, "cpu"])
    return ALIASES[kind]
