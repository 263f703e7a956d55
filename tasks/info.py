"""What SeqIO does not say about a task: family, licence, citation, answer options, metrics known by name.

Kept beside the registry, so any seqio.Task can be described and none has to be subclassed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

DEFAULT_FAMILY = "default"


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """Facts about a task; `options` are its possible targets where they are a fixed set."""

    family: str = DEFAULT_FAMILY
    licence: str = ""
    citation: str = ""
    options: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    source: str = ""


_INFO: dict[str, TaskInfo] = {}


def describe(
    task_name: str,
    *,
    family: str,
    licence: str = "",
    citation: str = "",
    options: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    source: str = "",
) -> TaskInfo:
    """Record the facts about the seqio.Task `task_name`; a second call replaces the first.

    `metrics` are names in mtjax.metrics. Raises ValueError on an empty family or repeated options.
    """
    if not family:
        raise ValueError(f"Task {task_name!r} has an empty family; leave it out to get {DEFAULT_FAMILY!r}.")
    if options is not None and len(set(options)) != len(options):
        raise ValueError(f"Task {task_name!r} repeats an option: {list(options)}.")
    _INFO[task_name] = TaskInfo(
        family=family,
        licence=licence,
        citation=citation,
        options=None if options is None else tuple(options),
        metrics=tuple(metrics),
        source=source,
    )
    return _INFO[task_name]


def info(task_name: str) -> TaskInfo:
    """Return what `describe` recorded; a task never described is of the family 'default'."""
    return _INFO.get(task_name, TaskInfo())
