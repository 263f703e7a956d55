"""Plots of results, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure  # without pyplot, which would look for a display


def series(path: str | os.PathLike, lines: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Plot scores and losses over checkpoints: a thin line a task, a thick one for each family's mean.

    lines: of a results file, one split and decode mode. A task's score is its first metric; bits per byte,
    which is better low, is left to the loss. A family's mean is taken where all its tasks have a value.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    families = sorted({line["family"] for line in lines})
    colours = dict(
        zip(families, matplotlib.colormaps["turbo"].resampled(len(families) + 1).colors, strict=False)
    )
    for axes, value, name in ((left, main_score, "score"), (right, lambda line: line["loss"], "loss")):
        for family in families:
            _family(axes, [line for line in lines if line["family"] == family], value, colours[family])
        axes.set_xlabel("step")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    right.legend(loc="upper right", fontsize="small", ncols=1 + len(families) // 12)
    left.set_ylim(0, 100)
    right.set_ylabel("nats per target token")
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main_score(line: Mapping[str, Any]) -> float | None:
    """Return a task's first score that runs from 0 to 100."""
    return next((value for name, value in line["scores"].items() if name != "bits_per_byte"), None)


def _family(axes: Any, lines: Sequence[Mapping[str, Any]], value: Any, colour: Any) -> None:
    tasks: dict[str, dict[int, float]] = {}
    for line in lines:
        if line["error"] is None and value(line) is not None:
            tasks.setdefault(line["task"], {})[line["step"]] = value(line)
    for points in tasks.values():
        axes.plot(*zip(*sorted(points.items()), strict=True), color=colour, linewidth=0.6, alpha=0.5)
    steps = sorted(set.intersection(*(set(points) for points in tasks.values()))) if tasks else []
    means = [sum(points[step] for points in tasks.values()) / len(tasks) for step in steps]
    axes.plot(steps, means, color=colour, linewidth=2, marker="o", markersize=4, label=lines[0]["family"])
