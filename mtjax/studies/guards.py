"""What a study must not do: train on its targets, on texts that hold them, or report scores that must not be.

A guard looks at what every run draws (its rates, over its steps), not at how the plan meant it. n-grams are those of
mtjax.data.decontaminate: of lower-case words of all features; those that more than COMMON examples of a training
task share are prompts and common phrases, and do not count.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtjax.data import cache, decontaminate, fingerprint, publish
from mtjax.studies.runs import Guards, Run, Targets, ancestors
from mtjax.types import Rates

TRAIN = decontaminate.TRAIN
MOMENTS = 64  # steps of a run at which its rates are asked


class Finding(NamedTuple):
    """One thing that a guard looked at and what it saw; `refused` where the study must not start."""

    guard: str
    what: str
    refused: bool


def drawn_tasks(rates: Rates, sizes: Sequence[float], names: Sequence[str], steps: int) -> set[str]:
    """Return the tasks that a run may draw at any of MOMENTS steps spread over its length."""
    state = rates.init(np.asarray(sizes, np.float64), list(names))
    found = np.zeros(len(names), bool)
    for step in {round(i * (steps - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}:
        found |= np.asarray(rates.rates(state, step)) > 0
    return {name for name, is_drawn in zip(names, found, strict=True) if is_drawn}


def unreported(runs: Sequence[Run], guards: Guards) -> list[Finding]:
    """Refuse targets whose scores must not be reported."""
    goals = sorted({task for run in runs for targets in run.targets for task in targets.tasks})
    marked = [task for task in goals if any(fnmatch.fnmatchcase(task, p) for p in guards.unreported)]
    found = [
        Finding(
            "unreported scores",
            f"{task} is marked by {list(guards.unreported)}: its scores must not be reported",
            not _is_allowed(task, guards),
        )
        for task in marked
    ]
    checked = (
        f"{len(goals)} targets compared with {list(guards.unreported) or 'no pattern'}, {len(marked)} marked"
    )
    return [Finding("unreported scores", checked, False), *found]


def trained_targets(runs: Sequence[Run], drawn: Mapping[str, set[str]], guards: Guards) -> list[Finding]:
    """Refuse held-out targets that a run, or one it starts from, was pretrained on; fine-tuning itself may."""
    found, seen, held = [], set(), 0
    for run in runs:
        for targets in run.targets:
            if not targets.held_out:
                continue
            held += 1
            for before in _pretraining(run, targets, runs):
                for task in sorted(drawn[before.name] & set(targets.tasks)):
                    if (before.name, task) not in seen:
                        seen.add((before.name, task))
                        said = f"run {before.name!r} pretrains on the target {task!r}"
                        found.append(Finding("targets in pretraining", said, not _is_allowed(task, guards)))
    exempt = sum(not t.held_out for run in runs for t in run.targets)
    said = f"{held} evaluations checked, {exempt} not held out by design, {len(found)} targets trained on"
    return [Finding("targets in pretraining", said, False), *found]


def overlaps(
    runs: Sequence[Run],
    drawn: Mapping[str, set[str]],
    tasks: Mapping[str, cache.CachedTask],
    guards: Guards,
    *,
    kept: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Finding]:
    """Refuse held-out targets of which too large a share of examples shares an n-gram with a task trained on.

    kept: a folder of earlier counts, by the data's fingerprints; what is not in it is counted, which reads the
    training tasks once.
    """
    if guards.overlap is None:
        return [Finding("n-gram overlap", "not checked: the study says overlap = None", False)]
    by_goals: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for run in runs:
        for targets in run.targets:
            if targets.held_out:
                trained = {task for before in _pretraining(run, targets, runs) for task in drawn[before.name]}
                by_goals.setdefault((targets.split, targets.tasks), set()).update(trained)
    found, pairs, worst = [], 0, (0.0, "none")
    for (split, goals), trained in by_goals.items():
        held = HeldOut([tasks[name] for name in goals], split, guards.ngram)
        for name in sorted(trained - set(goals)):
            progress(f"n-grams of {name}")
            for goal, share in shared(tasks[name], held, kept=kept).items():
                pairs += 1
                said = f"{share:.1%} of {goal}:{split} share a {guards.ngram}-gram with {name}"
                worst = max(worst, (share, said))
                if share > guards.overlap:
                    found.append(Finding("n-gram overlap", said, not _is_allowed(goal, guards)))
    said = f"{pairs} pairs of target and training task, threshold {guards.overlap:.1%}; the most: {worst[1]}"
    return [Finding("n-gram overlap", said, False), *found]


class HeldOut:
    """The n-grams of the targets of a study, and which target's example each is from."""

    def __init__(self, tasks: Sequence[cache.CachedTask], split: str, n: int):
        self.split, self.n = split, n
        self.names = [task.name for task in tasks]
        self.sizes = [task.num_examples(split) for task in tasks]
        self.identity = fingerprint.fingerprint([[t.name, t.fingerprint] for t in tasks] + [split, n])
        self._tasks = tasks
        self._built: tuple[np.ndarray, np.ndarray] | None = None

    def ngrams(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (sorted hashes, number of the example over all targets), one row a pair."""
        if self._built is None:
            starts = np.cumsum([0, *self.sizes[:-1]])
            parts = [
                (hashes, owners + start)
                for task, start in zip(self._tasks, starts, strict=True)
                for hashes, owners in decontaminate.task_ngrams(task, self.split, self.n)
            ]
            hashes = np.concatenate([part[0] for part in parts])
            owners = np.concatenate([part[1] for part in parts])
            order = np.argsort(hashes, kind="stable")
            self._built = hashes[order], owners[order]
        return self._built


def shared(task: cache.CachedTask, held: HeldOut, *, kept: Path) -> dict[str, float]:
    """Return, by target, the share of its examples that have an n-gram of a training task's examples."""
    path = kept / f"{fingerprint.fingerprint([task.fingerprint, held.identity])}.json"
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    counts = _count(task, held)
    found = {name: count / size for name, count, size in zip(held.names, counts, held.sizes, strict=True)}
    kept.mkdir(parents=True, exist_ok=True)
    publish.write_json(path, found)
    return found


def _count(task: cache.CachedTask, held: HeldOut) -> list[int]:
    """Count each target's examples that share an n-gram which few of the training task's examples have."""
    known, owners = held.ngrams()
    hits: list[np.ndarray] = []
    examples: list[np.ndarray] = []
    for hashes, numbers in decontaminate.task_ngrams(task, TRAIN, held.n):
        is_known = np.isin(hashes, known)
        hits.append(hashes[is_known])
        examples.append(numbers[is_known])
    pairs = np.unique(np.stack([np.concatenate(hits), np.concatenate(examples).astype(np.uint64)]), axis=1)
    ngrams, counts = np.unique(pairs[0], return_counts=True)
    rare = ngrams[counts <= decontaminate.COMMON]
    marked = np.unique(owners[np.isin(known, rare)])
    ends = np.cumsum(held.sizes)
    return np.bincount(np.searchsorted(ends, marked, side="right"), minlength=len(ends)).tolist()


def _pretraining(run: Run, targets: Targets, runs: Sequence[Run]) -> Iterable[Run]:
    before = ancestors(run, runs)
    return before if targets.tuned else [run, *before]


def _is_allowed(task: str, guards: Guards) -> bool:
    return any(fnmatch.fnmatchcase(task, pattern) for pattern in guards.allowed)


def refuse(findings: Sequence[Finding]) -> None:
    """Raise ValueError with everything that was refused."""
    if lines := [f"  {finding.guard}: {finding.what}" for finding in findings if finding.refused]:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ValueError(
            "The study's guards refuse it:\n"
            + "\n".join([*lines[:20], *more])
            + "\nLeave these tasks out (exclude, targets), or allow targets by name in studies.study.allowed."
        )


def as_rows(findings: Sequence[Finding]) -> list[list[Any]]:
    """Return findings as the manifest keeps them."""
    return [[f.guard, f.what, "refused" if f.refused else ""] for f in findings]
