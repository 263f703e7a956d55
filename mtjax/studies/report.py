"""A study's report: one HTML page that opens offline, its tables as CSV, its plots as PNG."""

from __future__ import annotations

import csv
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtjax.data import publish
from mtjax.studies import execute, figures, work
from mtjax.studies.claims import State
from mtjax.studies.runs import Study, Table

PAGE = "index.html"
POINTS = 100  # of a loss curve; longer ones are thinned
_ORDER = ("failed", "blocked", "running", "ready", "waiting", "done")
_TEMPLATE = Path(__file__).with_name("page.html")


def write(
    study: Study,
    nodes: Sequence[work.Node],
    states: Mapping[str, State],
    manifest: Mapping[str, Any],
    folder: Path,
) -> Path:
    """Write the report of what is there by now into a folder, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = study.plan.read([node.run for node in nodes], work.read_results(nodes))
    tables = {"runs": runs_table(nodes, states, folder), **tables}
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
        figures.write(folder, name, table)
    losses = {node.run.name: loss_curves(node.model_dir) for node in nodes}
    content = {
        "study": study.name,
        "question": study.plan.question,
        "summary": summary(states),
        "tables": [
            {"name": name, **table._asdict(), "charts": [c._asdict() for c in table.charts]}
            for name, table in tables.items()
        ],
        "losses": {name: curves for name, curves in losses.items() if curves["tasks"]},
        "guards": manifest.get("guards", []),
        "manifest": dict(manifest),
    }
    page = folder / PAGE
    publish.write(page, _page(study.name, content).encode("utf-8"))
    return page


def _page(title: str, content: Mapping[str, Any]) -> str:
    from plotly.offline import get_plotlyjs  # five megabytes, which only reports read

    data = json.dumps(_plain(content), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {"{{title}}": html.escape(title), "{{plotly}}": get_plotlyjs(), "{{data}}": data}
    text = _TEMPLATE.read_text("utf-8")
    for mark, value in parts.items():
        before, _, after = text.partition(mark)
        text = before + value + after
    return text


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: no NaN, no infinity, no tuples."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def summary(states: Mapping[str, State]) -> str:
    """Say how many runs are where; what is not done is in no mean."""
    counts = {status: sum(s.status == status for s in states.values()) for status in _ORDER}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    missing = len(states) - counts["done"]
    return f"{len(states)} runs: {said}." + (
        f" {missing} are in no mean; tables count them as missing." if missing else ""
    )


def runs_table(nodes: Sequence[work.Node], states: Mapping[str, State], folder: Path) -> Table:
    """Tabulate the runs, failures first; `folder` of a run is relative to the report's."""
    rows = []
    for node in sorted(nodes, key=lambda node: _ORDER.index(states[node.run.name].status)):
        state = states[node.run.name]
        result = work.read_results([node])[node.run.name] or {}
        execution = work.read_execution(node)
        rows.append(
            (
                node.run.name,
                state.status,
                state.failures,
                result.get("step"),
                result.get("positions"),
                result.get("loss"),
                execution.get("seconds"),
                node.run.start or "",
                os.path.relpath(node.folder, folder),
                state.error,
            )
        )
    columns = (
        "run",
        "status",
        "failures",
        "steps",
        "positions",
        "last loss",
        "seconds",
        "starts from",
        "folder",
        "error",
    )
    notes = (
        "seconds: of the attempt that finished the run. last loss: training loss over the last logged steps.",
    )
    return Table("Runs", columns, rows, notes)


def write_csv(path: Path, table: Table) -> None:
    """Write a table's rows; what a reader must know of them stands in lines that begin with #."""
    unfinished = path.with_suffix(".partial")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {line}\n" for line in (table.title, *table.notes))
        lines = csv.writer(file)
        lines.writerow(table.columns)
        lines.writerows([["" if value is None else _cell(value) for value in row] for row in table.rows])
    unfinished.replace(path)


def _cell(value: Any) -> Any:
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def loss_curves(model_dir: Path) -> dict[str, Any]:
    """Return a run's training loss over steps, by task and of all tokens, thinned to POINTS."""
    lines = [line for line in execute.log_lines(model_dir) if "train/loss" in line]
    lines = lines[:: max(1, -(-len(lines) // POINTS))]
    tasks: dict[str, list[float | None]] = {"all": [line["train/loss"] for line in lines]}
    names = sorted(
        {name for line in lines for name in line if name.startswith("task/") and name.endswith("/loss")}
    )
    for name in names:
        values = [line.get(name) for line in lines]
        if any(value is not None for value in values):
            tasks[name.removeprefix("task/").removesuffix("/loss")] = values
    return {"steps": [line["step"] for line in lines], "tasks": tasks if lines else {}}
