"""Watch a run: sums from the device become means per task and family, on the host."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtjax import tree
from mtjax.losses import TaskSums
from mtjax.program import StepMetrics, TaskTable

PER_TASK_SHARES = 2048  # tasks times experts, up to which each task's share of every expert is logged


def means(sums: TaskSums, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Divide [T] sums by their tokens, on the host: {name: {loss, accuracy, tokens, ...}}; tasks without tokens are left out."""
    loss, z_loss, correct, tokens = (np.asarray(x, np.float64) for x in sums)
    total = max(tokens.sum(), 1.0)
    return {
        name: {
            "loss": float(loss[i] / tokens[i]),
            "z_loss": float(z_loss[i] / tokens[i]),
            "accuracy": float(correct[i] / tokens[i]),
            "tokens": float(tokens[i]),
            "share": float(tokens[i] / total),
        }
        for i, name in enumerate(names)
        if tokens[i] > 0
    }


def _sums(arrays: Iterable[Any]) -> TaskSums:
    """Hold numpy arrays on the host under the names they have on the device."""
    return TaskSums(*arrays)


def by_family(sums: TaskSums, families: Sequence[str]) -> tuple[list[str], Any]:
    """Add [T] sums up to families."""
    names = list(dict.fromkeys(families))
    index = np.array([names.index(family) for family in families])
    return names, _sums(np.bincount(index, np.asarray(x, np.float64), len(names)) for x in sums)


def add_up(sums: Sequence[TaskSums]) -> TaskSums:
    """Add sums of several batches in float64."""
    return _sums(np.sum(x, axis=0, dtype=np.float64) for x in zip(*sums, strict=True))


def scalars_of(tasks: TaskTable, sums: TaskSums, *, prefix: str = "") -> dict[str, float]:
    """Name the means per task and per family: {prefix}task/<name>/loss, {prefix}family/<name>/loss, ...

    `share` is the part of all these target tokens.
    """
    families, family_sums = by_family(sums, tasks.families)
    return {
        **_named(means(sums, tasks.names), f"{prefix}task"),
        **_named(means(family_sums, families), f"{prefix}family"),
    }


def routing(stats: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Name the means of a mixture of experts: {side}/moe/..., and task/<name>/{side}/moe/... per task.

    expert_share/<e> is expert e's part of the router's choices, before any is dropped, and load_imbalance the
    largest part times the number of experts (1: balanced); drop_rate the part of tokens that no expert took;
    entropy that of the router's distribution, in nats. Means are over tokens and sparse layers.

    stats are what models.moe returns: sums per task, the last row for tokens of no task. Per task the shares
    of experts are named where there are at most PER_TASK_SHARES of them.
    """
    scalars: dict[str, float] = {}
    for side in sorted({name.partition("/")[0] for name in stats}):
        load, dropped, entropy, tokens = (
            np.asarray(stats[f"{side}/{what}"], np.float64)
            for what in ("expert_load", "dropped", "entropy", "tokens")
        )
        rows = {f"{side}/moe": slice(None)}
        if len(tokens) == len(names) + 1:
            rows |= {f"task/{name}/{side}/moe": slice(i, i + 1) for i, name in enumerate(names)}
        for prefix, row in rows.items():
            if (count := tokens[row].sum()) == 0:
                continue
            share = load[row].sum(0) / max(load[row].sum(), 1.0)
            scalars[f"{prefix}/load_imbalance"] = float(share.max() * len(share))
            scalars[f"{prefix}/drop_rate"] = float(dropped[row].sum() / count)
            scalars[f"{prefix}/entropy"] = float(entropy[row].sum() / count)
            if row == slice(None) or load.size <= PER_TASK_SHARES:
                scalars |= {f"{prefix}/expert_share/{e}": float(part) for e, part in enumerate(share)}
    return scalars


class Totals:
    """Sums over steps, added up step by step in float64, so that a stop in between changes no bit.

    They are fetched from the device when they are asked for, not when they are added.
    """

    def __init__(self, tasks: TaskTable):
        self.names = tasks.names
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self._waiting: list[StepMetrics] = []
        self._sums = [_sums(np.zeros((len(TaskSums._fields), len(self.names)))), _sums(np.zeros(4))]
        self._stats: dict[str, Any] = {}

    def add(self, metrics: StepMetrics) -> None:
        """Take in a step, without waiting for it."""
        self._waiting.append(metrics)

    def sums(self) -> tuple[TaskSums, TaskSums]:
        """Return the sums per task [T] and in total."""
        self._fetch()
        return self._sums[0], self._sums[1]

    def stats(self) -> dict[str, Any]:
        """Return the sums of the model's statistics."""
        self._fetch()
        return self._stats

    def _fetch(self) -> None:
        waiting = [(m.is_finite, (m.tasks, m.total), m.stats) for m in self._waiting]
        for is_finite, step, stats in jax.device_get(waiting):
            if not is_finite:  # a skipped step taught nothing
                continue
            self._sums = [
                _sums(x + np.asarray(y, np.float64) for x, y in zip(sums, more, strict=True))
                for sums, more in zip(self._sums, step, strict=True)
            ]
            for name, value in stats.items():
                self._stats[name] = self._stats.get(name, 0.0) + np.asarray(value, np.float64)
        self._waiting = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "sums": [[np.asarray(x).tolist() for x in part] for part in self.sums()],
            "stats": {name: value.tolist() for name, value in self.stats().items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's sums."""
        self._waiting = []
        self._sums = [_sums(np.array(x, np.float64) for x in part) for part in state["sums"]]
        stats = state.get("stats", {})  # checkpoints of before there were any
        self._stats = {name: np.array(value, np.float64) for name, value in stats.items()}


class Window:
    """The steps since the last log line; fetched from the device once per window."""

    def __init__(self, tasks: TaskTable):
        self.tasks = tasks
        self.totals = Totals(tasks)
        self._restart_clock()
        self.last: StepMetrics | None = None

    def _restart_clock(self) -> None:
        self.started, self.steps_here, self.positions_here = time.perf_counter(), 0, 0  # of this process

    def add(self, metrics: StepMetrics, *, positions: int) -> None:
        """Take in a step on a batch of so many input and target positions."""
        self.totals.add(metrics)
        self.last = metrics
        self.steps_here, self.positions_here = self.steps_here + 1, self.positions_here + positions

    def close(self) -> dict[str, float]:
        """Return the window's scalars and start a new one."""
        last = jax.device_get(self.last)
        per_task, total = self.totals.sums()
        seconds = time.perf_counter() - self.started
        scalars = overall(total, prefix="train")
        scalars["train/gradient_norm"] = float(last.gradient_norm)
        scalars["train/learning_rate"] = float(last.learning_rate)
        scalars["train/steps_per_second"] = self.steps_here / seconds
        scalars["train/tokens_per_second"] = self.positions_here / seconds
        for name, value in {**last.balance, **last.aux}.items():
            if np.ndim(value) == 0:
                scalars[f"train/{name}"] = float(value)
        scalars |= scalars_of(self.tasks, per_task)
        scalars |= routing(self.totals.stats(), self.tasks.names)
        self.totals.clear()
        self._restart_clock()
        return scalars

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of an open window."""
        return self.totals.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue a checkpoint's open window."""
        self.totals.restore(state)


def overall(total: TaskSums, *, prefix: str) -> dict[str, float]:
    """Name the means of scalar sums: {prefix}/loss, {prefix}/accuracy, ..."""
    one = _sums(np.reshape(x, 1) for x in total)
    return {f"{prefix}/{what}": value for what, value in means(one, ["all"]).get("all", {}).items()}


def _named(values: Mapping[str, Mapping[str, float]], kind: str) -> dict[str, float]:
    return {f"{kind}/{name}/{what}": v for name, entry in values.items() for what, v in entry.items()}


def seen(report: Mapping[str, Any]) -> dict[str, float]:
    """Name a stream's report: task/<name>/examples_seen, ..., task/<name>/epochs, data/packing/<side>."""
    counted = ("examples", "tokens", "truncated", "dropped")
    per_task = {f"{what}_seen": report[what] for what in counted} | {"epochs": report["epochs"]}
    return {
        **{
            f"task/{name}/{what}": float(value)
            for what, values in per_task.items()
            for name, value in values.items()
        },
        **{f"data/packing/{side}": float(value) for side, value in report["packing"].items()},
        **{f"data/fitting_length/{side}": n for side, n in (report["fitting_lengths"] or {}).items()},
        "data/seconds_waited": float(report["seconds_waited"]),
    }


class Patience:
    """Count evaluations without improvement."""

    def __init__(self, *, metric: str, mode: str, patience: int):
        self.metric, self.sign, self.patience = metric, 1 if mode == "min" else -1, patience
        self.best: float | None = None
        self.waited = 0

    def note(self, metrics: Mapping[str, float]) -> None:
        """Compare an evaluation with the best one."""
        if self.metric not in metrics:
            raise tree.unknown_name("evaluation metric", self.metric, sorted(metrics))
        value = self.sign * metrics[self.metric]
        if not math.isnan(value) and (self.best is None or value < self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def has_run_out(self) -> bool:
        """Tell whether `patience` evaluations in a row were no better than the best."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.best, self.waited = state["best"], state["waited"]
