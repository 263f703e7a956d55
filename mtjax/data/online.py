"""What happens to an example after the cache: objective, EOS, trimming."""

from __future__ import annotations

import fnmatch
import functools
import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtjax import tree
from mtjax.data import objectives as objectives_lib
from mtjax.data.cache import CachedTask
from mtjax.data.objectives import OBJECTIVES, TARGETS_ONLY, Objective, Room
from mtjax.data.vocabulary import Vocabulary

INPUTS, TARGETS = "inputs", "targets"
ENCODER_ONLY = "encoder_only"
ARCHITECTURES = ("encoder_decoder", "decoder_only", ENCODER_ONLY)
TRUNCATE, SPLIT, DROP = OVERLONG = ("truncate", "split", "drop")
SEQ2SEQ = "seq2seq"  # the objective of inputs and targets as they are cached
_EMPTY = np.zeros(0, np.int32)

Patterns = Mapping[str, Any]  # glob pattern of task names -> what holds for them; the first match wins


class Prepared(NamedTuple):
    """An example as the model sees it, EOS in."""

    inputs: np.ndarray  # int32 [ids]
    targets: np.ndarray
    cut: int  # cached ids left out of it


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
    """The online steps of one task at given feature lengths.

    An example longer than fits is, by `overlong`:
    truncate: trimmed; a text gives the objective a random chunk, another one each epoch.
    split: (texts only) cut into n chunks that cover it, of which epoch e takes number (e + k) mod n, k by the
        text itself. So n epochs in a row take each chunk once, with no state but the epoch. A mixture of
        denoisers splits into chunks that fit them all.
    drop: left out; a text where one of its objective's denoisers could not take it whole.
    """

    objective: Objective | None  # None: inputs and targets come as they are cached
    columns: tuple[int | None, int]  # of inputs and targets in a cached record
    inputs: Side | None
    targets: Side
    overlong: str = TRUNCATE
    classes: tuple[tuple[int, ...], ...] = ()  # of an encoder alone: the ids of each option, in order

    def __call__(self, record: Sequence[np.ndarray], seed: int, epoch: int = 0) -> Prepared | None:
        """Return the example, or None where it is dropped or empty.

        seed decides the noise. Empty is an example without a target id, and a text without an id.
        """
        column, text = self.columns[0], record[self.columns[1]]
        if column is None and not len(text):
            return None
        if self.overlong == DROP and self.exceeds(record):
            return None
        if self.objective is not None:
            return self._denoised(self.objective, text, seed, epoch)
        if column is None and self.overlong == SPLIT and len(text) > self.targets.room:
            return self._piece(text, epoch)
        inputs = _EMPTY if column is None else record[column]
        return self._ended(inputs, self._class_of(text) if self.classes else text, 0)

    def exceeds(self, record: Sequence[np.ndarray]) -> bool:
        """Tell whether an example is over-long."""
        column, text = self.columns[0], record[self.columns[1]]
        if self.objective is not None:
            return len(text) > self.objective.chunk
        inputs = _EMPTY if column is None else record[column]
        return not (_fits(inputs, self.inputs) and (bool(self.classes) or _fits(text, self.targets)))

    def _class_of(self, target: np.ndarray) -> np.ndarray:
        """Return the number of the option that a target is, int32 [1]."""
        ids = tuple(target.tolist())
        if ids not in self.classes:
            raise ValueError(
                f"The target ids {list(ids[:20])} are none of the task's {len(self.classes)} options, so they have "
                "no class. Give the task all its options, or train it with a decoder."
            )
        return np.array([self.classes.index(ids)], np.int32)

    def _denoised(self, objective: Objective, text: np.ndarray, seed: int, epoch: int) -> Prepared | None:
        rng = generator(seed)
        if self.overlong == SPLIT and len(text) > (length := objective.chunk):
            text = objectives_lib.chunk_of(text, length, _turn(text, length, epoch))
        denoiser = objective.draw(rng)
        chunk = objectives_lib.random_chunk(text, denoiser.chunk, rng)
        return self._ended(*denoiser.corrupt(chunk, rng), len(text) - len(chunk))

    def _piece(self, text: np.ndarray, epoch: int) -> Prepared | None:
        """Return a chunk of a text without an objective; EOS ends each, or the last where it is not kept."""
        length = self.targets.room
        number = _turn(text, length, epoch)
        is_last = number + 1 == objectives_lib.num_chunks(len(text), length)
        ends = self.targets.keep_eos or is_last
        side = self.targets if ends else self.targets._replace(eos=None)
        chunk = objectives_lib.chunk_of(text, length, number)
        return self._replace(targets=side)._ended(_EMPTY, chunk, 0)

    def _ended(self, inputs: np.ndarray, targets: np.ndarray, cut: int) -> Prepared | None:
        targets, cut_targets = _end(targets, self.targets)
        if not len(targets):
            return None
        if self.inputs is None:
            return Prepared(_EMPTY, targets, cut + cut_targets)
        inputs, cut_inputs = _end(inputs, self.inputs)
        return Prepared(inputs, targets, cut + cut_inputs + cut_targets)


def check_architecture(architecture: str) -> None:
    """Raise ValueError on an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise tree.unknown_name("architecture", architecture, ARCHITECTURES)


def check_patterns(what: str, patterns: Patterns | str, task_names: Sequence[str]) -> None:
    """Raise ValueError where a pattern matches none of the tasks."""
    for pattern in () if isinstance(patterns, str) else patterns:
        if not fnmatch.filter(task_names, pattern):
            raise tree.unknown_name(f"task pattern of {what}", pattern, task_names)


def describe_objectives(objectives: Patterns) -> dict[str, dict[str, Any]]:
    """Describe `objectives` of `online` in JSON; `online` reads the description as well."""
    return {pattern: _spec(value) for pattern, value in objectives.items()}


def online(
    task: CachedTask,
    lengths: Mapping[str, int],
    *,
    architecture: str = "encoder_decoder",
    overlong: str | Mapping[str, str] = TRUNCATE,
    objectives: Patterns | None = None,
) -> Online:
    """Build the online steps of a task.

    lengths: {"inputs": ids a row, "targets": ids a row}, EOS counted. A decoder-only text without inputs may
    fill both. overlong: see Online; also {pattern of task names: policy}, the others truncate.
    objectives: {pattern of task names: objective} instead of the task's own, where the cached text is raw; an
    objective is a name in OBJECTIVES, {"name": name, argument: value} or a (partial) function of OBJECTIVES.
    Raises ValueError naming the task where lengths lack a feature or leave no room for it, on unknown names,
    and where a task with inputs is to be split or to get another objective.
    """
    check_architecture(architecture)
    policy = overlong if isinstance(overlong, str) else _first_match(overlong, task.name, TRUNCATE)
    if policy not in OVERLONG:
        raise tree.unknown_name(f"policy for over-long examples of task {task.name!r}", policy, OVERLONG)
    steps = _steps(task, _first_match(objectives or {}, task.name, None))
    if policy == SPLIT and INPUTS in task.features:
        raise ValueError(
            f"Task {task.name!r} has inputs; a piece of them does not answer a piece of its targets, so it "
            "cannot be split. Put another policy for it, 'truncate' or 'drop', before its pattern."
        )
    classes = _classes(task, steps) if architecture == ENCODER_ONLY else ()
    try:
        return _online(task, lengths, architecture, steps)._replace(overlong=policy, classes=classes)
    except ValueError as error:
        raise ValueError(
            f"Task {task.name!r} does not fit feature lengths {dict(lengths)}: {error}"
        ) from error


def generator(seed: int) -> np.random.Generator:
    """Return np.random.Generator(np.random.Philox(key=seed)) until this thread asks for the next one.

    Resetting a generator costs a seventh of making one.
    """
    kept = _GENERATOR
    kept.state["state"]["key"][0] = seed
    kept.philox.state = kept.state
    return kept.generator


class _Generator(threading.local):
    """One generator a thread."""

    def __init__(self):
        self.philox = np.random.Philox(key=0)
        self.state: Any = self.philox.state
        self.generator = np.random.Generator(self.philox)


_GENERATOR = _Generator()


def _steps(task: CachedTask, objective: Any) -> dict[str, Mapping[str, Any]]:
    """Return the arguments of a task's online steps by name, its objective replaced where one is given."""
    steps = {step["name"]: step["arguments"] for step in task.metadata["online"]}
    if objective is None:
        return steps
    try:
        described = _spec(objective)
    except ValueError as error:
        raise ValueError(f"Task {task.name!r}: {error}") from error
    if described["name"] == SEQ2SEQ and INPUTS in task.features:
        return steps
    if described["name"] == SEQ2SEQ or INPUTS in task.features:
        raise ValueError(
            f"Task {task.name!r} cannot get objective {described['name']!r}: its cached features are "
            f"{task.features}. {SEQ2SEQ!r} needs inputs and targets, the others need a text, targets alone."
        )
    others = {name: arguments for name, arguments in steps.items() if name not in OBJECTIVES}
    arguments = {key: value for key, value in described.items() if key != "name"}
    return {described["name"]: arguments, **others}


def _spec(objective: Any) -> dict[str, Any]:
    return {"name": SEQ2SEQ} if objective in (SEQ2SEQ, {"name": SEQ2SEQ}) else objectives_lib.spec(objective)


def _classes(task: CachedTask, steps: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[int, ...], ...]:
    """Return the ids of each of a task's options, as its targets are cached."""
    options = task.metadata["options"]
    if not options or INPUTS not in task.features or not steps.keys().isdisjoint(OBJECTIVES):
        raise ValueError(
            f"Task {task.name!r} cannot train an encoder alone, which classifies: that takes inputs, targets and the "
            "targets' options (mtjax.tasks.info)."
        )
    encode = task.vocabulary(TARGETS).encode
    return tuple(tuple(int(i) for i in encode(option)) for option in options)


def _first_match(patterns: Patterns, name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if fnmatch.fnmatchcase(name, key)), default)


def _online(
    task: CachedTask, lengths: Mapping[str, int], architecture: str, steps: Mapping[str, Mapping[str, Any]]
) -> Online:
    name = next((name for name in steps if name in OBJECTIVES), None)
    has_inputs = INPUTS in task.features if name is None else name not in TARGETS_ONLY
    targets = _side(task, TARGETS, lengths, {} if architecture == ENCODER_ONLY else steps)
    if has_inputs:
        inputs = _side(task, INPUTS, lengths, steps)
    elif architecture == "encoder_decoder":  # T5's language model: the encoder sees an EOS
        inputs = _side(task, INPUTS, lengths, steps)._replace(eos=task.vocabulary(TARGETS).eos_id)
    else:
        inputs, targets = None, targets._replace(length=sum(lengths.values()))
    objective = None
    if name is not None:
        room = Room(0 if inputs is None else inputs.room, targets.room)
        arguments = json.dumps(steps[name], sort_keys=True)
        objective = _objective(name, room, task.vocabulary(TARGETS), arguments)
    features = task.features
    columns = (features.index(INPUTS) if INPUTS in features else None, features.index(TARGETS))
    return Online(objective, columns, inputs, targets)


@functools.lru_cache(maxsize=256)
def _objective(name: str, room: Room, vocabulary: Vocabulary, arguments: str) -> Objective:
    """Build an objective once for all the tasks that share it."""
    return OBJECTIVES[name](room, vocabulary, **json.loads(arguments))


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


def _turn(text: np.ndarray, length: int, epoch: int) -> int:
    """Return the number of the chunk that is due."""
    start = zlib.crc32(text.tobytes())  # or every text would open with its beginning
    return (epoch + start) % objectives_lib.num_chunks(len(text), length)


def _fits(ids: np.ndarray, side: Side | None) -> bool:
    return side is None or len(ids) <= side.room


def _end(ids: np.ndarray, side: Side) -> tuple[np.ndarray, int]:
    """Append EOS and trim, in the task's order; also count the ids cut off."""
    count = len(ids)
    if side.eos is None:
        return ids[: side.length].astype(np.int32), max(0, count - side.length)
    kept = min(count, side.room if side.keep_eos else side.length)
    ended = np.empty(min(kept + 1, side.length), np.int32)
    ended[:kept] = ids[:kept]
    ended[kept:] = side.eos
    return ended, count - kept
