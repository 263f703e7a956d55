"""Transfer between families: which families of tasks help which, trained together?

ExT5 (arXiv:2111.10952), section 2.2 and table 2: a model for each family alone and for each pair. A pair trained
for S steps sees each family in half of its examples. It is compared with the family alone for S / 2 steps (equal
data) and for S steps (equal compute).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mtjax.studies import reading, statistics
from mtjax.studies.runs import (
    Chart,
    Plan,
    Results,
    Run,
    Table,
    Targets,
    Task,
    draw,
    draw_groups,
    select,
    without,
)

HALF, FULL = "equal data", "equal compute"  # which single-family run a pair is compared with
START = "start"


def transfer(
    *,
    families: Sequence[str] | Mapping[str, Sequence[str]],
    steps: int,
    exclude: Sequence[str] = (),
    unsupervised: Sequence[str] = (),
    start_steps: int = 0,
    seeds: Sequence[int] = (0,),
    split: str = "test",
    mode: str = "rank",
    max_examples: int | None = None,
) -> Plan:
    """Plan each family alone, for `steps` and half of them, and each pair for `steps`.

    families: names, or {name: patterns of tasks}; give every task a name of its own for transfer between tasks.
    start_steps: steps of a run on unsupervised tasks that all others start from; 0 starts them anew. A run is
    evaluated on its own families, which it was trained on. Raises ValueError for fewer than two families, for
    an odd number of steps and where families share tasks.
    """
    if steps < 2 or steps % 2:
        raise ValueError(
            f"steps={steps} of a transfer study must be even: a family alone takes half of them too."
        )
    patterns = families if isinstance(families, Mapping) else {name: [f"{name}/*"] for name in families}
    if len(patterns) < 2:
        raise ValueError(f"Transfer is between at least two families, got {list(patterns)}.")

    def runs(tasks: Sequence[Task]) -> list[Run]:
        excluded = select(tasks, exclude, what="excluded task")
        members = {
            name: without(select(tasks, listed, what="task or family"), excluded)
            for name, listed in patterns.items()
        }
        for name, found in members.items():
            if not found:
                raise ValueError(f"No task of {name!r} is left; all are excluded.")
        for one, two in itertools.combinations(members, 2):
            if both := {t.name for t in members[one]} & {t.name for t in members[two]}:
                raise ValueError(f"{one!r} and {two!r} share the tasks {sorted(both)[:5]}.")
        planned = []
        for seed in seeds:
            first = None
            if start_steps:
                text = select(tasks, unsupervised, what="unsupervised task")
                first = f"{START}/seed={seed}"
                drawn = draw(tasks, supervised=(), unsupervised=text)
                planned.append(Run(first, drawn | {"RANDOM_SEED": seed, "TRAIN_STEPS": start_steps}))
            groups = [(name,) for name in members] + list(itertools.combinations(members, 2))
            for group in groups:
                for budget in (HALF, FULL) if len(group) == 1 else (FULL,):
                    planned.append(_run(tasks, members, group, budget, seed=seed, first=first))
        return planned

    def _run(tasks, members, group, budget, *, seed: int, first: str | None) -> Run:
        drawn = draw_groups(tasks, {name: (members[name], 1.0) for name in group})
        count = steps // 2 if budget == HALF else steps
        goals = tuple(task.name for name in group for task in members[name])
        aims = (Targets(goals, split, mode, max_examples, held_out=False),)
        tags = {"families": list(group), "budget": budget, "seed": seed}
        tags["tasks"] = {name: [task.name for task in members[name]] for name in group}
        overrides = drawn | {"RANDOM_SEED": seed, "TRAIN_STEPS": count}
        return Run(f"{'+'.join(group)}/steps={count}/seed={seed}", overrides, first, None, aims, tags)

    return Plan(runs, read, "Which families of tasks help which, trained together?")


def read(runs: Sequence[Run], results: Results) -> dict[str, Table]:
    """Tabulate the gain of every directed pair, each family's mean gain to others, and negative relations."""
    measured = [run for run in runs if run.targets]
    found = {run.name: _values(run, results.get(run.name)) for run in measured}
    alone = {
        (run.tags["families"][0], run.tags["budget"], run.tags["seed"]): found[run.name]
        for run in measured
        if len(run.tags["families"]) == 1
    }
    pairs = [run for run in measured if len(run.tags["families"]) == 2]
    names = list(dict.fromkeys(name for name, *_ in alone))
    rows, estimates = [], []
    gains: dict[tuple[str, str, str], list[float]] = {}
    for measure, budget in itertools.product(reading.MEASURES, (HALF, FULL)):
        for source, target in itertools.permutations(names, 2):
            values = [
                (found[run.name][target, measure], alone[target, budget, run.tags["seed"]][target, measure])
                for run in pairs
                if {source, target} == set(run.tags["families"])
                and (target, measure) in found[run.name]
                and (target, measure) in alone[target, budget, run.tags["seed"]]
            ]
            if not values:
                continue
            sign = -1 if measure == reading.BITS else 1
            e = statistics.estimate([sign * (with_source - without) for with_source, without in values])
            estimates.append(e)
            gains.setdefault((measure, budget, source), []).append(e.mean)
            together, single = (sum(column) / len(values) for column in zip(*values, strict=True))
            rows.append((measure, budget, source, target, together, single, e.mean, e.low, e.high, e.count))
    columns = ("measure", "budget", "source", "target", "together", "alone", "gain", "low", "high", "seeds")
    notes = (
        "gain: how much better the target's family scores when trained together with the source than alone; "
        "positive is better in both measures.",
        "equal data: alone for half the steps; equal compute: alone for all of them.",
        statistics.comparisons_note(estimates),
        reading.NORMALISED,
        reading.INTERVALS,
    )
    chart = Chart("matrix", x="target", y="gain", by="source")
    sources = [
        (measure, budget, source, sum(values) / len(values), sum(v < 0 for v in values), len(values))
        for (measure, budget, source), values in gains.items()
    ]
    sources.sort(key=lambda row: (row[0], row[1], -row[3]))
    return {
        "matrix": Table("Transfer from source to target", columns, rows, notes, (chart,)),
        "sources": Table(
            "What a family gives to the others",
            ("measure", "budget", "source", "mean gain", "negative", "relations"),
            sources,
            ("mean gain: over the other families.", notes[1]),
        ),
        "negative": _negative(gains),
        "targets": reading.per_task("Every task", measured, results, by=("families", "budget", "seed")),
    }


def _negative(gains: Mapping[tuple[str, str, str], Sequence[float]]) -> Table:
    counts: dict[tuple[str, str], list[int]] = {}
    for (measure, budget, _), values in gains.items():
        count = counts.setdefault((measure, budget), [0, 0])
        count[0] += sum(value < 0 for value in values)
        count[1] += len(values)
    rows = [(measure, budget, *count) for (measure, budget), count in counts.items()]
    note = "ExT5 base on its eight families counted 21 of 56 at equal data and 38 of 56 at equal compute."
    return Table("Negative relations", ("measure", "budget", "negative", "relations"), rows, (note,))


def _values(run: Run, result: Mapping[str, Any] | None) -> dict[tuple[str, str], float]:
    """Return a run's values by (family of the study, measure)."""
    if result is None:
        return {}
    owner = {task: name for name, tasks in run.tags["tasks"].items() for task in tasks}
    lines = [{**line, "family": owner[line["task"]]} for line in result["targets"]]
    found = reading.of_run(lines)
    return {(family, measure): value for (measure, family), value in found.items() if family != reading.ALL}
