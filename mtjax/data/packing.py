"""Put examples into rows, and rows into a batch of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mtjax.data.online import INPUTS, TARGETS


class Example(NamedTuple):
    """One example ready for a row: which draw of which task it is, and its ids (int32, EOS in)."""

    task: int
    occurrence: int
    inputs: np.ndarray
    targets: np.ndarray
    is_cut: bool = False  # it was longer


Row = Sequence[Example]
Capacity = tuple[int, int]  # ids on the (input, target) side


class Packer:
    """First-fit over a bounded window of open rows, both sides at once.

    An example goes into the oldest open row that has room on both sides. Where none has and the window is
    full, the fullest row is closed.
    """

    def __init__(self, lengths: Mapping[str, int], *, window: int, architecture: str):
        """Open no row yet. window: how many rows may be open, at least 1."""
        self._sizes = _one_side if architecture == "decoder_only" else _two_sides
        self._capacity = capacity(lengths, architecture)
        self._window = window
        self.rows: list[list[Example]] = []  # open, oldest first
        self._free: list[Capacity] = []

    def add(self, example: Example) -> Row | None:
        """Place an example; return the row this closed, if any."""
        inputs, targets = self._sizes(example)
        for number, (free_inputs, free_targets) in enumerate(self._free):
            if inputs <= free_inputs and targets <= free_targets:
                self.rows[number].append(example)
                self._free[number] = (free_inputs - inputs, free_targets - targets)
                return None
        closed = self._close_fullest() if len(self.rows) >= self._window else None
        self.rows.append([example])
        self._free.append((self._capacity[0] - inputs, self._capacity[1] - targets))
        return closed

    def restore(self, rows: Sequence[Row]) -> None:
        """Have these rows open, oldest first."""
        self.rows = [list(row) for row in rows]
        used = [np.sum([self._sizes(example) for example in row], axis=0).tolist() for row in rows]
        self._free = [(self._capacity[0] - inputs, self._capacity[1] - targets) for inputs, targets in used]

    def close(self) -> list[Row]:
        """Close all rows."""
        rows, self.rows, self._free = self.rows, [], []
        return list(rows)

    def _close_fullest(self) -> Row:
        inputs, targets = (max(side, 1) for side in self._capacity)
        emptiness = [min(free[0] / inputs, free[1] / targets) for free in self._free]
        fullest = emptiness.index(min(emptiness))
        del self._free[fullest]
        return self.rows.pop(fullest)


def capacity(lengths: Mapping[str, int], architecture: str) -> Capacity:
    """Return how many ids a row holds; decoder-only rows have one side, inputs and targets joined."""
    if architecture == "decoder_only":
        return 0, sum(lengths.values())
    return lengths[INPUTS], lengths[TARGETS]


def _two_sides(example: Example) -> Capacity:
    return len(example.inputs), len(example.targets)


def _one_side(example: Example) -> Capacity:
    return 0, len(example.inputs) + len(example.targets)


def batch(
    rows: Sequence[Row], lengths: Mapping[str, int], *, architecture: str, packed: bool
) -> dict[str, np.ndarray]:
    """Build the feature arrays of rows [B, length], names as in types.Batch.

    Segments count from 1 and padding is 0; task ids are -1 on padding. Segment ids and positions come with
    packed rows only. Loss weights are 1 on targets; in a decoder-only row also on everything of an example
    without inputs, and `decoder_causal_attention` is 1 on the inputs and one position more.
    """
    if architecture == "decoder_only":
        return _decoder_only(rows, sum(lengths.values()), packed=packed)
    encoder = _Side(rows, [e.inputs for row in rows for e in row], lengths[INPUTS])
    decoder = _Side(rows, [e.targets for row in rows for e in row], lengths[TARGETS])
    features = _side_features("encoder", encoder, packed=packed)
    features["encoder_input_tokens"] = encoder.tokens
    features |= _side_features("decoder", decoder, packed=packed) | _decoder_features(decoder)
    features["decoder_loss_weights"] = decoder.fill(np.float32(1), 0, np.float32)
    return features


def _decoder_only(rows: Sequence[Row], length: int, *, packed: bool) -> dict[str, np.ndarray]:
    examples = [example for row in rows for example in row]
    joined = [np.concatenate([e.inputs, e.targets]) if len(e.inputs) else e.targets for e in examples]
    side = _Side(rows, joined, length)
    prefix = side.repeat([len(e.inputs) for e in examples])
    return {
        **_side_features("decoder", side, packed=packed),
        **_decoder_features(side),
        "decoder_loss_weights": side.fill(side.positions >= prefix, 0, np.float32),
        "decoder_causal_attention": side.fill((side.positions <= prefix) & (prefix > 0), 0, np.int32),
    }


def _side_features(name: str, side: _Side, *, packed: bool) -> dict[str, np.ndarray]:
    features = {f"{name}_task_ids": side.fill(side.repeat(side.tasks), -1, np.int32)}
    if packed:
        features[f"{name}_segment_ids"] = side.fill(side.repeat(side.segments), 0, np.int32)
        features[f"{name}_positions"] = side.fill(side.positions, 0, np.int32)
    return features


def _decoder_features(side: _Side) -> dict[str, np.ndarray]:
    shifted = np.zeros_like(side.ids)
    shifted[1:] = side.ids[:-1]
    shifted[side.positions == 0] = 0
    return {"decoder_target_tokens": side.tokens, "decoder_input_tokens": side.fill(shifted, 0, np.int32)}


class _Side:
    """The ids of one side of a batch, laid end to end, and where each goes in the rows."""

    def __init__(self, rows: Sequence[Row], ids: Sequence[np.ndarray], length: int):
        self.shape = (len(rows), length)
        self.tasks = [example.task for row in rows for example in row]
        self.segments = [number for row in rows for number in range(1, len(row) + 1)]
        self._lengths = np.array([len(x) for x in ids], np.int64)
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        ends = np.cumsum(self._lengths)
        self.positions = np.arange(len(self.ids)) - self.repeat(ends - self._lengths)
        row_sizes = np.array([len(row) for row in rows])
        row_starts = np.concatenate([[0], ends])[np.cumsum(row_sizes) - row_sizes]  # in the laid-out ids
        offsets = np.arange(len(rows)) * length - row_starts
        self._places = np.arange(len(self.ids)) + self.repeat(np.repeat(offsets, row_sizes))
        self.tokens = self.fill(self.ids, 0, np.int32)

    def repeat(self, values: Sequence[int] | np.ndarray) -> np.ndarray:
        """Repeat one value an example over its ids."""
        return np.repeat(np.asarray(values, np.int64), self._lengths)

    def fill(self, values: np.ndarray | np.generic, padding: int, dtype: type) -> np.ndarray:
        """Lay one value an id out in rows."""
        array = np.full(self.shape, padding, dtype)
        array.reshape(-1)[self._places] = values
        return array
