"""Task scaling: does pretraining on more tasks help tasks that it has not seen?

ExT5 (arXiv:2111.10952), section 3.5 and figure 3: nested random subsets of the tasks, each a superset of the
one before, from none (unsupervised text only) to all of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mtjax.studies import reading
from mtjax.studies.runs import (
    Chart,
    Plan,
    Results,
    Run,
    Table,
    Targets,
    Task,
    draw,
    evaluated,
    part,
    select,
    without,
)


def scaling(
    *,
    counts: Sequence[int | str] = (),
    subsets: Sequence[Sequence[str]] = (),
    targets: Sequence[str],
    unsupervised: Sequence[str],
    exclude: Sequence[str] = (),
    ratio: float = 2.0,
    seeds: Sequence[tuple[int, int]] = ((0, 0), (1, 1), (2, 2)),
    batch_sizes: Sequence[int] = (),
    hold_out_families: bool = True,
    split: str = "test",
    mode: str = "rank",
    max_examples: int | None = None,
    fine_tune: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan runs on nested random subsets of the tasks.

    counts: the subsets' sizes in ascending order, 'all' for all tasks; or `subsets`, patterns of each.
    targets, unsupervised, exclude: names or patterns of tasks; with hold_out_families the targets' whole
    families are held out. ratio: unsupervised examples to one supervised. seeds: (subset seed, training seed) of
    each repetition. fine_tune: overrides of a second run that trains on the targets from each run's end; None
    evaluates the pretrained runs directly. Raises ValueError, when planning, for subsets that do not nest.
    """
    if bool(counts) == bool(subsets):
        raise ValueError("Task scaling takes either counts or subsets.")

    def runs(tasks: Sequence[Task]) -> list[Run]:
        parts = part(
            tasks,
            targets=targets,
            unsupervised=unsupervised,
            exclude=exclude,
            hold_out_families=hold_out_families,
        )
        aim = Targets(tuple(task.name for task in parts.goals), split, mode, max_examples)
        planned: dict[str, Run] = {}
        for subset_seed, seed in dict.fromkeys(map(tuple, seeds)):
            for chosen in _nested(parts.pool, counts=counts, subsets=subsets, seed=subset_seed):
                is_random = 0 < len(chosen) < len(parts.pool) and not subsets
                drawn = draw(tasks, supervised=chosen, unsupervised=parts.text, ratio=ratio)
                for batch in batch_sizes or [None]:
                    name = "/".join(
                        [
                            f"tasks={len(chosen)}",
                            *([f"batch={batch}"] if batch else []),
                            *([f"subset={subset_seed}"] if is_random else []),
                            f"seed={seed}",
                        ]
                    )
                    size = {"BATCH_SIZE": batch} if batch else {}
                    tags = {"tasks": len(chosen), "batch size": batch, "seed": seed}
                    tags["subset seed"] = subset_seed if is_random else None
                    run = Run(name, drawn | {"RANDOM_SEED": seed} | size, tags=tags)
                    tuned = draw(tasks, supervised=parts.goals) | {"RANDOM_SEED": seed}
                    found = evaluated(run, aim, tuned=None if fine_tune is None else tuned | dict(fine_tune))
                    planned |= {one.name: one for one in found}  # none and all need no subset seed
        return list(planned.values())

    return Plan(runs, read, "Does pretraining on more tasks help tasks that it has not seen?")


def _nested(
    pool: Sequence[Task], *, counts: Sequence[int | str], subsets: Sequence[Sequence[str]], seed: int
) -> list[list[Task]]:
    """Return subsets of the pool, each a superset of the one before."""
    if subsets:
        return _explicit(pool, subsets)
    sizes: list[int] = []
    for count in counts:
        size = len(pool) if count == "all" else count
        if not isinstance(size, int) or not 0 <= size <= len(pool):
            raise ValueError(
                f"A subset of {count!r} tasks cannot be drawn: {len(pool)} tasks are left beside the targets, "
                "their families, unsupervised and excluded tasks. Give numbers up to that, or 'all'."
            )
        sizes.append(size)
    if any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"Subsets nest only in ascending order of size; got counts {sizes}.")
    order = sorted(pool, key=lambda task: task.name)
    random.Random(f"subset {seed}").shuffle(order)
    return [order[:size] for size in sizes]


def _explicit(pool: Sequence[Task], subsets: Sequence[Sequence[str]]) -> list[list[Task]]:
    found = [select(pool, patterns, what="task of a subset") for patterns in subsets]
    for i, (smaller, larger) in enumerate(itertools.pairwise(found)):
        if left := without(smaller, larger):
            raise ValueError(
                f"The subsets do not nest: {left[0].name!r} ({len(left)} such) is in number {i + 1} but not in "
                f"number {i + 2}. Each must hold the one before."
            )
        if len(smaller) == len(larger):
            raise ValueError(f"The subsets number {i + 1} and {i + 2} are the same {len(smaller)} tasks.")
    return found


def read(runs: Sequence[Run], results: Results) -> dict[str, Table]:
    """Tabulate scores by number of tasks, and paired differences from the fewest."""
    measured = [run for run in runs if run.targets]
    fewest = min(run.tags["tasks"] for run in measured)
    chart = Chart("curve", x="tasks", y="mean", by="batch size", low="low", high="high")
    return {
        "curves": reading.means(
            "Targets by number of pretraining tasks",
            measured,
            results,
            by=("tasks", "batch size"),
            charts=[chart],
        ),
        "differences": reading.differences(
            f"Against {fewest} tasks, paired by training seed and batch size",
            measured,
            results,
            by=("tasks", "batch size"),
            baseline=lambda run: run.tags["tasks"] == fewest,
            pair=lambda run: (run.tags["seed"], run.tags["batch size"]),
        ),
        "targets": reading.per_task(
            "Every target", measured, results, by=("tasks", "batch size", "subset seed", "seed")
        ),
    }
