"""Gates: what a router scores experts by.

A gate is a frozen dataclass; `make(emb_dim, num_outputs, num_tasks=T, key=key)` returns the nnx module that
maps float32 x_GND and its context to logits [G, N, num_outputs].
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models import layers
from mtjax.types import Array, Context

INIT = jax.nn.initializers.normal(0.02)


class Gate(Protocol):
    """The settings of a gate."""

    def make(self, emb_dim: int, num_outputs: int, *, num_tasks: int, key: Array) -> Any:
        """Make the gate's module."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """Score a token by its activations alone: W h."""

    def make(self, emb_dim: int, num_outputs: int, *, num_tasks: int, key: Array) -> LinearGate:
        """Make the gate's module; tasks do not matter to it."""
        del num_tasks
        return LinearGate(emb_dim, num_outputs, key=key)


LINEAR = Linear()


class LinearGate(nnx.Module):
    """The module of Linear."""

    def __init__(self, emb_dim: int, num_outputs: int, *, key: Array) -> None:
        self.w = layers.Linear(INIT(key, (emb_dim, num_outputs), jnp.float32))

    def __call__(self, x_GND: Array, context: Context) -> Array:
        """Return logits [G, N, num_outputs]."""
        del context
        return product(x_GND, self.w)


def product(x: Array, weights: layers.Linear) -> Array:
    """Map [..., in] to [..., out] in full float32: rounded logits would choose other experts."""
    return jnp.matmul(x, weights.kernel[...], precision=jax.lax.Precision.HIGHEST)
