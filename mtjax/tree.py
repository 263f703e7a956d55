"""Trees of parameters by path: names, ordered rules, parts, and a little linear algebra."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mtjax.types import PyTree

V = TypeVar("V")
STACK = "layers"  # leaves under a path segment of this name carry a leading layer dimension


def path_name(path: Sequence[Any]) -> str:
    """Join a jax key path to 'a/b/c'."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Return {path: leaf} in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Build the nested dict that `flatten` names."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map function(path, leaf, *rest_leaves) over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def lookup(rules: Sequence[tuple[str, V]], path: str, *, what: str = "parameter") -> V:
    """Return the value of the first rule whose regex matches the whole path.

    Raises ValueError where no rule does.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise ValueError(
        f"No rule matches {what} {path!r}. Rules, in order: {[pattern for pattern, _ in rules]}. "
        "Add a rule, or a last ('.*', ...) for everything else."
    )


def match(rules: Sequence[tuple[str, V]], tree: PyTree) -> PyTree:
    """Map every leaf to the value of its first matching rule; an unmatched leaf is a ValueError."""
    return map_with_path(lambda path, _: lookup(rules, path), tree)


def num_layer_dims(path: str) -> int:
    """Count the leading layer dimensions of a leaf: 1 where its layers are stacked, else 0."""
    return path.split("/").count(STACK)


def task_dim(path: str) -> int | None:
    """Return the dim of a leaf that counts tasks: the first after layers, where its name starts with task_."""
    return num_layer_dims(path) if path.rpartition("/")[2].startswith("task_") else None


def partition(predicate: Callable[[str], bool], tree: Mapping[str, Any]) -> tuple[dict, dict]:
    """Split a nested dict into (leaves whose path satisfies predicate, the others)."""
    leaves = flatten(tree)
    chosen = {path: leaf for path, leaf in leaves.items() if predicate(path)}
    others = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return unflatten(chosen), unflatten(others)


def combine(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Join two nested dicts without common leaves."""
    left, right = flatten(first), flatten(second)
    if common := left.keys() & right.keys():
        raise ValueError(f"Both trees hold {sorted(common)[:5]}.")
    return unflatten(left | right)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner product over all leaves, accumulated in float32."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        # Not jnp.vdot: it flattens, and to flatten what is cut over several axes is to gather it whole.
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.tensordot(x, y, axes=x.ndim, precision=jax.lax.Precision.HIGHEST)

    products = jax.tree.map(product, a, b)
    return functools.reduce(jnp.add, jax.tree.leaves(products), jnp.float32(0))


def norm(tree: PyTree) -> jax.Array:
    """Return the L2 norm over all leaves, accumulated in float32."""
    return jnp.sqrt(dot(tree, tree))


def num_parameters(tree: PyTree) -> int:
    """Count the elements of all leaves (arrays or ShapeDtypeStructs)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def difference(expected: PyTree, found: PyTree) -> list[str]:
    """List, a line each, the leaves that are missing, extra or misshapen in `found`; [] where both agree."""
    want, have = flatten(expected), flatten(found)
    lines = [f"missing    {path} {tuple(want[path].shape)}" for path in want.keys() - have.keys()]
    lines += [f"extra      {path} {tuple(have[path].shape)}" for path in have.keys() - want.keys()]
    lines += [
        f"misshapen  {path} expected {tuple(want[path].shape)}, found {tuple(have[path].shape)}"
        for path in want.keys() & have.keys()
        if tuple(want[path].shape) != tuple(have[path].shape)
    ]
    return sorted(lines)


def unknown_name(kind: str, name: str, names: Sequence[str]) -> ValueError:
    """Build the error for an unknown name, with the nearest valid ones."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    shown = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
    return ValueError(f"Unknown {kind} {name!r}.{hint} Known: {shown or 'none'}.")
