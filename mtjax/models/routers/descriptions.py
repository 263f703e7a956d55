"""Embed a task's description by hashing its words, pairs of words and triples of letters.

Descriptions that share words and stems have similar embeddings; nothing is learned, so any text has one, and
it is the same in every process and version (Weinberger et al. 2009, https://arxiv.org/abs/0902.2206).
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Iterator

import numpy as np


def _grams(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    yield from words
    yield from (f"{first} {second}" for first, second in itertools.pairwise(words))
    for word in words:
        padded = f"<{word}>"
        yield from (f"#{padded[i : i + 3]}" for i in range(len(padded) - 2))


@functools.lru_cache(maxsize=16)
def embed(texts: tuple[str, ...], features: int) -> np.ndarray:
    """Return float32 [T, features], rows of length 1: signed counts of hashed n-grams."""
    table_TF = np.zeros((len(texts), features), np.float32)
    for row_F, text in zip(table_TF, texts, strict=True):
        for gram in _grams(text):
            hashed = zlib.crc32(gram.encode())
            row_F[hashed // 2 % features] += 1.0 if hashed % 2 else -1.0
        row_F /= max(float(np.linalg.norm(row_F)), 1e-6)
    table_TF.setflags(write=False)
    return table_TF
