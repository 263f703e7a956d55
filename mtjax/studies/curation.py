"""Are chosen families better than as many random tasks?

ExT5 (arXiv:2111.10952), section 2.3 and table 3: the tasks of the families that transferred best, against random
subsets of equal size, all tasks, and text alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from mtjax.studies import reading
from mtjax.studies.runs import Plan, Results, Run, Table, Targets, Task, draw, evaluated, part, select

CURATED, RANDOM, ALL, VANILLA = "curated", "random", "all", "vanilla"


def curation(
    *,
    curated: Sequence[str],
    targets: Sequence[str],
    unsupervised: Sequence[str],
    exclude: Sequence[str] = (),
    ratio: float = 2.0,
    seeds: Sequence[int] = (0, 1, 2),
    hold_out_families: bool = True,
    split: str = "test",
    mode: str = "rank",
    max_examples: int | None = None,
    fine_tune: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan the curated tasks (patterns), a random subset of as many a seed, all tasks, and text alone.

    A seed is of training and of the random subset. The other arguments are those of scaling.scaling. Raises
    ValueError, when planning, where every task is curated.
    """

    def runs(tasks: Sequence[Task]) -> list[Run]:
        parts = part(
            tasks,
            targets=targets,
            unsupervised=unsupervised,
            exclude=exclude,
            hold_out_families=hold_out_families,
        )
        aim = Targets(tuple(task.name for task in parts.goals), split, mode, max_examples)
        chosen = select(parts.pool, curated, what="curated task or family")
        if len(chosen) == len(parts.pool):
            raise ValueError(
                f"All {len(chosen)} tasks are curated, so no random subset of as many is another one."
            )
        planned = []
        for seed in seeds:
            own = {"RANDOM_SEED": seed}
            tuned = None if fine_tune is None else draw(tasks, supervised=parts.goals) | own | dict(fine_tune)
            order = sorted(parts.pool, key=lambda task: task.name)
            drawn = random.Random(f"subset {seed}").sample(order, len(chosen))
            arms = {CURATED: chosen, RANDOM: drawn, ALL: parts.pool, VANILLA: []}
            for arm, members in arms.items():
                overrides = draw(tasks, supervised=members, unsupervised=parts.text, ratio=ratio) | own
                run = Run(
                    f"{arm}/seed={seed}", overrides, tags={"arm": arm, "seed": seed, "tasks": len(members)}
                )
                planned += evaluated(run, aim, tuned=tuned)
        return planned

    return Plan(runs, read, "Are chosen families better than as many random tasks?")


def read(runs: Sequence[Run], results: Results) -> dict[str, Table]:
    """Tabulate the arms and their paired differences from random subsets."""
    return reading.arms(runs, results, baseline=RANDOM)
