"""Train and evaluate one run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtjax import checkpoint, evaluate, hosts, log, predict, program, tree
from mtjax import train as train_lib
from mtjax.data import cache
from mtjax.studies.runs import Targets


def train(
    arguments: Mapping[str, Any], *, config_text: str, should_stop: Callable[[int], bool]
) -> dict[str, Any]:
    """Train to the end, or go on from the last checkpoint; return the last step, its loss, and positions seen.

    arguments: of train.fit. Raises train.Stopped where should_stop says so.
    """
    train_lib.fit(**arguments, config_text=config_text, should_stop=should_stop)
    hosts.wait("trained")
    model_dir, data = arguments["model_dir"], arguments["data"]
    logged = [line for line in log_lines(model_dir) if "train/loss" in line]
    step = checkpoint.checkpoint_steps(model_dir)[-1]
    return {
        "step": step,
        "loss": logged[-1]["train/loss"],
        "positions": step * data.batch_size * sum(data.lengths.values()),
    }


def measure(arguments: Mapping[str, Any], targets: Sequence[Targets]) -> list[dict[str, Any]]:
    """Evaluate the last checkpoint of a trained run; return a result a target task and split, in JSON.

    Raises ValueError where a target cannot be evaluated: a mean without it would compare other tasks.
    """
    if not targets:
        return []
    built = train_lib.prepare(**train_lib.program_arguments(arguments))
    data, model = arguments["data"], arguments["model"]
    params = checkpoint.restore_parameters(arguments["model_dir"], program.abstract_parameters(built))
    table = {task.name: task for task in cache.open_mixture(data.cache_dirs, data.mixture).tasks}
    ids = {name: i for i, name in enumerate(built.tasks.names)}
    modes = {wanted.mode for wanted in targets}
    predictors = {
        mode: predict.predictor(
            model,
            predict.DecodeConfig("rank" if mode == "rank" else "greedy"),
            lengths=data.lengths,
            batch_size=data.batch_size,
            mesh=built.mesh,
            architecture=data.architecture,
        )
        for mode in modes
    }
    lines = []
    for wanted in targets:
        results = evaluate.evaluate_mixture(
            model,
            params,
            [_scored(table[name], wanted) for name in wanted.tasks],
            split=wanted.split,
            lengths=data.lengths,
            batch_size=data.batch_size,
            mesh=built.mesh,
            architecture=data.architecture,
            max_examples=wanted.max_examples,
            task_ids=ids,
            predictor=predictors[wanted.mode],
        )
        if errors := [f"{result.task}: {result.error}" for result in results if result.error]:
            raise ValueError("The targets could not be evaluated:\n  " + "\n  ".join(errors))
        lines += [_line(result, wanted) for result in results]
    return lines


def _scored(task: cache.CachedTask, targets: Targets) -> cache.CachedTask:
    """Return the task with the metrics that its mode can measure: bits per byte come in any case."""
    if targets.mode == "greedy" or (targets.mode == "rank" and _has_options(task, targets.split)):
        return task
    return dataclasses.replace(task, metadata={**task.metadata, "metrics": []})


def _has_options(task: cache.CachedTask, split: str) -> bool:
    return all(evaluate.choices_of(task, raw) for raw in task.examples(split))


def _line(result: evaluate.TaskResult, targets: Targets) -> dict[str, Any]:
    return {
        "task": result.task,
        "family": result.family,
        "split": targets.split,
        "scores": result.scores,
        "bits_per_byte": result.bits_per_byte,
        "loss": result.loss,
        "num_examples": result.num_examples,
        "num_tokens": result.num_tokens,
    }


def log_lines(model_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; [] before the first, and without one that is being written."""
    path = Path(model_dir) / log.METRICS
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def check_recipe(arguments: Mapping[str, Any], *, tasks: train_lib.TaskTable | None) -> int:
    """Build a run's program abstractly; return its parameters. tasks: None for those of its cached mixture.

    Raises ValueError for what cannot train.
    """
    import jax

    built = train_lib.prepare(**train_lib.program_arguments(arguments), tasks=tasks)
    return tree.num_parameters(jax.eval_shape(built.merge, built.abstract))
