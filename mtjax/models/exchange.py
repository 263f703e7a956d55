"""Expert parallelism: rows of tokens travel to the shards that hold their experts, and back.

Inside jax.shard_map over the mesh axis 'expert'. Rows are sorted by expert, and shard p holds the experts
p E/P, ..., (p + 1) E/P - 1, so what goes to one shard is contiguous. Shapes: M rows here, D width, E experts,
P shards of the axis that send and Q that receive, R rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax import sharding
from mtjax.types import Array

AXIS = "expert"


def remote(x_MD: Array, counts_E: Array, compute: Callable[[Array, Array], Array], *, worst: int) -> Array:
    """Return compute(rows, rows per expert) of rows sorted by expert, computed where their experts are.

    counts_E says how many rows each expert gets; rows after them go nowhere and return as zeros. `worst` is
    the largest number of rows that one shard may send another. `compute` sees the rows of this shard's
    experts, sorted by expert.
    """
    shards = jax.lax.axis_size(AXIS)
    here = counts_E.shape[0] // shards
    counts_PE = jax.lax.all_gather(counts_E, AXIS)
    sizes_PQ = counts_PE.reshape(shards, shards, here).sum(-1)
    received_RD = exchange(x_MD, sizes_PQ, rows=shards * worst, worst=worst)
    mine_PE = jax.lax.dynamic_slice_in_dim(counts_PE, jax.lax.axis_index(AXIS) * here, here, axis=1)
    order_R = jnp.argsort(_experts_of_rows(mine_PE, received_RD.shape[0]), stable=True)
    out_RD = compute(permute(received_RD, order_R), mine_PE.sum(0))
    return exchange(permute(out_RD, jnp.argsort(order_R)), sizes_PQ.T, rows=x_MD.shape[0], worst=worst)


def permute(x_MD: Array, order_M: Array) -> Array:
    """Return x[order] of a permutation. Its gradient is a permutation too, with nothing to add up."""
    return x_MD.at[order_M].get(unique_indices=True, mode="promise_in_bounds")


def _experts_of_rows(counts_PE: Array, rows: int) -> Array:
    """Return the expert of each row [R] of chunks that are sorted by sender, then expert; E for no chunk."""
    experts = counts_PE.shape[1]
    chunk_R = jnp.searchsorted(jnp.cumsum(counts_PE.ravel()), jnp.arange(rows), side="right")
    return jnp.where(chunk_R < counts_PE.size, chunk_R % experts, experts)


def exchange(x_MD: Array, sizes_PQ: Array, *, rows: int, worst: int) -> Array:
    """Send chunks of rows to every shard of the axis; return the received ones, sorted by sender.

    sizes_PQ[p, q] rows go from shard p to shard q. The chunks lie in x_MD in the order of their receivers
    from row 0 on, and the received ones do in the order of their senders; other rows of the result are zeros.
    No chunk has more than `worst` rows.
    """
    body = _exchange_padded if sharding.platform() == "cpu" else _exchange_ragged
    return body(x_MD, plan(sizes_PQ, jax.lax.axis_index(AXIS)), rows=rows, worst=worst)


class Plan(NamedTuple):
    """One shard's part of an exchange, as jax.lax.ragged_all_to_all takes it: int32 [P] each."""

    input_offsets: Array  # where in this shard's rows the chunk for each receiver starts
    send_sizes: Array
    output_offsets: Array  # where that chunk starts in the result of its receiver
    recv_sizes: Array


def plan(sizes_PQ: Array, shard: Array | int) -> Plan:
    """Return a shard's part of the exchange of sizes_PQ[p, q] rows from p to q."""
    sizes_PQ = sizes_PQ.astype(jnp.int32)
    before_PQ = jnp.cumsum(sizes_PQ, axis=0) - sizes_PQ
    send_sizes = sizes_PQ[shard]
    return Plan(jnp.cumsum(send_sizes) - send_sizes, send_sizes, before_PQ[shard], sizes_PQ[:, shard])


def _exchange_ragged(x_MD: Array, plan: Plan, *, rows: int, worst: int) -> Array:
    """Exchange just the rows there are (TPU and GPU)."""
    del worst
    zeros_RD = jnp.zeros((rows, x_MD.shape[1]), x_MD.dtype)
    return jax.lax.ragged_all_to_all(x_MD, zeros_RD, *plan, axis_name=AXIS)


def _exchange_padded(x_MD: Array, plan: Plan, *, rows: int, worst: int) -> Array:
    """Exchange chunks padded to the worst case: CPUs have no ragged_all_to_all."""
    slot_W = jnp.arange(worst)
    source_PW = jnp.where(
        slot_W < plan.send_sizes[:, None], plan.input_offsets[:, None] + slot_W, x_MD.shape[0]
    )
    chunks_PWD = x_MD.at[source_PW].get(mode="fill", fill_value=0)
    chunks_PWD = jax.lax.all_to_all(chunks_PWD, AXIS, 0, 0, tiled=True)
    ends_P = jnp.cumsum(plan.recv_sizes)
    row_R = jnp.arange(rows)
    sender_R = jnp.searchsorted(ends_P, row_R, side="right")
    start_P = ends_P - plan.recv_sizes
    slot_R = row_R - start_P.at[sender_R].get(mode="fill", fill_value=0)
    index_R = jnp.where(sender_R < ends_P.shape[0], sender_R * worst + slot_R, ends_P.shape[0] * worst)
    return chunks_PWD.reshape(-1, x_MD.shape[1]).at[index_R].get(mode="fill", fill_value=0)
