"""Where a run starts: restored, from an initial checkpoint, or new; and what it must have in common with what it continues."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import checkpoint, log, program, tree
from mtjax.data import cache
from mtjax.models import configs
from mtjax.program import Program, TrainState
from mtjax.types import Array, Model, Params

INITIAL_STATES = ("parameters", "optimizer")


def environment() -> dict[str, Any]:
    """Return what bit-exact resume depends on beside the recipe."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "mtjax")
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def meta(run: Program, model: Model, tasks: Sequence[cache.CachedTask], config_text: str) -> dict[str, Any]:
    """Return what a checkpoint says about its run."""
    return {
        "tasks": list(run.tasks.names),
        "families": list(run.tasks.families),
        "groups": list(run.groups),
        "vocabulary": {task.name: task.vocabulary("targets").fingerprint for task in tasks},
        "model": configs.describe(model.config),
        "mesh": dict(run.mesh.shape),
        "environment": environment(),
        "config": config_text,
    }


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], *, writer: log.Writer) -> None:
    """Refuse to resume with other tasks or another vocabulary; warn where bits may differ."""
    if saved["tasks"] != now["tasks"]:
        dropped = [name for name in saved["tasks"] if name not in now["tasks"]]
        added = [name for name in now["tasks"] if name not in saved["tasks"]]
        raise ValueError(
            f"The checkpoint was trained on other tasks: dropped {dropped[:10]}, added {added[:10]}"
            f"{', order changed' if not dropped and not added else ''}. Resume with the same mixture, or start "
            "a new MODEL_DIR from INITIAL_CHECKPOINT_PATH."
        )
    if changed := [n for n in now["tasks"] if saved["vocabulary"].get(n) != now["vocabulary"][n]]:
        raise ValueError(
            f"The vocabulary of {changed[:5]} differs from the checkpoint's. Use the vocabulary the run started with."
        )
    differing = [
        f"{key}: {saved['environment'].get(key)} -> {value}"
        for key, value in now["environment"].items()
        if saved["environment"].get(key) != value
    ]
    if saved["mesh"] != now["mesh"]:
        differing.append(f"mesh: {saved['mesh']} -> {now['mesh']}")
    if differing:
        writer.text(
            "Resuming elsewhere: close to the straight run, not bit for bit (" + "; ".join(differing) + ")."
        )


def _check_initial_vocabulary(path: str, vocabulary_of: Mapping[str, str]) -> None:
    """Refuse to start from parameters that were trained with other ids."""
    known = set(checkpoint.read_meta(path)["vocabulary"].values())
    if not known:
        raise ValueError(
            f"The checkpoint {path!r} was converted without a vocabulary, so what its ids mean is unknown. Convert it "
            "again with --vocabulary=FILE[:SENTINELS]."
        )
    if differing := [name for name, fingerprint in vocabulary_of.items() if fingerprint not in known]:
        raise ValueError(
            f"The vocabulary of {differing[:5]} is not the one that the checkpoint {path!r} was trained with "
            f"({', '.join(sorted(known))}): its embeddings would mean other tokens. Cache these tasks with that "
            "vocabulary (--vocabulary, another --cache_dir)."
        )


def inherited(meta: Mapping[str, Any], initial: Mapping[str, Any]) -> dict[str, Any]:
    """Return meta with what outlives the run that it was trained in: a converted model's origin, its beam search."""
    return {**meta, **{name: initial[name] for name in ("origin", "decoding") if initial.get(name)}}


def state(
    run: Program,
    checkpointer: checkpoint.Checkpointer,
    *,
    seed: int,
    initial_checkpoint: str | None,
    initial_state: str = "parameters",
    meta: Mapping[str, Any],
    fall_back: bool = False,
) -> tuple[TrainState, Mapping[str, Any] | None, Mapping[str, Any]]:
    """Return (state, host, meta): restored; or with host None, from an initial checkpoint or new.

    initial_state: 'parameters' alone, or 'optimizer' too, with its step. fall_back: where the latest checkpoint
    is damaged, restore the newest whole one.
    """
    if initial_state not in INITIAL_STATES:
        raise tree.unknown_name("initial_state", initial_state, INITIAL_STATES)
    if checkpointer.latest() is not None:
        return (checkpointer.restore_whole if fall_back else checkpointer.restore)(run.abstract)
    key = jax.random.key(seed)
    if initial_checkpoint is None:
        if initial_state != "parameters":
            raise ValueError(
                f"initial_state={initial_state!r} (INITIAL_STATE) is of an INITIAL_CHECKPOINT_PATH."
            )
        return run.init(key), None, {}
    _check_initial_vocabulary(initial_checkpoint, meta["vocabulary"])
    abstract = program.abstract_parameters(run)
    first = run.start_from(key, initial_parameters(initial_checkpoint, abstract, run.tasks.names))
    if initial_state == "optimizer":
        _check_same_tasks(initial_checkpoint, run, abstract)
        opt = checkpoint.restore_optimizer(initial_checkpoint, run.abstract.opt)
        # A copy: the step donates its state, and one buffer cannot be donated twice.
        first = first._replace(opt=opt, step=jax.device_put(np.array(opt.step), run.shardings.step))
    return first, None, checkpoint.read_meta(initial_checkpoint)


def _check_same_tasks(path: str, run: Program, abstract: Params) -> None:
    """Refuse an optimizer whose rows of tasks are of other tasks than the run's."""
    saved = checkpoint.read_meta(path)["tasks"]
    if saved and saved != list(run.tasks.names) and (of_tasks := _rows_of_tasks(abstract)):
        raise ValueError(
            f"INITIAL_STATE='optimizer': {of_tasks[0]} has a row for every task, and the tasks of {path!r} "
            f"({saved[:5]}, ...) are not the run's ({list(run.tasks.names)[:5]}, ...) in their order. Start from its "
            "parameters alone, whose rows are found by name, or train on the same tasks."
        )


# Tasks by name --------------------------------------------------------------------------------------------


def initial_parameters(path: str, abstract: Params, tasks: Sequence[str]) -> Params:
    """Read a checkpoint's parameters for a run with these tasks; leaves of abstract have shardings.

    Rows of tasks (tree.task_dim) are found by the tasks' names. A task that the checkpoint does not know gets
    the mean of its tasks' rows: it starts as a task never seen. Raises ValueError where rows have no names.
    """
    of_tasks = _rows_of_tasks(abstract)
    saved_tasks = checkpoint.read_meta(path)["tasks"]
    shapes = checkpoint.parameter_shapes(path)
    if not of_tasks or list(tasks) == saved_tasks or not shapes.keys() >= set(of_tasks):
        return checkpoint.restore_parameters(path, abstract)
    if not saved_tasks:
        return _unnamed(path, abstract, of_tasks, shapes)

    def as_saved(name: str, leaf: Any) -> Any:
        if name not in of_tasks:
            return leaf
        replicated = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shapes[name].shape, leaf.dtype, sharding=replicated)

    order = np.array([saved_tasks.index(t) if t in saved_tasks else len(saved_tasks) for t in tasks])

    def moved(name: str, leaf: Array, want: Any) -> Array:
        if (dim := tree.task_dim(name)) is None:
            return leaf
        if (rows := leaf.shape[dim]) != len(saved_tasks):
            raise ValueError(
                f"{name} of the checkpoint {path!r} has {rows} rows, but the checkpoint names {len(saved_tasks)} tasks."
            )
        if leaf.shape[:dim] + leaf.shape[dim + 1 :] != want.shape[:dim] + want.shape[dim + 1 :]:
            raise ValueError(
                f"{name} of the checkpoint {path!r} has shape {leaf.shape}, but the run's has {want.shape}: they "
                "differ in more than the number of tasks. Give the run the checkpoint's sizes (NUM_CLASSES no wider)."
            )
        rows_of = lambda x: jnp.concatenate([x, x.mean(dim, keepdims=True)], dim).take(order, dim)  # noqa: E731
        return jax.jit(rows_of, out_shardings=want.sharding)(leaf)

    restored = checkpoint.restore_parameters(path, tree.map_with_path(as_saved, abstract))
    return tree.map_with_path(moved, restored, abstract)


def _unnamed(path: str, abstract: Params, of_tasks: Sequence[str], shapes: Mapping[str, Any]) -> Params:
    """Read rows of tasks that have no names, where there are as many as the run's."""
    wanted = tree.flatten(abstract)
    if other := [name for name in of_tasks if shapes[name].shape != wanted[name].shape]:
        raise ValueError(
            f"The checkpoint {path!r} names no tasks, and {other[0]} has shape {shapes[other[0]].shape} where the "
            f"run's tasks need {wanted[other[0]].shape}. Convert it with as many tasks as the run has."
        )
    return checkpoint.restore_parameters(path, abstract)


def task_changes(run: Program, path: str) -> str:
    """Say which tasks a run adds to and drops from those of the checkpoint it starts from; '' where none matters."""
    saved, tasks = checkpoint.read_meta(path)["tasks"], run.tasks.names
    added = [name for name in tasks if name not in saved]
    dropped = [name for name in saved if name not in tasks]
    if not saved or not (added or dropped) or not _rows_of_tasks(jax.eval_shape(run.merge, run.abstract)):
        return ""
    return (
        f"Rows of tasks from {path}: {len(tasks) - len(added)} kept by name; {len(added)} added, as the mean of "
        f"all: {_shown(added)}; {len(dropped)} dropped: {_shown(dropped)}."
    )


def _rows_of_tasks(params: Params) -> list[str]:
    return [name for name in tree.flatten(params) if tree.task_dim(name) is not None]


def _shown(names: Sequence[str]) -> str:
    return (", ".join(names[:20]) + (", ..." if len(names) > 20 else "")) or "none"
