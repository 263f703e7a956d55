"""Results over checkpoints: families' means, and plots as PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure  # without pyplot, which would look for a display
from matplotlib.ticker import MaxNLocator

Line = Mapping[str, Any]  # of a results file (evaluate.write_results)
Points = dict[int, float]  # by step


def series(path: str | os.PathLike, lines: Sequence[Line], *, title: str) -> None:
    """Plot scores and losses over checkpoints: a thin line a task, a thick one for each family's mean.

    lines: of a results file, one split and decode mode.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    families = sorted({line["family"] for line in lines})
    colours = dict(
        zip(families, matplotlib.colormaps["turbo"].resampled(len(families) + 1).colors, strict=False)
    )
    for axes, value in ((left, main_score), (right, loss)):
        means = family_means(lines, value)
        for family in families:
            mine = [line for line in lines if line["family"] == family]
            for points in task_points(mine, value).values():
                axes.plot(*_line(points), color=colours[family], linewidth=0.6, alpha=0.5)
            axes.plot(
                *_line(means.get(family, {})),
                color=colours[family],
                linewidth=2,
                marker="o",
                markersize=4,
                label=family,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    left.set_title("score: each task's first metric")
    left.set_ylim(0, 100)
    right.set_title("loss: nats per target token")
    right.set_ylim(bottom=0)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main_score(line: Line) -> float | None:
    """Return a task's first score from 0 to 100; bits per byte, better when low, is left to the loss."""
    return next((value for name, value in line["scores"].items() if name != "bits_per_byte"), None)


def loss(line: Line) -> float | None:
    """Return a task's loss."""
    return line["loss"]


def task_points(lines: Sequence[Line], value: Callable[[Line], float | None]) -> dict[str, Points]:
    """Return {task: {step: value}} where there are values."""
    tasks: dict[str, Points] = {}
    for line in lines:
        if (found := value(line)) is not None:
            tasks.setdefault(line["task"], {})[line["step"]] = found
    return tasks


def family_means(
    lines: Sequence[Line], value: Callable[[Line], float | None] = main_score
) -> dict[str, Points]:
    """Return {family: {step: mean over its tasks}}, at the steps where all its tasks have a value.

    A step where one task failed has no mean: it would compare other tasks.
    """
    means: dict[str, Points] = {}
    for family in sorted({line["family"] for line in lines}):
        tasks = list(task_points([line for line in lines if line["family"] == family], value).values())
        if tasks:
            steps = sorted(set.intersection(*map(set, tasks)))
            means[family] = {step: sum(points[step] for points in tasks) / len(tasks) for step in steps}
    return means


def _line(points: Points) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [points[step] for step in steps]
