"""Where to put the supervised tasks: nowhere, after pretraining, or into it, at equal steps.

ExT5 (arXiv:2111.10952), section 3.3 and table 4: vanilla pretraining, pre-finetuning (as MUPPET), multi-task pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtjax.studies import reading
from mtjax.studies.runs import Plan, Results, Run, Table, Targets, Task, draw, evaluated, part

VANILLA, PREFINETUNED, MULTITASK = "vanilla", "pre-finetuned", "multi-task"


def stages(
    *,
    steps: int,
    prefinetune_steps: int,
    targets: Sequence[str],
    unsupervised: Sequence[str],
    exclude: Sequence[str] = (),
    ratio: float = 2.0,
    seeds: Sequence[int] = (0, 1, 2),
    hold_out_families: bool = True,
    split: str = "test",
    mode: str = "rank",
    max_examples: int | None = None,
    prefinetune: Mapping[str, Any] | None = None,
    fine_tune: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan three ways to spend `steps` steps: text only; text, then prefinetune_steps of tasks; both mixed.

    prefinetune: more overrides of the second stage. The other arguments are those of scaling.scaling. Raises
    ValueError unless the second stage is shorter than the whole.
    """
    if not 0 < prefinetune_steps < steps:
        raise ValueError(f"prefinetune_steps={prefinetune_steps} must be between 0 and steps={steps}.")

    def runs(tasks: Sequence[Task]) -> list[Run]:
        parts = part(
            tasks,
            targets=targets,
            unsupervised=unsupervised,
            exclude=exclude,
            hold_out_families=hold_out_families,
        )
        aim = Targets(tuple(task.name for task in parts.goals), split, mode, max_examples)
        text = draw(tasks, supervised=(), unsupervised=parts.text)
        labelled = draw(tasks, supervised=parts.pool)
        both = draw(tasks, supervised=parts.pool, unsupervised=parts.text, ratio=ratio)
        planned = []
        for seed in seeds:
            own = {"RANDOM_SEED": seed}
            tuned = None if fine_tune is None else draw(tasks, supervised=parts.goals) | own | dict(fine_tune)
            first = Run(
                f"{PREFINETUNED}/first/seed={seed}", text | own | {"TRAIN_STEPS": steps - prefinetune_steps}
            )
            second = labelled | own | {"TRAIN_STEPS": prefinetune_steps} | dict(prefinetune or {})
            planned.append(first)
            for arm, overrides, start in (
                (VANILLA, text | own | {"TRAIN_STEPS": steps}, None),
                (PREFINETUNED, second, first.name),
                (MULTITASK, both | own | {"TRAIN_STEPS": steps}, None),
            ):
                run = Run(f"{arm}/seed={seed}", overrides, start, tags={"arm": arm, "seed": seed})
                planned += evaluated(run, aim, tuned=tuned)
        return planned

    return Plan(runs, read, "Supervised tasks nowhere, after pretraining, or in it?")


def read(runs: Sequence[Run], results: Results) -> dict[str, Table]:
    """Tabulate the arms and their paired differences from vanilla pretraining."""
    return reading.arms(runs, results, baseline=VANILLA)
