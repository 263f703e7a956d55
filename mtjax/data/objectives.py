"""Self-supervised objectives on token ids, in numpy: each turns a text into (inputs, targets).

A factory gets the room for ids (EOS not counted) and the vocabulary, and returns a function of
(ids, random generator). A text longer than the row gets a random chunk, a new one each epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtjax.data.vocabulary import Vocabulary

Ids = np.ndarray
Objective = Callable[[Ids, np.random.Generator], tuple[Ids, Ids]]
_NONE = np.zeros(0, np.int32)


class Room(NamedTuple):
    """How many ids of each side fit, EOS not counted."""

    inputs: int
    targets: int


def span_corruption(
    room: Room, vocabulary: Vocabulary, *, noise_density: float = 0.15, mean_noise_span_length: float = 3.0
) -> Objective:
    """Replace random spans by sentinels; the targets hold the spans behind their sentinels.

    Sentinels count down from the highest id. A chunk is as long as fills the inputs (and fits the targets).
    Raises ValueError where not even two ids fit, or where the vocabulary has fewer sentinels than spans.
    Source: arXiv:1910.10683, section 3.1.4.
    """
    chunk = _corruptible(room, noise_density, mean_noise_span_length)
    if chunk < 2:
        raise ValueError(f"span_corruption does not fit into {room}: give at least 2 inputs and 2 targets.")
    spans = _num_noise(chunk, noise_density, mean_noise_span_length)[1]
    if spans > vocabulary.extra_ids:
        raise ValueError(
            f"span_corruption needs {spans} sentinels for {chunk} ids, the vocabulary has {vocabulary.extra_ids} "
            "extra ids. Give it more, or raise mean_noise_span_length."
        )

    def corrupt(ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        piece = random_chunk(ids, chunk, rng)
        mask = noise_mask(len(piece), rng, noise_density=noise_density, mean_length=mean_noise_span_length)
        return _sentinels(piece, mask, vocabulary.size), _sentinels(piece, ~mask, vocabulary.size)

    return corrupt


def prefix_lm(room: Room, vocabulary: Vocabulary) -> Objective:
    """Split a chunk at a uniform place: the inputs predict the rest.

    Source: arXiv:1910.10683, section 3.2.1.
    """
    if min(room) < 1:
        raise ValueError(f"prefix_lm does not fit into {room}: give at least one id on both sides.")

    def split(ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        piece = random_chunk(ids, room.inputs + room.targets, rng)
        shortest = max(1, len(piece) - room.targets)
        longest = max(shortest, min(len(piece) - 1, room.inputs))
        prefix = int(rng.integers(shortest, longest + 1))
        return piece[:prefix], piece[prefix:]

    return split


def causal_lm(room: Room, vocabulary: Vocabulary) -> Objective:
    """Predict every id of a chunk from those before it: no inputs."""
    if room.targets < 1:
        raise ValueError(f"causal_lm does not fit into {room}: give at least one target.")
    return lambda ids, rng: (_NONE, random_chunk(ids, room.targets, rng))


OBJECTIVES = {"span_corruption": span_corruption, "prefix_lm": prefix_lm, "causal_lm": causal_lm}
"""By the name of the SeqIO preprocessor each stands for."""


def random_chunk(ids: Ids, length: int, rng: np.random.Generator) -> Ids:
    """Return one of the ceil(n / length) chunks that cover `ids`; the last one overlaps its neighbour."""
    if len(ids) <= length:
        return ids
    start = min(int(rng.integers(-(-len(ids) // length))) * length, len(ids) - length)
    return ids[start : start + length]


def noise_mask(
    length: int, rng: np.random.Generator, *, noise_density: float, mean_length: float
) -> np.ndarray:
    """Return bool [length], True where noise: spans of random lengths, the first ids are not noise.

    Noise and the rest are both cut at uniformly random places into equally many parts, so round(length *
    noise_density) ids are noise in every draw (T5's random_spans_noise_mask).
    """
    num_noise, num_spans = _num_noise(max(length, 2), noise_density, mean_length)
    kept = _random_parts(max(length, 2) - num_noise, num_spans, rng)
    noise = _random_parts(num_noise, num_spans, rng)
    spans = np.stack([kept, noise], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], num_spans), spans)[:length]


def _num_noise(length: int, noise_density: float, mean_length: float) -> tuple[int, int]:
    """Return how many of `length` ids are noise, and in how many spans."""
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    return num_noise, min(max(round(num_noise / mean_length), 1), num_noise, length - num_noise)


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Cut `total` into `parts` positive integers, every way equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


@functools.cache
def _corruptible(room: Room, noise_density: float, mean_length: float) -> int:
    """Return the longest chunk whose inputs and targets fit (T5's random_spans_helper)."""

    def fits(length: int) -> bool:
        noise, spans = _num_noise(length, noise_density, mean_length)
        return length - noise + spans <= room.inputs and noise + spans <= room.targets

    return max(filter(fits, range(2, room.inputs + room.targets + 1)), default=0)


def _sentinels(ids: Ids, mask: np.ndarray, vocabulary_size: int) -> Ids:
    """Replace each run of True by one sentinel, counting down from the highest id."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    replaced = np.where(first, vocabulary_size - np.cumsum(first), ids)
    return replaced[~mask | first]
