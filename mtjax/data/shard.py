"""One virtual shard of the stream: draws its own positions, reads and packs its own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtjax.data import packing
from mtjax.data.cache import CachedTask
from mtjax.data.online import Online, online
from mtjax.data.records import Source
from mtjax.mixing import permutation, sampler

_RESIDENT_BYTES = 512 * 2**20  # of small tasks, kept in memory once they are read often


class Reader:
    """Turns (task, draw of the task) into an example."""

    def __init__(
        self,
        tasks: Sequence[CachedTask],
        split: str,
        *,
        lengths: Mapping[str, int],
        architecture: str,
        seed: int,
    ):
        """Open a split of the tasks, whose numbers are their order here."""
        self.sources: list[Source] = [task.source(split) for task in tasks]
        self.sizes = np.array([len(source) for source in self.sources])
        self.online: list[Online] = [online(task, lengths, architecture=architecture) for task in tasks]
        self._keys = np.array([permutation.key("examples", seed, task.name) for task in tasks], np.uint64)
        self._reads = [0] * len(tasks)
        self._bytes = [
            sum(entry["bytes"] for entry in task.metadata["splits"][split]["files"]) for task in tasks
        ]
        self._budget = _RESIDENT_BYTES

    def places(self, tasks_N: np.ndarray, draws_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (example index, noise seed) of each draw: every epoch is shuffled anew."""
        sizes = self.sizes[tasks_N]
        keys = permutation.mix(self._keys[tasks_N], draws_N // sizes)
        indices = permutation.permute(draws_N % sizes, sizes, keys)
        return indices, permutation.mix(keys, indices)

    def example(self, task: int, occurrence: int, index: int, seed: int) -> packing.Example:
        """Read example `index` of a task and run its online steps."""
        source = self.sources[task]
        self._reads[task] += 1
        if self._reads[task] == 8 + len(source) // 32 and self._bytes[task] <= self._budget:
            self._budget -= self._bytes[task]
            source.load()
        return packing.Example(task, occurrence, *self.online[task](source.read(index), seed))


class _Draws(NamedTuple):
    """A stretch of a shard's positions: tasks, draws within the shard, example indices, noise seeds."""

    start: int
    counts_T: np.ndarray  # draws of each task before `start`
    tasks: list[int]
    occurrences: list[int]
    indices: list[int]
    seeds: list[int]


class Snapshot(NamedTuple):
    """A shard between two steps; nothing it refers to changes any more."""

    draws: _Draws
    position: int
    rows: tuple[tuple[packing.Example, ...], ...]  # the open ones

    def counts(self) -> np.ndarray:
        """Count the draws of each task so far, int64 [T]."""
        done = np.array(self.draws.tasks[: self.position - self.draws.start], np.int64)
        return self.draws.counts_T + np.bincount(done, minlength=len(self.draws.counts_T))

    def state(self) -> dict[str, Any]:
        """Describe it in JSON: of the examples in open rows only which draws of which tasks they are."""
        rows = [[[example.task, example.occurrence] for example in row] for row in self.rows]
        return {"position": self.position, "counts": self.counts().tolist(), "rows": rows}


class Shard:
    """One virtual shard: its position, its counts and its open rows."""

    def __init__(
        self, number: int, reader: Reader, packer: packing.Packer | None, *, seed: int, num_shards: int
    ):
        """Stand at the beginning. Without a packer every example gets a row."""
        self._number, self._num_shards, self._seed = number, num_shards, seed
        self._reader, self._packer = reader, packer
        self._position = 0
        self._draws = _Draws(0, np.zeros(len(reader.sizes), np.int64), [], [], [], [])

    def rows(self, ends_T: np.ndarray, count: int) -> list[packing.Row]:
        """Return the next rows, tasks drawn by the intervals ends_T."""
        found: list[packing.Row] = []
        while len(found) < count:
            example = self._next(ends_T)
            row = [example] if self._packer is None else self._packer.add(example)
            if row is not None:
                found.append(row)
        return found

    def forget_draws(self) -> None:
        """Draw again from the current position on: the rates have changed."""
        self._draws = _Draws(self._position, self.snapshot().counts(), [], [], [], [])

    def snapshot(self) -> Snapshot:
        """Return the state between two steps."""
        rows = () if self._packer is None else tuple(tuple(row) for row in self._packer.rows)
        return Snapshot(self._draws, self._position, rows)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken; the examples of open rows are read again."""
        self._position = state["position"]
        self._draws = _Draws(self._position, np.array(state["counts"], np.int64), [], [], [], [])
        if self._packer is not None:
            self._packer.restore([self._read_again(row) for row in state["rows"]])

    def _read_again(self, row: Sequence[Sequence[int]]) -> packing.Row:
        tasks, occurrences = np.array(row, np.int64).T
        draws = zip(*self._places(tasks, occurrences), strict=True)
        return [self._reader.example(*draw) for draw in draws]

    def _next(self, ends_T: np.ndarray) -> packing.Example:
        if self._position == self._draws.start + len(self._draws.tasks):
            self._draw(ends_T)
        _, _, tasks, occurrences, indices, seeds = self._draws
        k = self._position - self._draws.start
        self._position += 1
        return self._reader.example(tasks[k], occurrences[k], indices[k], seeds[k])

    def _draw(self, ends_T: np.ndarray) -> None:
        counts_T = self.snapshot().counts()
        tasks = sampler.tasks(
            ends_T, seed=self._seed, shard=self._number, num_shards=self._num_shards, start=self._position
        )
        occurrences = sampler.occurrences(tasks, counts_T)
        self._draws = _Draws(self._position, counts_T, *self._places(tasks, occurrences))

    def _places(self, tasks: np.ndarray, occurrences: np.ndarray) -> list[list[int]]:
        indices, seeds = self._reader.places(tasks, occurrences * self._num_shards + self._number)
        return [array.tolist() for array in (tasks, occurrences, indices, seeds)]
