"""A table's charts as PNG files: curves with intervals, matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a display

from mtjax.studies.reading import ALL
from mtjax.studies.runs import Chart, Table

FACETS = ("measure", "family", "budget")  # columns that divide a table into plots


def write(folder: Path, name: str, table: Table) -> list[Path]:
    """Plot a table's charts, one file a combination of its facets (of families, only all); return the files."""
    files = []
    for chart in table.charts:
        for facet, rows in facets(table).items():
            if "family" in table.columns and ALL not in facet:
                continue
            path = folder / "-".join([name, *(part.replace(" ", "_") for part in facet if part != ALL)])
            path = path.with_name(path.name + ".png")
            title = f"{table.title}: {', '.join(facet)}"
            {"curve": _curve, "matrix": _matrix}[chart.kind](path, chart, rows, title)
            files.append(path)
    return files


def facets(table: Table) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Divide a table's rows, as dicts, by the values of its facets."""
    used = [name for name in FACETS if name in table.columns]
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in table.rows:
        named = dict(zip(table.columns, row, strict=True))
        found.setdefault(tuple(str(named[name]) for name in used), []).append(named)
    return found


def _curve(path: Path, chart: Chart, rows: list[dict[str, Any]], title: str) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    xs = [row[chart.x] for row in rows]
    is_numeric = all(isinstance(x, int | float) for x in xs)
    places = {x: x if is_numeric else i for i, x in enumerate(dict.fromkeys(xs))}
    lines: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row.get(chart.by), []).append(row)
    for label, members in lines.items():
        at = [places[row[chart.x]] for row in members]
        (drawn,) = axes.plot(at, [row[chart.y] for row in members], marker="o", label=label)
        sure = [row for row in members if row.get(chart.low) is not None]
        axes.vlines(
            [places[row[chart.x]] for row in sure],
            [row[chart.low] for row in sure],
            [row[chart.high] for row in sure],
            color=drawn.get_color(),
            alpha=0.5,
            linewidth=3,
        )
    if not is_numeric:
        axes.set_xticks(list(places.values()), [str(x) for x in places])
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.grid(alpha=0.3)
    if chart.by and list(lines) != [None]:
        axes.legend(title=chart.by)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def _matrix(path: Path, chart: Chart, rows: list[dict[str, Any]], title: str) -> None:
    across = list(dict.fromkeys(row[chart.x] for row in rows))
    down = list(dict.fromkeys(row[chart.by] for row in rows))
    names = sorted({*across, *down}, key=lambda name: (name not in down, (down + across).index(name)))
    values = np.full((len(names), len(names)), np.nan)
    for row in rows:
        values[names.index(row[chart.by]), names.index(row[chart.x])] = row[chart.y]
    figure = Figure(figsize=(2.5 + 0.8 * len(names), 2 + 0.6 * len(names)), layout="constrained")
    axes = figure.subplots()
    limit = float(np.nanmax(np.abs(values))) or 1.0
    image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set(xlabel=chart.x, ylabel=chart.by)
    for i, j in np.argwhere(np.isfinite(values)):
        axes.text(j, i, f"{values[i, j]:.2g}", ha="center", va="center", fontsize="x-small")
    figure.colorbar(image, label=chart.y)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)
