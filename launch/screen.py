"""What commands print: tables, progress bars, numbers people can read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; output that is piped is not cut at 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    width = (
        None if stream.isatty() or "COLUMNS" in os.environ else max(200, shutil.get_terminal_size().columns)
    )
    return Console(stderr=stderr, width=width, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Build a table; columns of numbers are right-aligned."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(columns):
        is_number = all(isinstance(row[i], int | float) or row[i] in ("", "-") for row in rows)
        result.add_column(name, justify="right" if is_number and rows else "left", overflow="fold")
    for row in rows:
        result.add_row(*(_cell(value) for value in row))
    return result


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("[", r"\[")


def size(num_bytes: float) -> str:
    """Write a number of bytes, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Write a time, e.g. 1:02:03, or 12.3 days."""
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:,.1f} days"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextmanager
def status(description: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done on stderr while the body runs; nothing when piped."""
    with console(stderr=True).status(description) as shown:
        yield lambda text: shown.update(f"{description}: {text}")


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on stderr: yields update(done, total, what). When piped, a plain line per tenth."""
    if not sys.stderr.isatty():
        yield _plain(description)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, what="")
        yield lambda done, total, what="": bar.update(task, completed=done, total=total, what=what)


def _plain(description: str) -> Callable[[int, int, str], None]:
    shown = -1

    def update(done: int, total: int, what: str = "") -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)
        if tenth > shown:
            shown = tenth
            print(f"{description}: {done} of {total} {what}".rstrip(), file=sys.stderr, flush=True)

    return update
