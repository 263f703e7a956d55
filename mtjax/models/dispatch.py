"""Experts applied to the tokens that a router gave them: dropless, by capacity, and by mixtures.

Dropless: choices are sorted by expert and multiplied group by group (jax.lax.ragged_dot). By capacity (Fedus
et al. 2021, section 2.2; https://arxiv.org/abs/2101.03961): every expert has slots, each of which takes one
token of a group, or a mixture of them (soft). On a mesh each device handles its own rows under jax.shard_map,
and rows or slots travel over the mesh axis 'expert' to where their experts are.

Shapes: B rows, L length, G routing groups of N tokens, D width, F hidden width, E experts, C slots an expert
has in a group, K experts a token has, M choices (tokens times K).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtjax import sharding
from mtjax.models import exchange
from mtjax.models.layers import gated
from mtjax.models.routers import ExpertChoice, TokenChoice
from mtjax.types import Array

Product = Callable[[Array, Array], Array]
KERNEL_SPECS = (P("expert", "fsdp", "model"), P("expert", "model", "fsdp"))  # of wi and wo


class Kernels(NamedTuple):
    """The experts' kernels in the dtype they are used in."""

    wi: tuple[Array, ...]  # [E, D, F] each
    wo: Array  # [E, F, D]


class FeedForward(NamedTuple):
    """What all experts have in common."""

    activations: tuple[str, ...]
    dropout_rate: float  # of the hidden activations
    key: Array | None  # None: no dropout

    def __call__(self, x: Array, kernels: Kernels, product: Product) -> Array:
        """Return the activated projections' product, projected back; product(x, kernel) knows the layout."""
        parts = [product(x, kernel) for kernel in kernels.wi]
        # Recomputed in the backward pass from `parts` alone, as a dense block does.
        return jax.checkpoint(lambda parts, wo: product(self._hidden(parts), wo))(parts, kernels.wo)

    def _hidden(self, parts: list[Array]) -> Array:
        hidden = gated(self.activations, *parts)
        if self.key is not None and self.dropout_rate:
            keep = jax.random.bernoulli(self.key, 1.0 - self.dropout_rate, hidden.shape)
            hidden = hidden * jnp.where(keep, 1.0 / (1.0 - self.dropout_rate), 0.0).astype(hidden.dtype)
        return hidden


# --- The mesh ---------------------------------------------------------------------------------------------


def _fits(mesh: Mesh, rows: int, length: int) -> bool:
    return rows % sharding.num_row_shards(mesh) == 0 and length % mesh.shape["sequence"] == 0


def _on_shards(
    local: Callable[..., Array],
    arrays: tuple[Array, ...],
    specs: tuple[P, ...],
    out_spec: P,
    *,
    feed: FeedForward,
    kernels: Kernels,
    rows: int,
    length: int,
) -> Array:
    """Call local(mesh, feed, kernels, *arrays) on every device's part of the arrays.

    Without a mesh, and where rows or length cannot be cut evenly (a few rows that are decoded), it is called
    once, with mesh None.
    """
    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1 or not _fits(mesh, rows, length):
        return local(None, feed, kernels, *arrays)

    def shard(key: Array | None, kernels: Kernels, *arrays: Array) -> Array:
        if key is not None:  # every device drops other activations
            for axis in mesh.axis_names:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        whole = Kernels(
            tuple(jax.lax.all_gather(wi, "fsdp", axis=1, tiled=True) for wi in kernels.wi),
            jax.lax.all_gather(kernels.wo, "fsdp", axis=2, tiled=True),
        )
        return local(mesh, feed._replace(key=key), whole, *arrays)

    specs_of_all = (P(), Kernels(*KERNEL_SPECS), *specs)  # type: ignore[arg-type]
    return jax.shard_map(shard, mesh=mesh, in_specs=specs_of_all, out_specs=out_spec)(
        feed.key, kernels, *arrays
    )


# --- Dropless ---------------------------------------------------------------------------------------------


def dropless(
    x_BLD: Array, choice_BLK: tuple[Array, Array], kernels: Kernels, feed: FeedForward, *, num_experts: int
) -> Array:
    """Return the weighted sum of every token's experts; choice_BLK are experts and weights.

    Expert E, one past the last, is none.
    """
    spec = P(sharding.ROW_AXES, "sequence")
    return _on_shards(
        functools.partial(_dropless, num_experts=num_experts),
        (x_BLD, *choice_BLK),
        (spec,) * 3,
        spec,
        feed=feed,
        kernels=kernels,
        rows=x_BLD.shape[0],
        length=x_BLD.shape[1],
    )


def _dropless(
    mesh: Mesh | None,
    feed: FeedForward,
    kernels: Kernels,
    x_BLD: Array,
    experts_BLK: Array,
    weights_BLK: Array,
    *,
    num_experts: int,
) -> Array:
    K, D = experts_BLK.shape[-1], x_BLD.shape[-1]
    order_M, counts_E = by_expert(experts_BLK.ravel(), num_experts)
    x_MD = jnp.repeat(x_BLD.reshape(-1, D), K, axis=0)
    sorted_MD = exchange.permute(x_MD, order_M)

    def compute(rows_MD: Array, counts_E: Array) -> Array:
        return feed(rows_MD, kernels, lambda x, kernel: jax.lax.ragged_dot(x, kernel, counts_E))

    if mesh is None or mesh.shape[exchange.AXIS] == 1:
        out_MD = compute(sorted_MD, counts_E)
    else:
        most = min(K, num_experts // mesh.shape[exchange.AXIS])  # of a token's experts on one shard
        worst = x_MD.shape[0] // K * most
        out_MD = exchange.remote(sorted_MD, counts_E, compute, worst=worst)
    out_MD = exchange.permute(out_MD, jnp.argsort(order_M))
    # What ragged_dot leaves in rows of no expert is not said.
    weighted_MD = jnp.where(
        experts_BLK.reshape(-1, 1) < num_experts, out_MD.astype(jnp.float32) * weights_BLK.reshape(-1, 1), 0.0
    )
    y_BLD = weighted_MD.reshape(*experts_BLK.shape, D).sum(2).astype(x_BLD.dtype)
    return y_BLD if mesh is None else jax.lax.psum(y_BLD, "model")


def by_expert(experts_M: Array, num_experts: int) -> tuple[Array, Array]:
    """Return the stable order [M] that sorts choices by expert, and each expert's count [E]."""
    order_M = jnp.argsort(experts_M, stable=True)
    ends = jnp.searchsorted(experts_M[order_M], jnp.arange(num_experts + 1))
    return order_M, jnp.diff(ends)


# --- Slots ------------------------------------------------------------------------------------------------


def capacity(factor: float, *, num_tokens: int, num_selected: int, num_experts: int) -> int:
    """Return the slots that an expert has in a group: ceil(factor * tokens * K / E), at most the tokens."""
    share = factor * num_tokens * num_selected / num_experts
    return min(math.ceil(share), num_tokens)


def slots_of(
    choice: TokenChoice, num_slots: int, *, num_experts: int, limit_G: Array | None = None
) -> tuple[ExpertChoice, Array]:
    """Give every choice a slot of its expert; returns also which choices [G, N, K] got one.

    First choices are served before second ones, and among these tokens with high priority, then early ones.
    limit_G: how many of its slots an expert may fill in each group, where not all.
    """
    limit_G = jnp.full(choice.experts_GNK.shape[0], num_slots) if limit_G is None else limit_G
    fill = functools.partial(_fill, num_slots=num_slots, num_experts=num_experts)
    if choice.priority_GN is None:
        served_GN = jnp.broadcast_to(jnp.arange(choice.experts_GNK.shape[1]), choice.experts_GNK.shape[:2])
    else:
        served_GN = jnp.argsort(choice.priority_GN, stable=True, descending=True)
    tokens_GEC, weights_GEC, kept_GNK = jax.vmap(fill)(
        choice.experts_GNK, choice.weights_GNK, served_GN, limit_G
    )
    return ExpertChoice(tokens_GEC, weights_GEC, choice.probs_GNE), kept_GNK


def _fill(
    experts_NK: Array, weights_NK: Array, served_N: Array, limit: Array, *, num_slots: int, num_experts: int
) -> tuple[Array, Array, Array]:
    N, K = experts_NK.shape
    token_M = jnp.tile(served_N, K)  # choices in the order in which they are served
    experts_M, weights_M = experts_NK[served_N].T.ravel(), weights_NK[served_N].T.ravel()
    order_M, counts_E = by_expert(experts_M, num_experts)
    starts_E = jnp.cumsum(counts_E) - counts_E
    slot_C = jnp.arange(num_slots)
    filled_EC = slot_C < jnp.minimum(counts_E, limit)[:, None]
    choice_EC = order_M[jnp.minimum(starts_E[:, None] + slot_C, N * K - 1)]
    place_M = jnp.argsort(order_M) - starts_E.at[experts_M].get(mode="fill", fill_value=0)
    kept_M = (experts_M < num_experts) & (place_M < jnp.minimum(limit, num_slots))
    kept_NK = kept_M.reshape(K, N).T[jnp.argsort(served_N)]
    tokens_EC = jnp.where(filled_EC, token_M[choice_EC], 0)
    return tokens_EC, jnp.where(filled_EC, weights_M[choice_EC], 0.0), kept_NK


def by_slots(
    x_GND: Array, tokens_GEC: Array, weights_GEC: Array, kernels: Kernels, feed: FeedForward
) -> Array:
    """Return, for every token, the weighted sum of the slots that took it; weight 0 is an empty slot."""
    mesh = sharding.current_mesh()
    # Shards of the length share an expert's slots.
    extra = 0 if mesh is None else -tokens_GEC.shape[-1] % mesh.shape["sequence"]
    padding = ((0, 0), (0, 0), (0, extra))
    rows = P(sharding.ROW_AXES)
    slots = P(sharding.ROW_AXES, None, "sequence")
    return _on_shards(
        _by_slots,
        (x_GND, jnp.pad(tokens_GEC, padding), jnp.pad(weights_GEC, padding)),
        (rows, slots, slots),
        P(sharding.ROW_AXES, "sequence"),
        feed=feed,
        kernels=kernels,
        rows=x_GND.shape[0],
        length=x_GND.shape[1],
    )


def _by_slots(
    mesh: Mesh | None,
    feed: FeedForward,
    kernels: Kernels,
    x_GND: Array,
    tokens_GEC: Array,
    weights_GEC: Array,
) -> Array:
    taken_GECD = jax.vmap(lambda x_ND, tokens_EC: x_ND[tokens_EC])(x_GND, tokens_GEC)
    out_GECD = _through_experts(mesh, feed, kernels, taken_GECD)
    weighted_GECD = out_GECD.astype(jnp.float32) * weights_GEC[..., None]
    N, D = x_GND.shape[1:]

    def put(tokens_EC: Array, values_ECD: Array) -> Array:
        return jnp.zeros((N, D), jnp.float32).at[tokens_EC.ravel()].add(values_ECD.reshape(-1, D))

    y_GND = jax.vmap(put)(tokens_GEC, weighted_GECD).astype(x_GND.dtype)
    if mesh is not None:
        y_GND = jax.lax.psum_scatter(y_GND, "sequence", scatter_dimension=1, tiled=True)
        y_GND = jax.lax.psum(y_GND, "model")
    return y_GND


def by_mixtures(
    x_GND: Array, dispatch_GNEC: Array, combine_GNEC: Array, kernels: Kernels, feed: FeedForward
) -> Array:
    """Return the experts' outputs for mixtures of tokens, mixed back (Puigcerver et al. 2023)."""
    spec = P(sharding.ROW_AXES, "sequence")
    return _on_shards(
        _by_mixtures,
        (x_GND, dispatch_GNEC, combine_GNEC),
        (spec,) * 3,
        spec,
        feed=feed,
        kernels=kernels,
        rows=x_GND.shape[0],
        length=x_GND.shape[1],
    )


def _by_mixtures(
    mesh: Mesh | None,
    feed: FeedForward,
    kernels: Kernels,
    x_GND: Array,
    dispatch_GNEC: Array,
    combine_GNEC: Array,
) -> Array:
    mixed_GECD = jnp.einsum("gnec,gnd->gecd", dispatch_GNEC, x_GND.astype(jnp.float32))
    if mesh is not None:
        mixed_GECD = jax.lax.psum(mixed_GECD, "sequence")
    out_GECD = _through_experts(mesh, feed, kernels, mixed_GECD.astype(x_GND.dtype))
    y_GND = jnp.einsum("gnec,gecd->gnd", combine_GNEC, out_GECD.astype(jnp.float32)).astype(x_GND.dtype)
    return y_GND if mesh is None else jax.lax.psum(y_GND, "model")


def _through_experts(mesh: Mesh | None, feed: FeedForward, kernels: Kernels, x_GECD: Array) -> Array:
    """Run slots [G, E, C, D] through their experts, wherever these are."""
    G, E, C, D = x_GECD.shape
    x_EMD = jnp.swapaxes(x_GECD, 0, 1).reshape(E, G * C, D)
    is_cut = mesh is not None and mesh.shape[exchange.AXIS] > 1
    if is_cut:
        x_EMD = jax.lax.all_to_all(x_EMD, exchange.AXIS, 0, 1, tiled=True)
    x_EMD = feed(x_EMD, kernels, jnp.matmul)
    if is_cut:
        x_EMD = jax.lax.all_to_all(x_EMD, exchange.AXIS, 1, 0, tiled=True)
    return jnp.swapaxes(x_EMD.reshape(E, G, C, D), 0, 1)
