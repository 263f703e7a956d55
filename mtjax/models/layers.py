"""T5's building blocks: RMS norm, linear maps without bias, gated feed-forward, embeddings, dropout."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import sharding, tree
from mtjax.types import Array, Aux, Context

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,  # the tanh approximation, as in T5 1.1
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def fan_in_normal(key: Array, shape: tuple[int, int], *, scale: float = 1.0) -> Array:
    """Draw N(0, scale / fan_in)."""
    return jax.nn.initializers.variance_scaling(scale, "fan_in", "normal")(key, shape)


def fan_in_truncated(key: Array, shape: tuple[int, int]) -> Array:
    """Draw a normal of variance 1 / fan_in, truncated at two standard deviations."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")(key, shape)


def dropout(x: Array, rate: float, *, context: Context, site: int, broadcast_dim: int | None) -> Array:
    """Zero entries of x with probability `rate` and scale the rest, when the context trains.

    One mask is shared along broadcast_dim (T5X: the length). `site` tells a layer's dropouts apart.
    """
    if not context.train or context.key is None or rate == 0.0:
        return x
    shape = list(x.shape)
    if broadcast_dim is not None:
        shape[broadcast_dim] = 1
    keep = jax.random.bernoulli(jax.random.fold_in(context.key, site), 1.0 - rate, shape)
    return x * jnp.where(keep, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """T5's layer norm: scale only, no mean, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, features: int) -> None:
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(self, x_BLD: Array) -> Array:
        """Normalise the last dim to unit mean square, in float32, and return x's dtype.

        The backward pass keeps x alone.
        """
        return jax.checkpoint(self.normalise)(x_BLD)

    def normalise(self, x_BLD: Array) -> Array:
        """Normalise; __call__ adds what the backward pass keeps."""
        x = x_BLD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
        return (x * inverse * self.scale[...]).astype(x_BLD.dtype)


def on_one_cpu() -> bool:
    """Tell whether the running trace is for one CPU device."""
    mesh = sharding.current_mesh()
    return sharding.platform() == "cpu" and (mesh is None or mesh.size == 1)


def matmul(x: Array, kernel: Array) -> Array:
    """Multiply [..., in] by [in, out].

    On one CPU device the leading dims are merged first: XLA then needs no transposed copies for the kernel's
    gradient (a feed-forward block's step takes half the time). Elsewhere they stay apart, so that each can be
    sharded.
    """
    if not on_one_cpu():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Module):
    """A linear map without bias; the kernel is stored in float32 and used in the input's dtype."""

    def __init__(self, kernel: Array) -> None:
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: Array, context: Context) -> Array:
        """Map [..., in] to [..., out]."""
        del context  # task-conditioned kinds of a linear map read it
        return matmul(x, self.kernel[...].astype(x.dtype))


def gated(activations: Sequence[str], *parts: Array) -> Array:
    """Return the product of the activated projections."""
    hidden, *others = (ACTIVATIONS[name](part) for name, part in zip(activations, parts, strict=True))
    for other in others:
        hidden = hidden * other
    return hidden


def projection_names(activations: Sequence[str]) -> tuple[str, ...]:
    """Name a feed-forward block's first projections: wi, or wi_0, wi_1, ... of a gated one."""
    for name in activations:
        if name not in ACTIVATIONS:
            raise tree.unknown_name("activation", name, list(ACTIVATIONS))
    return ("wi",) if len(activations) == 1 else tuple(f"wi_{i}" for i in range(len(activations)))


class MlpBlock(nnx.Module):
    """The feed-forward block: the product of its activated projections, projected back (Shazeer 2020)."""

    def __init__(
        self, emb_dim: int, mlp_dim: int, activations: Sequence[str], *, dropout_rate: float, key: Array
    ) -> None:
        self.names = projection_names(activations)
        *wi_keys, wo_key = jax.random.split(key, len(activations) + 1)
        self.activations = tuple(activations)
        for name, wi_key in zip(self.names, wi_keys, strict=True):
            setattr(self, name, Linear(fan_in_truncated(wi_key, (emb_dim, mlp_dim))))
        self.wo = Linear(fan_in_truncated(wo_key, (mlp_dim, emb_dim)))
        self.dropout_rate = dropout_rate

    def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, Aux]:
        """Return the block's output and its auxiliary losses (none)."""
        parts = [sharding.constrain(getattr(self, name)(x_BLD, context), "mlp/hidden") for name in self.names]
        # Recomputed in the backward pass from `parts` alone: elementwise work is cheaper than its memory.
        return jax.checkpoint(self.project_out)(parts, context), Aux({}, {})

    def project_out(self, parts: list[Array], context: Context) -> Array:
        """Return the product of the activated projections, projected back to [B, L, D]."""
        hidden_BLF = gated(self.activations, *parts)
        hidden_BLF = dropout(hidden_BLF, self.dropout_rate, context=context, site=10, broadcast_dim=-2)
        return self.wo(hidden_BLF, context)


class Embed(nnx.Module):
    """Token embeddings, read by a gather."""

    def __init__(self, vocab_size: int, features: int, *, key: Array) -> None:
        self.embedding = nnx.Param(jax.random.normal(key, (vocab_size, features), jnp.float32))

    def __call__(self, tokens_BL: Array, dtype: str) -> Array:
        """Return the embeddings [B, L, D] of tokens in the given dtype."""
        x_BLD = sharding.constrain(self.embedding[...][tokens_BL].astype(dtype), "embedding/lookup")
        return sharding.constrain(x_BLD, "residual")

    def pair(self, first_BS: Array, second_BL: Array, dtype: str) -> tuple[Array, Array]:
        """Return the embeddings of two batches of tokens.

        On one CPU device by one gather: its gradient then fills one table of zeros, not two.
        """
        if not on_one_cpu():
            return self(first_BS, dtype), self(second_BL, dtype)
        both = self(jnp.concatenate([first_BS, second_BL], axis=1), dtype)
        return both[:, : first_BS.shape[1]], both[:, first_BS.shape[1] :]

    def attend(self, hidden_BLD: Array) -> Array:
        """Return float32 logits [B, L, V] against the embeddings, scaled by 1/sqrt(D)."""
        hidden_BLD = hidden_BLD.astype(jnp.float32) / jnp.sqrt(hidden_BLD.shape[-1]).astype(jnp.float32)
        return sharding.constrain(matmul(hidden_BLD, self.embedding[...].T), "logits")
