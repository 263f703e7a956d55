"""Sample efficiency: how good is a pretrained model after how many steps, once fine-tuned?

ExT5 (arXiv:2111.10952), section 3.6 and figure 4: checkpoints of one run, with the targets removed from pretraining,
are fine-tuned on the targets; beside those of a run on text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtjax.studies import reading
from mtjax.studies.runs import Chart, Plan, Results, Run, Table, Targets, Task, draw, part

VANILLA, MULTITASK = "vanilla", "multi-task"


def efficiency(
    *,
    steps: int,
    every: int,
    fine_tune: Mapping[str, Any],
    targets: Sequence[str],
    unsupervised: Sequence[str],
    exclude: Sequence[str] = (),
    ratio: float = 2.0,
    seeds: Sequence[int] = (0,),
    hold_out_families: bool = True,
    split: str = "test",
    mode: str = "rank",
    max_examples: int | None = None,
) -> Plan:
    """Plan a multi-task and a vanilla run of `steps`, and a fine-tuning from each of their checkpoints.

    every: steps between checkpoints; it divides `steps`. fine_tune: overrides of the fine-tuning runs. The other
    arguments are those of scaling.scaling.
    """
    if every < 1 or steps % every:
        raise ValueError(f"every={every} must divide steps={steps}.")

    def runs(tasks: Sequence[Task]) -> list[Run]:
        parts = part(
            tasks,
            targets=targets,
            unsupervised=unsupervised,
            exclude=exclude,
            hold_out_families=hold_out_families,
        )
        aim = Targets(tuple(task.name for task in parts.goals), split, mode, max_examples, tuned=True)
        kept = {"TRAIN_STEPS": steps, "CHECKPOINT_PERIOD": every, "train.Saving.keep_every": every}
        planned = []
        for seed in seeds:
            own = {"RANDOM_SEED": seed}
            tuned = draw(tasks, supervised=parts.goals) | own | dict(fine_tune)
            for arm, members in ((VANILLA, []), (MULTITASK, parts.pool)):
                drawn = draw(tasks, supervised=members, unsupervised=parts.text, ratio=ratio)
                first = Run(f"{arm}/seed={seed}", drawn | own | kept)
                planned.append(first)
                for step in range(every, steps + 1, every):
                    tags = {"arm": arm, "step": step, "seed": seed}
                    planned.append(Run(f"{first.name}/step={step}", tuned, first.name, step, (aim,), tags))
        return planned

    return Plan(runs, read, "How good is a pretrained model after how many steps, once fine-tuned?")


def read(runs: Sequence[Run], results: Results) -> dict[str, Table]:
    """Tabulate the fine-tuned checkpoints, and multi-task against vanilla at each step."""
    measured = [run for run in runs if run.targets]
    chart = Chart("curve", x="step", y="mean", by="arm", low="low", high="high")
    return {
        "curves": reading.means(
            "Fine-tuned targets by pretraining step", measured, results, by=("arm", "step"), charts=[chart]
        ),
        "differences": reading.differences(
            "Multi-task against vanilla, paired by step and seed",
            measured,
            results,
            by=("step",),
            baseline=lambda run: run.tags["arm"] == VANILLA,
            pair=lambda run: (run.tags["step"], run.tags["seed"]),
        ),
        "targets": reading.per_task("Every target", measured, results, by=("arm", "step", "seed")),
    }
