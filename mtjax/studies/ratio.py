"""The mixing ratio R: how many unsupervised examples to one supervised?

ExT5 (arXiv:2111.10952), section 3.4 and figure 2: from supervised tasks only (R = 0) to text only (R infinite).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtjax.studies import reading
from mtjax.studies.runs import Chart, Plan, Results, Run, Table, Targets, Task, draw, evaluated, part

TEXT_ONLY = "unsupervised only"


def ratio(
    *,
    ratios: Sequence[float | str],
    targets: Sequence[str],
    unsupervised: Sequence[str],
    exclude: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    hold_out_families: bool = True,
    split: str = "test",
    mode: str = "rank",
    max_examples: int | None = None,
    fine_tune: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a run a ratio and seed; 0 is supervised only, 'unsupervised only' or 'inf' is text only.

    The other arguments are those of scaling.scaling. Raises ValueError for a ratio that is negative or twice there.
    """
    values = [math.inf if value == TEXT_ONLY else float(value) for value in ratios]
    if len(set(values)) < len(values) or any(not value >= 0 for value in values):
        raise ValueError(f"Ratios must be different and not negative, got {list(ratios)}.")

    def runs(tasks: Sequence[Task]) -> list[Run]:
        parts = part(
            tasks,
            targets=targets,
            unsupervised=unsupervised,
            exclude=exclude,
            hold_out_families=hold_out_families,
        )
        aim = Targets(tuple(task.name for task in parts.goals), split, mode, max_examples)
        planned = []
        for seed in seeds:
            tuned = draw(tasks, supervised=parts.goals) | {"RANDOM_SEED": seed}
            for value in values:
                label = TEXT_ONLY if value == math.inf else value
                drawn = draw(tasks, supervised=parts.pool, unsupervised=parts.text, ratio=value)
                name = f"R={'inf' if value == math.inf else format(value, 'g')}/seed={seed}"
                run = Run(name, drawn | {"RANDOM_SEED": seed}, tags={"R": label, "seed": seed})
                planned += evaluated(run, aim, tuned=None if fine_tune is None else tuned | dict(fine_tune))
        return planned

    return Plan(runs, read, "How many unsupervised examples to one supervised?")


def read(runs: Sequence[Run], results: Results) -> dict[str, Table]:
    """Tabulate scores by ratio, and paired differences from text only (else the first ratio)."""
    measured = [run for run in runs if run.targets]
    labels = [run.tags["R"] for run in measured]
    base = TEXT_ONLY if TEXT_ONLY in labels else labels[0]
    chart = Chart("curve", x="R", y="mean", low="low", high="high")
    return {
        "ratios": reading.means("Targets by ratio R", measured, results, by=("R",), charts=[chart]),
        "differences": reading.differences(
            f"Against R = {base}, paired by seed",
            measured,
            results,
            by=("R",),
            baseline=lambda run: run.tags["R"] == base,
            pair=lambda run: run.tags["seed"],
        ),
        "targets": reading.per_task("Every target", measured, results, by=("R", "seed")),
    }
