"""Evaluate while training: target loss per task on fixed batches, and decoded metrics on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtjax import evaluate, monitor, predict
from mtjax.data import cache, pipeline
from mtjax.program import Program
from mtjax.types import Model, Params

Check = Callable[[], None]  # called before each batch; ends the evaluation by raising evaluate.Interrupted
Validate = Callable[[Params, Check], dict[str, float]]


def nothing(params: Params, check: Check) -> dict[str, float]:
    """Measure nothing."""
    del params, check
    return {}


def validation(
    run: Program,
    model: Model,
    data: pipeline.TrainData,
    tasks: Sequence[cache.CachedTask],
    *,
    split: str,
    examples: int,
    decode: int,
) -> Validate:
    """Build what one evaluation runs; its batches, of `examples` a task, are read once.

    decode: how many examples a task to decode greedily and score by the task's metrics.
    """
    batches = pipeline.validation_batches(
        tasks,
        split,
        lengths=data.lengths,
        batch_size=data.batch_size,
        examples=examples,
        architecture=data.architecture,
        objectives=data.objectives,
    )
    if not decode:
        return lambda params, check: _losses(run, params, batches, check)
    scores = _decoder(run, model, data, tasks, split=split, examples=decode)
    return lambda params, check: _losses(run, params, batches, check) | scores(params, check)


def _losses(
    run: Program, params: Params, batches: Sequence[Mapping[str, np.ndarray]], check: Check
) -> dict[str, float]:
    """Evaluate fixed batches: mean loss over all tokens, over tasks, per task and per family."""
    sums: list[Any] = []
    for batch in batches:
        check()
        sums.append(run.evaluate(params, predict.place(batch, run.mesh))[0])
        jax.block_until_ready(sums[-2:-1])  # one batch behind: the device does not wait, and a stop is soon
    tasks = monitor.add_up(jax.device_get(sums))
    scalars = monitor.overall(
        tasks._replace(**{name: np.sum(x) for name, x in tasks._asdict().items()}), prefix="validation"
    )
    # The mean over tasks is not swayed by how long a task's targets are.
    losses = [entry["loss"] for entry in monitor.means(tasks, run.tasks.names).values()]
    scalars["validation/mean_task_loss"] = float(np.mean(losses))
    return scalars | monitor.scalars_of(run.tasks, tasks, prefix="validation/")


def _decoder(
    run: Program,
    model: Model,
    data: pipeline.TrainData,
    tasks: Sequence[cache.CachedTask],
    *,
    split: str,
    examples: int,
) -> Validate:
    """Build what decodes a few validation examples a task and scores them by the task's metrics."""
    predictor = predict.predictor(
        model,
        lengths=data.lengths,
        batch_size=data.batch_size,
        mesh=run.mesh,
        architecture=data.architecture,
    )

    def decode(params: Params, check: Check) -> dict[str, float]:
        results = evaluate.evaluate_mixture(
            model,
            params,
            tasks,
            split=split,
            lengths=data.lengths,
            batch_size=data.batch_size,
            mesh=run.mesh,
            architecture=data.architecture,
            max_examples=examples,
            predictor=predictor,
            progress=lambda done, total, task: check(),
        )
        if errors := [f"{result.task}: {result.error}" for result in results if result.error]:
            raise ValueError("Decoding validation examples failed for\n  " + "\n  ".join(errors))
        return {
            f"validation/task/{result.task}/{name}": float(score)
            for result in results
            for name, score in result.scores.items()
        }

    return decode
