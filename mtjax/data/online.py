"""What happens to an example after the cache: objective, EOS, trimming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mtjax import tree
from mtjax.data.cache import CachedTask
from mtjax.data.objectives import OBJECTIVES, Objective, Room

INPUTS, TARGETS = "inputs", "targets"
ARCHITECTURES = ("encoder_decoder", "decoder_only")
_EMPTY = np.zeros(0, np.int32)


class Side(NamedTuple):
    """How one side of an example ends."""

    length: int
    eos: int | None
    keep_eos: bool = True  # trim the ids rather than the EOS

    @property
    def room(self) -> int:
        """Count the ids that fit beside the EOS."""
        return self.length - (self.eos is not None)


class Online(NamedTuple):
    """The online steps of one task at given feature lengths."""

    objective: Objective | None  # None: inputs and targets come as they are cached
    columns: tuple[int | None, int]  # of inputs and targets in a cached record
    inputs: Side | None
    targets: Side

    def __call__(self, record: Sequence[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return (inputs, targets, whether ids were cut off), int32; `seed` decides the noise."""
        column, text = self.columns[0], record[self.columns[1]]
        if self.objective is not None:
            inputs, text = self.objective(text, np.random.Generator(np.random.Philox(key=seed)))
        else:
            inputs = _EMPTY if column is None else record[column]
        targets, cut_targets = _end(text, self.targets)
        if self.inputs is None:
            return _EMPTY, targets, cut_targets
        inputs, cut_inputs = _end(inputs, self.inputs)
        return inputs, targets, cut_inputs or cut_targets


def check_architecture(architecture: str) -> None:
    """Raise ValueError on an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise tree.unknown_name("architecture", architecture, ARCHITECTURES)


def online(task: CachedTask, lengths: Mapping[str, int], *, architecture: str = "encoder_decoder") -> Online:
    """Build the online steps of a task.

    lengths: {"inputs": ids a row, "targets": ids a row}, EOS counted. A decoder-only text without inputs may
    fill both. Raises ValueError naming the task where lengths lack a feature or leave no room for it.
    """
    check_architecture(architecture)
    try:
        return _online(task, lengths, architecture)
    except ValueError as error:
        raise ValueError(
            f"Task {task.name!r} does not fit feature lengths {dict(lengths)}: {error}"
        ) from error


def _online(task: CachedTask, lengths: Mapping[str, int], architecture: str) -> Online:
    steps = {step["name"]: step["arguments"] for step in task.metadata["online"]}
    name = next((name for name in steps if name in OBJECTIVES), None)
    has_inputs = name in ("span_corruption", "prefix_lm") or (name is None and INPUTS in task.features)
    targets = _side(task, TARGETS, lengths, steps)
    if has_inputs:
        inputs = _side(task, INPUTS, lengths, steps)
    elif architecture == "encoder_decoder":  # T5's language model: the encoder sees an EOS
        inputs = _side(task, INPUTS, lengths, steps)._replace(eos=task.vocabulary(TARGETS).eos_id)
    else:
        inputs, targets = None, targets._replace(length=sum(lengths.values()))
    objective = None
    if name is not None:
        room = Room(0 if inputs is None else inputs.room, targets.room)
        objective = OBJECTIVES[name](room, task.vocabulary(TARGETS), **steps[name])
    features = task.features
    columns = (features.index(INPUTS) if INPUTS in features else None, features.index(TARGETS))
    return Online(objective, columns, inputs, targets)


def _side(task: CachedTask, feature: str, lengths: Mapping[str, int], steps: Mapping) -> Side:
    if feature not in lengths:
        raise ValueError(f"no length for {feature!r}.")
    spec = task.metadata["features"].get(feature) or task.metadata["features"][TARGETS]
    ends = spec["add_eos"] and not steps.keys().isdisjoint(("append_eos", "append_eos_after_trim"))
    side = Side(
        lengths[feature],
        task.vocabulary(TARGETS).eos_id if ends else None,
        keep_eos="append_eos_after_trim" in steps,
    )
    if side.room < 1:
        raise ValueError(f"length {side.length} of {feature!r} leaves no room for an id, so nothing of it.")
    return side


def _end(ids: np.ndarray, side: Side) -> tuple[np.ndarray, bool]:
    """Append EOS and trim, in the task's order; also tell whether ids were cut off."""
    count = len(ids)
    if side.eos is None:
        return ids[: side.length].astype(np.int32), count > side.length
    kept = min(count, side.room if side.keep_eos else side.length)
    ended = np.empty(min(kept + 1, side.length), np.int32)
    ended[:kept] = ids[:kept]
    ended[kept:] = side.eos
    return ended, count > kept
