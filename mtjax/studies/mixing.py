"""Rate schedules and caps against each other, with tuned static rates as the baseline.

A schedule must beat the best static rates, not the default ones. The best are chosen on one split and all arms are
compared on another, so the choice does not flatter the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtjax.studies import reading
from mtjax.studies.runs import Overrides, Plan, Results, Run, Table, Targets, Task, draw, part

STATIC, SCHEDULE = "static", "schedule"


def mixing(
    *,
    static: Mapping[str, Overrides],
    schedules: Mapping[str, Overrides],
    targets: Sequence[str],
    unsupervised: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ratio: float = 2.0,
    seeds: Sequence[int] = (0, 1, 2),
    held_out: bool = False,
    tuning_split: str = "validation",
    split: str = "test",
    mode: str = "rank",
    max_examples: int | None = None,
) -> Plan:
    """Plan a run an arm and seed; an arm is a name with overrides, such as {'rates.ratio.within': '@rates.equal()'}.

    held_out: whether the targets' families are left out of training; else the targets are trained on. The other
    arguments are those of scaling.scaling. Raises ValueError where there is no static arm or a name is used twice.
    """
    if not static:
        raise ValueError("A study of mixing needs a static arm to compare with.")
    if both := set(static) & set(schedules):
        raise ValueError(f"{sorted(both)[0]!r} is a static arm and a schedule.")
    arms: dict[str, tuple[str, Mapping[str, Any]]] = {name: (STATIC, given) for name, given in static.items()}
    arms |= {name: (SCHEDULE, given) for name, given in schedules.items()}

    def runs(tasks: Sequence[Task]) -> list[Run]:
        parts = part(
            tasks, targets=targets, unsupervised=unsupervised, exclude=exclude, hold_out_families=held_out
        )
        goals = tuple(task.name for task in parts.goals)
        aims = tuple(
            Targets(goals, one, mode, max_examples, held_out) for one in dict.fromkeys((tuning_split, split))
        )
        trained = parts.pool if held_out else [*parts.pool, *parts.goals]
        drawn = draw(tasks, supervised=trained, unsupervised=parts.text, ratio=ratio)
        return [
            Run(
                f"{name}/seed={seed}",
                drawn | {"RANDOM_SEED": seed} | dict(given),
                targets=aims,
                tags={"arm": name, "kind": kind, "seed": seed},
            )
            for name, (kind, given) in arms.items()
            for seed in seeds
        ]

    def read(runs: Sequence[Run], results: Results) -> dict[str, Table]:
        """Tabulate the arms, and their paired differences from the best static one."""
        best = best_static(runs, results, split=tuning_split)
        tables = reading.arms(runs, results, baseline=best, split=split)
        note = f"Baseline: {best}, the best static arm by mean bits per byte on {tuning_split}."
        changed = tables["differences"]
        return tables | {"differences": changed._replace(notes=(note, *changed.notes))}

    return Plan(runs, read, "Do schedules of rates beat tuned static rates?")


def best_static(runs: Sequence[Run], results: Results, *, split: str) -> str:
    """Return the static arm with the fewest mean bits per byte; the first one where none has results."""
    static = [run for run in runs if run.tags["kind"] == STATIC]
    found: dict[str, list[float]] = {}
    for value in reading.values(static, results, split=split):
        if (value.measure, value.family) == (reading.BITS, reading.ALL):
            found.setdefault(value.run.tags["arm"], []).append(value.value)
    if not found:
        return static[0].tags["arm"]
    return min(found, key=lambda arm: sum(found[arm]) / len(found[arm]))
