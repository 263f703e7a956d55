"""What the studies' tables have in common: one value a run and measure, grouped by tags, compared in pairs.

A measure is of one family, or of all: the mean over a family's target tasks, and over families the mean of
their means. Scores are what the task's first metric gives, 0 to 100; bits per byte are better when low. Nothing
is rescaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtjax.studies import statistics
from mtjax.studies.runs import Chart, Results, Run, Table

ALL = "all"
BITS, SCORE = "bits per byte", "score"
MEASURES = (BITS, SCORE)
NORMALISED = (
    "Each value is a mean over a family's target tasks; 'all' is the mean of the families' means. Nothing is rescaled. "
    "bits per byte: of the targets' text, lower is better. score: each task's first metric from 0 to 100, over the "
    "tasks that have one."
)
INTERVALS = (
    "Intervals: 95 % percentile bootstrap over runs of different seeds. Of few seeds they are too narrow: with "
    "three, take them as a spread. One run has no interval."
)

Key = tuple[str, str]  # measure, family


class Value(NamedTuple):
    """One run's value of one measure and family."""

    run: Run
    measure: str
    family: str
    value: float


def of_run(lines: Sequence[Mapping[str, Any]], *, split: str | None = None) -> dict[Key, float]:
    """Return a run's values by (measure, family), 'all' included, of one split or of all."""
    found: dict[str, dict[str, list[float]]] = {measure: {} for measure in MEASURES}
    for line in lines:
        if split is not None and line["split"] != split:
            continue
        found[BITS].setdefault(line["family"], []).append(line["bits_per_byte"])
        if line["scores"]:
            first = next(iter(line["scores"].values()))
            found[SCORE].setdefault(line["family"], []).append(first)
    values: dict[Key, float] = {}
    for measure, families in found.items():
        means = {family: float(np.mean(numbers)) for family, numbers in families.items()}
        values |= {(measure, family): mean for family, mean in means.items()}
        if means:
            values[measure, ALL] = float(np.mean(list(means.values())))
    return values


def values(runs: Sequence[Run], results: Results, *, split: str | None = None) -> list[Value]:
    """Return all values of the runs that have results."""
    return [
        Value(run, measure, family, value)
        for run in runs
        if (result := results.get(run.name))
        for (measure, family), value in of_run(result["targets"], split=split).items()
    ]


def keys(found: Sequence[Value]) -> list[Key]:
    """List the measures and families that any run has, 'all' first."""
    pairs = {(v.measure, v.family) for v in found}
    return sorted(pairs, key=lambda k: (MEASURES.index(k[0]), k[1] != ALL, k[1]))


def tag(run: Run, name: str) -> Any:
    """Return a run's tag; None where it has none of that name."""
    return run.tags.get(name)


def grouped(runs: Sequence[Run], by: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """Group runs by the values of their tags, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(tag(run, name) for name in by), []).append(run)
    return groups


def means(
    title: str,
    runs: Sequence[Run],
    results: Results,
    *,
    by: Sequence[str],
    split: str | None = None,
    charts: Sequence[Chart] = (),
) -> Table:
    """Tabulate the mean and interval of every measure for each group of runs with the same tags `by`.

    Runs without results are counted as missing, and are in no mean.
    """
    found = values(runs, results, split=split)
    rows = []
    for measure, family in keys(found):
        for group, members in grouped(runs, by).items():
            mine = [v.value for v in _of(found, members, measure, family)]
            if mine:
                e = statistics.estimate(mine)
                rows.append((measure, family, *group, e.mean, e.low, e.high, e.count, len(members) - e.count))
    columns = ("measure", "family", *by, "mean", "low", "high", "runs", "missing")
    return Table(title, columns, rows, (NORMALISED, INTERVALS), tuple(charts))


def differences(
    title: str,
    runs: Sequence[Run],
    results: Results,
    *,
    by: Sequence[str],
    baseline: Callable[[Run], bool],
    pair: Callable[[Run], Any],
    split: str | None = None,
) -> Table:
    """Tabulate paired differences from the baseline runs for each group of runs with the same tags `by`.

    Runs are compared with the baseline run of the same `pair`.
    """
    found = values(runs, results, split=split)
    rows, estimates = [], []
    base = [run for run in runs if baseline(run)]
    others = [run for run in runs if not baseline(run)]
    for measure, family in keys(found):
        theirs = {pair(v.run): v.value for v in _of(found, base, measure, family)}
        for group, members in grouped(others, by).items():
            # Several runs of one pair (subset seeds against one baseline) are differences of their own.
            gaps = [
                v.value - theirs[pair(v.run)]
                for v in _of(found, members, measure, family)
                if pair(v.run) in theirs
            ]
            if not gaps:
                continue
            e = statistics.estimate(gaps)
            better = -e.mean if measure == BITS else e.mean
            verdict = {None: "no interval", False: "within the interval"}.get(
                e.excludes_zero(), "better" if better > 0 else "worse"
            )
            rows.append((measure, family, *group, e.mean, e.low, e.high, e.count, verdict))
            estimates.append(e)
    columns = ("measure", "family", *by, "difference", "low", "high", "pairs", "verdict")
    return Table(title, columns, rows, (statistics.comparisons_note(estimates), NORMALISED, INTERVALS))


def _of(found: Sequence[Value], runs: Sequence[Run], measure: str, family: str) -> Iterator[Value]:
    names = {run.name for run in runs}
    return (v for v in found if v.run.name in names and (v.measure, v.family) == (measure, family))


def per_task(title: str, runs: Sequence[Run], results: Results, *, by: Sequence[str]) -> Table:
    """Tabulate every target task of every run as it was measured."""
    rows = []
    for run in runs:
        for line in (results.get(run.name) or {"targets": []})["targets"]:
            score = next(iter(line["scores"].items()), ("", None))
            tags = [tag(run, name) for name in by]
            counts = (line["num_examples"], line["num_tokens"])
            rows.append(
                (
                    line["task"],
                    line["family"],
                    line["split"],
                    *tags,
                    run.name,
                    line["bits_per_byte"],
                    *score,
                    *counts,
                )
            )
    columns = (
        "task",
        "family",
        "split",
        *by,
        "run",
        "bits per byte",
        "metric",
        "score",
        "examples",
        "tokens",
    )
    return Table(title, columns, rows)


def arms(
    runs: Sequence[Run], results: Results, *, baseline: str, split: str | None = None
) -> dict[str, Table]:
    """Tabulate runs by their tag 'arm', and the arms' differences from the baseline's, paired by 'seed'."""
    measured = [run for run in runs if run.targets]
    return {
        "arms": means("Targets by arm", measured, results, by=("arm",), split=split),
        "differences": differences(
            f"Against {baseline}, paired by seed",
            measured,
            results,
            by=("arm",),
            baseline=lambda run: run.tags["arm"] == baseline,
            pair=lambda run: run.tags["seed"],
            split=split,
        ),
        "targets": per_task("Every target", measured, results, by=("arm", "seed")),
    }
