"""SeqIO's registry as the commands use it: import what registers a name, and look the name up."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import seqio

import mtjax.tasks
from mtjax import tree


def shipped() -> list[str]:
    """List mtjax's own task modules, e.g. mtjax.tasks.python_docs."""
    return [f"mtjax.tasks.{module.name}" for module in pkgutil.iter_modules(mtjax.tasks.__path__)]


def names() -> list[str]:
    """List the registered mixtures and tasks."""
    return sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})


def lookup(name: str) -> Any:
    """Return the mixture or task of that name, importing mtjax's own modules where no other registers it.

    Raises ValueError with the nearest names where there is none.
    """
    # The module that a name begins with first: python_docs needs no other.
    for module in sorted(shipped(), key=lambda module: not name.startswith(module.rpartition(".")[2])):
        if name in names():
            break
        importlib.import_module(module)
    if name not in names():
        error = tree.unknown_name("task or mixture", name, names())
        raise ValueError(
            f"{error} Tasks of your own need --module=MODULE, those of a folder of JSON lines MTJAX_DATA=FOLDER."
        )
    return seqio.get_mixture_or_task(name)


def import_shipped() -> list[ModuleType]:
    """Import all of mtjax's own task modules."""
    return [importlib.import_module(module) for module in shipped()]


def tasks_of(provider: Any) -> Sequence[seqio.Task]:
    """Return the tasks of a mixture, each once, or the task itself, by name."""
    return sorted({task.name: task for task in seqio.get_subtasks(provider)}.values(), key=lambda t: t.name)


def example_texts(task: seqio.Task, split: str = "train"):
    """Yield the strings `inputs` and `targets` of a task's examples, before its tokenizer.

    Raises ValueError where the task has no such split or no string features.
    """
    import tensorflow_datasets as tfds

    check_split(task, split)
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for step in task.preprocessors:
        spec = dataset.element_spec
        if any(name in spec and spec[name].dtype.is_integer for name in task.output_features):
            break
        if isinstance(step, seqio.CacheDatasetPlaceholder) or _is_tokenizer(step):
            break
        dataset = seqio.utils.add_kwargs_to_transform(
            step, sequence_length=None, output_features=task.output_features
        )(dataset)
    found = [name for name in task.output_features if name in dataset.element_spec]
    if not found:
        raise ValueError(
            f"Task {task.name!r} has no text {' or '.join(task.output_features)} before its tokenizer; "
            f"its examples have {sorted(dataset.element_spec)}."
        )
    for example in tfds.as_numpy(dataset):
        for name in found:
            yield example[name].decode("utf-8", "replace")


def _is_tokenizer(step: Any) -> bool:
    function = getattr(step, "func", step)
    return "tokenize" in getattr(function, "__name__", type(function).__name__)


def check_split(task: seqio.Task, split: str) -> None:
    """Raise ValueError where a task lacks a split."""
    if split not in task.splits:
        raise tree.unknown_name(f"split of task {task.name!r}:", split, list(task.splits))
