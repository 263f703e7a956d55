"""Seeded hashes and permutations by index: no state, no memory, vectorised over numpy arrays."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_MASK = 2**64 - 1


def key(*parts: int | str) -> int:
    """Hash integers and strings to 64 bits, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def mix(*values: np.ndarray | int) -> np.ndarray:
    """Hash broadcast integers to uint64, position by position (SplitMix64's finaliser)."""
    state = np.zeros(1, np.uint64)
    for value in values:
        added = np.uint64(value & _MASK) if isinstance(value, int) else np.asarray(value).astype(np.uint64)
        state = (state ^ added) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permute(indices: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """Map each index in [0, size) through the permutation of its size and key, int64.

    A generalised Feistel network on [0, a) x [0, b), with a * b just above size, walked until it lands inside
    (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """
    arrays = (np.asarray(values, np.uint64) for values in (indices, sizes, keys))
    indices, sizes, keys = np.broadcast_arrays(*arrays)
    result = indices.copy()
    outside = np.arange(result.size)
    while outside.size:
        result[outside] = _feistel(result[outside], sizes[outside], keys[outside])
        outside = outside[result[outside] >= sizes[outside]]
    return result.astype(np.int64)


def _feistel(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    a = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    b = (sizes + a - np.uint64(1)) // a
    left, right = values % a, values // a
    for round_number in range(0, _ROUNDS, 2):
        left = (left + mix(keys, round_number, right) % a) % a
        right = (right + mix(keys, round_number + 1, left) % b) % b
    return left + a * right
