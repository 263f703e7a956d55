"""Where a study stands: a table of its runs, live on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ORDER = ("failed", "blocked", "running", "ready", "waiting", "done")  # what needs a look comes first
REFRESH_S = 2.0
LONGEST = 40  # rows of a live table; all of them when piped


def show(opened: Any, states: Callable[[], Mapping[str, Any]], console: Any) -> None:
    """Print the table; on a terminal until nothing runs, or Ctrl-C."""
    if not console.is_terminal:
        console.print(table(opened, states()))
        return
    from rich.live import Live

    with Live(console=console, refresh_per_second=4) as live:
        while True:
            now = states()
            live.update(table(opened, now, longest=LONGEST))
            if not any(state.status == "running" for state in now.values()):
                return
            try:
                time.sleep(REFRESH_S)
            except KeyboardInterrupt:
                return


def table(opened: Any, states: Mapping[str, Any], *, longest: int | None = None) -> Any:
    """Build the table: a row a run, failures first."""
    from mtjax.launch import screen

    rows = sorted(_rows(opened, states), key=lambda row: ORDER.index(row[1]))
    counts = {status: sum(row[1] == status for row in rows) for status in ORDER}
    title = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    shown = rows[:longest]
    left = f" (the first {len(shown)} rows)" if len(shown) < len(rows) else ""
    columns = ("run", "status", "attempts", "step", "of", "loss", "time left", "worker or error")
    return screen.table(f"{opened.study.name}: {title}{left}", columns, shown)


def _rows(opened: Any, states: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    from mtjax.launch import screen
    from mtjax.studies import execute

    for node in opened.nodes:
        state, steps = states[node.run.name], opened.costs[node.run.name].steps
        attempts = state.attempt.number if state.attempt else 0
        lines = [line for line in execute.log_lines(node.model_dir) if "train/loss" in line]
        last = lines[-1] if lines else {}
        step, loss = last.get("step", 0), last.get("train/loss")
        left, note = "", state.error[:120]
        if state.status == "running":
            per_second = last.get("train/steps_per_second")
            left = screen.duration((steps - step) / per_second) if per_second else ""
            note = f"{state.attempt.owner.get('node')} {state.attempt.owner.get('pid')}"
        yield (node.run.name, state.status, attempts, step, steps, "-" if loss is None else loss, left, note)
