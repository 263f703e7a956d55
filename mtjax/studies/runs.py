"""What a study is: runs that depend on each other, and how their results become tables."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from mtjax import tree

RATE_GROUPS, RATE_WEIGHTS = "RATE_GROUPS", "RATE_WEIGHTS"  # the macros by which a run says what it draws
MODES = ("likelihood", "rank", "greedy")
Overrides = Mapping[str, Any]
"""Macro or parameter of the recipe → literal; a string that begins with @ or % is a reference."""


class Task(NamedTuple):
    """What a plan may know of a task of the study's mixture."""

    name: str
    family: str
    num_examples: int  # of training
    splits: tuple[str, ...] = ("train", "validation", "test")


class Targets(NamedTuple):
    """What a trained run is evaluated on.

    mode: "likelihood" scores the targets (bits per byte); "rank" also ranks the options of the tasks that list
    them; "greedy" also decodes. held_out: whether the run and those it starts from must not have trained on them.
    tuned: whether the run itself, which fine-tunes on them, may.
    """

    tasks: tuple[str, ...]
    split: str = "validation"
    mode: str = "rank"
    max_examples: int | None = None
    held_out: bool = True
    tuned: bool = False


class Run(NamedTuple):
    """One training run: the study's recipe with `overrides`, evaluated at its end.

    start: the run whose parameters it starts from, and the step (None: the last). tags: its place in the
    study, by which results are grouped.
    """

    name: str
    overrides: Overrides
    start: str | None = None
    start_step: int | None = None
    targets: tuple[Targets, ...] = ()
    tags: Mapping[str, Any] = MappingProxyType({})


class Chart(NamedTuple):
    """How to draw a table: kind "curve" or "matrix", by names of its columns."""

    kind: str
    x: str
    y: str
    by: str = ""  # curve: a line each; matrix: what its rows are
    low: str = ""
    high: str = ""
    log_x: bool = False


class Table(NamedTuple):
    """Rows of results, with what a reader must know of them."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()


Results = Mapping[str, Mapping[str, Any] | None]
"""What execute.run returned, by run name; None where a run has no results (failed, blocked, not yet run)."""


class Plan(NamedTuple):
    """A kind of study: a function that plans runs, and one that reads results into tables by file name."""

    runs: Callable[[Sequence[Task]], list[Run]]
    read: Callable[[Sequence[Run], Results], dict[str, Table]]
    question: str = ""


class Guards(NamedTuple):
    """What a study refuses. See guards.py."""

    unreported: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    overlap: float | None = 0.05
    ngram: int = 13


class Study(NamedTuple):
    """A named plan with its guards."""

    name: str
    plan: Plan
    guards: Guards


def study(
    *,
    name: str,
    plan: Plan,
    unreported: Sequence[str] = (),
    allowed: Sequence[str] = (),
    overlap: float | None = 0.05,
    ngram: int = 13,
) -> Study:
    """Name a plan and say what it must refuse; recipes bind this function.

    unreported: names or patterns of tasks whose scores must not be reported, as BIG-bench's authors ask of
    those who train on it. allowed: tasks for which the guards make an exception. overlap: the largest share of a
    target's examples that may share an n-gram of `ngram` words with a task that is trained on; None checks
    nothing. Raises ValueError for a name that is no folder's.
    """
    if not re.fullmatch(r"\w[\w.-]*", name) or name in ("runs", "guards"):
        raise ValueError(f"Study name {name!r} must be made of letters, digits and _ . - and not be 'runs'.")
    return Study(name, plan, Guards(tuple(unreported), tuple(allowed), overlap, ngram))


# Choosing tasks.


def select(tasks: Sequence[Task], patterns: Iterable[str], *, what: str) -> list[Task]:
    """Return the tasks that a pattern fits, in their order.

    A pattern is a task's name, a shell pattern of names, or one of family/name ('nli/*'). Raises ValueError
    where one fits no task.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = [t.name for t in tasks if _fits(pattern, t)]
        if not found:
            names = [t.name for t in tasks] + sorted({f"{t.family}/*" for t in tasks})
            raise tree.unknown_name(what, pattern, names)
        chosen.update(found)
    return [task for task in tasks if task.name in chosen]


def _fits(pattern: str, task: Task) -> bool:
    names = (task.name, f"{task.family}/{task.name}")
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def without(tasks: Sequence[Task], *others: Sequence[Task]) -> list[Task]:
    """Return the tasks that are in none of the others."""
    names = {task.name for group in others for task in group}
    return [task for task in tasks if task.name not in names]


def draw(
    tasks: Sequence[Task],
    *,
    supervised: Iterable[Task],
    unsupervised: Iterable[Task] = (),
    ratio: float = 1.0,
) -> dict[str, Any]:
    """Return the overrides by which a run draws `ratio` unsupervised examples to one supervised, others not at all.

    A ratio of 0 draws supervised tasks only, infinity unsupervised ones only; so does a group without tasks.
    """
    if ratio < 0 or math.isnan(ratio):
        raise ValueError(f"A ratio of unsupervised to supervised examples must not be negative, got {ratio}.")
    labelled, text = list(supervised), list(unsupervised)
    if ratio == 0 and labelled:
        text = []
    if ratio == math.inf and text:
        labelled = []
    weight = float(ratio) if ratio not in (0, math.inf) else 1.0
    return draw_groups(tasks, {"supervised": (labelled, 1.0), "unsupervised": (text, weight)})


def draw_groups(tasks: Sequence[Task], groups: Mapping[str, tuple[Sequence[Task], float]]) -> dict[str, Any]:
    """Return the overrides by which a run draws groups of tasks in the ratio of their weights, others not at all.

    All runs of a study keep the whole task table, so they share one compiled step.
    """
    members = {group: [task.name for task in drawn] for group, (drawn, _) in groups.items() if drawn}
    drawn = [name for names in members.values() for name in names]
    if twice := [name for name in drawn if drawn.count(name) > 1]:
        raise ValueError(f"Task {twice[0]!r} is drawn in two groups of {list(groups)}.")
    if not drawn:
        raise ValueError("A run draws no task at all; give supervised or unsupervised tasks.")
    members["out"] = [task.name for task in tasks if task.name not in drawn]
    named = {group: sorted(names) for group, names in members.items() if names}
    weights = {group: groups[group][1] if group in groups else 0.0 for group in named}
    return {RATE_GROUPS: named, RATE_WEIGHTS: weights}


class Parts(NamedTuple):
    """The tasks of a study: the targets, unsupervised text, and what may be pretrained on."""

    goals: list[Task]
    text: list[Task]
    pool: list[Task]


def part(
    tasks: Sequence[Task],
    *,
    targets: Iterable[str],
    unsupervised: Iterable[str] = (),
    exclude: Iterable[str] = (),
    hold_out_families: bool = True,
) -> Parts:
    """Divide a mixture's tasks by patterns; with hold_out_families no task of a target's family is in the pool."""
    text = select(tasks, unsupervised, what="unsupervised task")
    excluded = select(tasks, exclude, what="excluded task")
    goals = without(select(tasks, targets, what="target"), excluded)
    families = {task.family for task in goals} if hold_out_families else set()
    pool = [task for task in without(tasks, goals, text, excluded) if task.family not in families]
    return Parts(goals, text, pool)


def evaluated(run: Run, aim: Targets, *, tuned: Overrides | None) -> list[Run]:
    """Evaluate a run as it is, or after a second run that starts from its end with the overrides `tuned`."""
    if tuned is None:
        return [run._replace(targets=(aim,), tags={**run.tags, "measured": "directly"})]
    tags = {**run.tags, "measured": "fine-tuned"}
    return [
        run,
        Run(f"{run.name}/fine_tuned", tuned, start=run.name, targets=(aim._replace(tuned=True),), tags=tags),
    ]


# Checking and naming runs.


def check(runs: Sequence[Run], tasks: Sequence[Task]) -> None:
    """Raise ValueError where runs do not fit together, or where targets are not in the mixture."""
    if not runs:
        raise ValueError("The study plans no run.")
    names = [run.name for run in runs]
    known = {task.name: task for task in tasks}
    for i, run in enumerate(runs):
        if run.name in names[:i]:
            raise ValueError(f"Two runs of the study are named {run.name!r}.")
        if run.start is not None and run.start not in names[:i]:
            raise tree.unknown_name(
                f"run that {run.name!r} starts from (an earlier one)", run.start, names[:i]
            )
        for targets in run.targets:
            if targets.mode not in MODES:
                raise tree.unknown_name(f"mode of the targets of {run.name!r}", targets.mode, MODES)
            if not targets.tasks:
                raise ValueError(f"Run {run.name!r} is evaluated on no target.")
            for name in targets.tasks:
                if name not in known:
                    raise tree.unknown_name("target", name, list(known))
                if targets.split not in known[name].splits:
                    raise tree.unknown_name(f"split of target {name!r}", targets.split, known[name].splits)


def ids(runs: Sequence[Run], recipes: Mapping[str, Any], data: str) -> dict[str, str]:
    """Return each run's id: a hash of its resolved recipe, its data, its targets and its parent's id.

    recipes: what a run's recipe says, in JSON, by run name. data: a hash of the data's fingerprints. Equal
    runs have equal ids, in other studies too.
    """
    found: dict[str, str] = {}
    for run in runs:
        parent = None if run.start is None else [found[run.start], run.start_step]
        content = [recipes[run.name], data, [list(targets) for targets in run.targets], parent]
        text = json.dumps(content, sort_keys=True)
        found[run.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def ancestors(run: Run, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that `run` starts from, the nearest first."""
    by_name = {other.name: other for other in runs}
    found: list[Run] = []
    while run.start is not None:
        run = by_name[run.start]
        found.append(run)
    return found
