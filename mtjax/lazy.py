"""Arrays that are read when they are asked for, so that a model passes through memory leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

K = TypeVar("K")


class LazyArray:
    """An array's shape and dtype, and a function that reads it, each time anew; np.asarray calls it.

    `source` tells which arrays are parts of one that is read whole: reading such parts one after the other
    reads it once.
    """

    def __init__(
        self, shape: Sequence[int], dtype: Any, read: Callable[[], np.ndarray], *, source: Any = None
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.read = read
        self.source = self if source is None else source

    @property
    def ndim(self) -> int:
        """Return the number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the array."""
        del copy
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        """Name shape and dtype; reads nothing."""
        return f"LazyArray({self.shape}, {self.dtype.name})"


Leaf = np.ndarray | LazyArray


def after(
    function: Callable[[np.ndarray], np.ndarray],
    leaf: Leaf,
    *,
    shape: Sequence[int] | None = None,
    dtype: Any = None,
) -> LazyArray:
    """Return function(leaf), computed when it is asked for; shape and dtype are the leaf's unless given."""
    return LazyArray(
        leaf.shape if shape is None else shape,
        leaf.dtype if dtype is None else dtype,
        lambda: function(np.asarray(leaf)),
        source=getattr(leaf, "source", leaf),
    )


def transposed(leaf: Leaf) -> LazyArray:
    """Return the leaf with its dims reversed."""
    return after(lambda x: np.ascontiguousarray(x.T), leaf, shape=leaf.shape[::-1])


def parts(leaf: Leaf, dim: int) -> list[LazyArray]:
    """Return the slices of a dim; the leaf stays in memory from one slice's reading until another's source."""
    shape = (*leaf.shape[:dim], *leaf.shape[dim + 1 :])
    return [
        LazyArray(
            shape, leaf.dtype, lambda i=i: _last_read(leaf).take(i, dim), source=getattr(leaf, "source", leaf)
        )
        for i in range(leaf.shape[dim])
    ]


_last: list[Any] = [None, None]  # the leaf that was read last, and its array


def _last_read(leaf: Leaf) -> np.ndarray:
    if _last[0] is not leaf:
        _last[:] = [None, None]  # free it before the next is read
        _last[:] = [leaf, np.asarray(leaf)]
    return _last[1]


def stack(leaves: Sequence[Leaf]) -> LazyArray:
    """Return leaves of one shape and dtype on a new first dim, filled one by one."""

    def read() -> np.ndarray:
        array = np.empty((len(leaves), *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            array[i] = np.asarray(leaf)
        return array

    return LazyArray((len(leaves), *leaves[0].shape), leaves[0].dtype, read)


def in_order(leaves: Mapping[K, Leaf]) -> list[K]:
    """Return the names so that parts of one source follow each other."""
    sources = {name: id(getattr(leaf, "source", leaf)) for name, leaf in leaves.items()}
    first: dict[int, int] = {}
    for i, source in enumerate(sources.values()):
        first.setdefault(source, i)
    return sorted(leaves, key=lambda name: first[sources[name]])
