"""Attention in tiles for TPUs, after FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).

    logits = query @ key + bias[key position - query position],  output = softmax(logits) @ value

is computed tile by tile in the chip's own memory, forward and backward: no array [L, S] is in HBM, neither
the weights nor the mask nor T5's relative bias. The bias travels as one value per head and distance, [H, L +
S], and each tile cuts its band of diagonals from it; the gradient is summed along the same diagonals.

Inside the kernels a tile is [keys, queries], so that maxima and sums over keys are sums of whole registers.
Heads are neighbours in the last dim, [B, L, H * K], as the projections make them: a block holds as many heads
as fill the 128 lanes, and a product for one of them sees zeros in the others' lanes. So Z below is the width
of all heads, X a number of distances, G the heads of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtjax.types import Array

LANES = 128  # of a TPU's vector registers
QUERY_BYTES = 8 << 20  # of a TPU v4's 16 MiB of VMEM; newer ones have more
NOT_VISIBLE = -1e30
LOWEST = -1e20  # below every logit, far above NOT_VISIBLE: powers of what is not visible are exactly 0

PADDING = -2  # the code of a key that nothing sees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBias:
    """An attention bias by token and by distance: what makes any tile of the dense one.

    A code is 2 * segment + (1 in a prefix), PADDING for padding. A query sees the keys of its own segment;
    with `causal` only keys not after it, or any where both are in a prefix.
    """

    keys_BS: Array  # int32 codes
    queries_BL: Array | None = None  # int32 codes; None: all of segment 0
    by_distance_HX: Array | None = None  # float32, of the distances key - query = 1 - L, ..., S
    causal: bool = dataclasses.field(default=False, metadata={"static": True})


class Tiling(NamedTuple):
    """How the work is cut: static arguments of the kernels."""

    heads: int  # of a block
    width: int  # of a head
    queries: int  # of a tile
    keys: int  # of a tile
    causal: bool
    biased: bool
    interpret: bool

    @property
    def lanes(self) -> int:
        return self.heads * self.width

    @property
    def unit(self) -> int:
        """The number that divides all lengths, at most LANES."""
        return math.gcd(LANES, self.queries, self.keys)


def heads_per_block(num_heads: int, head_dim: int) -> int | None:
    """Return how many heads fill the lanes of a block; None where they do not fit."""
    if head_dim % LANES == 0:
        return 1
    heads = min(num_heads, LANES // head_dim)
    return heads if LANES % head_dim == 0 and num_heads % heads == 0 else None


def obstacle(*, num_heads: int, head_dim: int, num_queries: int, bytes_each: int) -> str | None:
    """Say why the kernels cannot take these shapes, or return None."""
    if heads_per_block(num_heads, head_dim) is None:
        return (
            f"{num_heads} heads (of a device) of {head_dim} do not fill blocks of {LANES} lanes: head_dim must "
            f"divide {LANES} or be a multiple of it, and the number of heads a multiple of {LANES} / head_dim"
        )
    # The backward pass keeps the gradients of all queries of a block: float32 sums, and twice what it returns.
    most = QUERY_BYTES // (max(head_dim, LANES) * (4 + 2 * bytes_each))
    if num_queries > most:
        return f"{num_queries} queries are more than the {most} whose gradient fits in VMEM"
    return None


def flash_attention(
    query_BHLK: Array,
    key_BHSK: Array,
    value_BHSK: Array,
    bias: TokenBias,
    *,
    block: int = 512,
    interpret: bool = False,
) -> Array:
    """Return softmax(query @ key + bias) @ value, [B, H, L, K], without an array [L, S] in memory.

    The softmax is float32. A query that sees no key gets 0. Tiles are at most block x block, where lengths
    are padded to multiples of 128 (of `block` if smaller); tiles that nobody sees are skipped. `interpret`
    runs the kernels on any device, slowly.
    """
    num_heads, num_queries, head_dim = query_BHLK.shape[1:]
    heads = heads_per_block(num_heads, head_dim)
    assert heads is not None, "obstacle() says why"
    unit = min(LANES, block)
    queries_BL = bias.queries_BL
    if queries_BL is None:
        queries_BL = jnp.zeros((query_BHLK.shape[0], num_queries), jnp.int32)
    query_BLZ = _pad(_join_heads(query_BHLK), 1, unit)
    key_BSZ, value_BSZ = (_pad(_join_heads(x_BHSK), 1, unit) for x_BHSK in (key_BHSK, value_BHSK))
    tiling = Tiling(
        heads=heads,
        width=head_dim,
        queries=_divisor(query_BLZ.shape[1], block, unit),
        keys=_divisor(key_BSZ.shape[1], block, unit),
        causal=bias.causal,
        biased=bias.by_distance_HX is not None,
        interpret=interpret,
    )
    codes = (_pad(queries_BL, 1, unit, PADDING), _pad(bias.keys_BS, 1, unit, PADDING))
    table = None if bias.by_distance_HX is None else _table(bias.by_distance_HX, num_queries, unit, heads)
    # The annotation is for pyright: custom_vjp hides the type.
    mixed_BLZ: Array = _attend(
        tiling, query_BLZ, key_BSZ, value_BSZ, table, (*codes, _active(tiling, *codes))
    )  # type: ignore[assignment]
    mixed_BLHK = mixed_BLZ[:, :num_queries].reshape(-1, num_queries, num_heads, head_dim)
    return jnp.swapaxes(mixed_BLHK, 1, 2)


# --- What the kernels get ---------------------------------------------------------------------------------


def _join_heads(x_BHSK: Array) -> Array:
    x_BSHK = jnp.swapaxes(x_BHSK, 1, 2)
    return x_BSHK.reshape(*x_BSHK.shape[:2], -1)


def _pad(x: Array, dim: int, multiple: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def _divisor(length: int, block: int, unit: int) -> int:
    """Return the largest multiple of unit, at most block, that divides length."""
    return max(size for size in range(unit, block + 1, unit) if length % size == 0)


def _table(by_distance_HX: Array, num_queries: int, unit: int, heads: int) -> Array:
    """Return [H / G, G, X] of falling distances S - 1, ..., 1 - L and one more, of padded lengths L and S."""
    num_keys = by_distance_HX.shape[1] - num_queries
    # Distances that only padding has are never seen; that of S itself is cut off.
    padding = (-num_queries % unit, -num_keys % unit)
    padded_HX = jnp.pad(by_distance_HX[:, :-1], ((0, 0), (padding[0] + 1, padding[1])))
    return padded_HX[:, ::-1].reshape(-1, heads, padded_HX.shape[1])


def _active(tiling: Tiling, queries_BL: Array, keys_BS: Array) -> Array:
    """Return 0 for tiles in which no query sees a key, int32 [B * query tiles * key tiles]."""
    rows = queries_BL.shape[0]
    queries = queries_BL.reshape(rows, -1, 1, tiling.queries)
    keys = keys_BS.reshape(rows, 1, -1, tiling.keys)
    low, high = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max

    def span(codes: Array) -> tuple[Array, Array]:
        real, segment = codes >= 0, codes >> 1
        return jnp.where(real, segment, high).min(-1), jnp.where(real, segment, low).max(-1)

    (first_query, last_query), (first_key, last_key) = span(queries), span(keys)
    active = (first_query <= last_key) & (first_key <= last_query)
    if tiling.causal:
        end_of_queries = (jnp.arange(queries.shape[1])[:, None] + 1) * tiling.queries
        both_prefix = ((queries & 1) == 1).any(-1) & ((keys & 1) == 1).any(-1)
        active = active & ((jnp.arange(keys.shape[2]) * tiling.keys < end_of_queries) | both_prefix)
    return active.astype(jnp.int32).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tiling: Tiling, query_BLZ: Array, key_BSZ: Array, value_BSZ: Array, table: Array | None, codes: Any
) -> Array:
    return _forward(tiling, query_BLZ, key_BSZ, value_BSZ, table, codes)[0]


def _attend_forward(tiling: Tiling, *inputs: Any) -> tuple[Array, tuple]:
    # Named, so that a remat policy can keep them: without both the kernel runs again in the backward pass.
    mixed_BLZ, normaliser = (checkpoint_name(x, "attention") for x in _forward(tiling, *inputs))
    return mixed_BLZ, (inputs, mixed_BLZ, normaliser)


def _attend_backward(tiling: Tiling, residuals: tuple, cotangent_BLZ: Array) -> tuple:
    inputs, mixed_BLZ, normaliser = residuals
    return (*_backward(tiling, inputs, mixed_BLZ, normaliser, cotangent_BLZ), None)


_attend.defvjp(_attend_forward, _attend_backward)


# --- Kernels ----------------------------------------------------------------------------------------------


def _dot(a: Array, b: Array, a_dim: int, b_dim: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _only(head: int, x: Array, tiling: Tiling) -> Array:
    """Set the lanes of other heads to 0."""
    if tiling.heads == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= head * tiling.width) & (lane < (head + 1) * tiling.width), x, jnp.zeros_like(x))


def _visible(queries_ref: Any, keys_ref: Any, i: Array, j: Array, tiling: Tiling) -> Array:
    """Return which keys of tile (i, j) its queries see, bool [keys, queries]."""
    query_codes = queries_ref[0]  # [1, queries]
    key_codes = jnp.broadcast_to(keys_ref[0], (LANES, tiling.keys)).T[:, :1]
    visible = (query_codes >> 1) == (key_codes >> 1)
    if tiling.causal:
        shape = (tiling.keys, tiling.queries)
        distance = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - jax.lax.broadcasted_iota(
            jnp.int32, shape, 1
        )
        not_after = distance <= i * tiling.queries - j * tiling.keys
        visible = visible & (not_after | ((query_codes & key_codes & 1) == 1))
    return visible


def _band(i: Array, j: Array, num_key_tiles: Any, tiling: Tiling) -> Any:
    """Return the lanes of the table that hold the distances of tile (i, j), the largest first."""
    start = (num_key_tiles - 1 - j) * tiling.keys + i * tiling.queries
    return pl.ds(pl.multiple_of(start, tiling.unit), tiling.queries + tiling.keys)


def _skew(band: Array, tiling: Tiling) -> Array:
    """Make a tile [keys, queries] whose row s, column l is band[0, keys - 1 - s + l]."""
    # Row r of `skewed` is the band rolled by r + 1. Rows double: no register needs a stride.
    rows = min(8, tiling.unit)
    skewed = jnp.broadcast_to(pltpu.roll(band, 1, 1), (rows, band.shape[1]))
    row = jax.lax.broadcasted_iota(jnp.int32, skewed.shape, 0)
    for bit in (b for b in (1, 2, 4) if b < rows):
        skewed = jnp.where(row & bit != 0, pltpu.roll(skewed, bit, 1), skewed)
    while rows < tiling.unit:
        skewed = jnp.concatenate([skewed, pltpu.roll(skewed, rows, 1)], 0)
        rows *= 2
    starts = range(tiling.keys, 0, -tiling.unit)
    return jnp.concatenate([skewed[:, start : start + tiling.queries] for start in starts], 0)


def _unskew(tile: Array, tiling: Tiling) -> Array:
    """Sum a tile along its diagonals to a band [1, queries + keys]: the transpose of _skew."""
    rows, width = tiling.unit, tiling.queries + tiling.keys
    skewed = jnp.zeros((rows, width), tile.dtype)
    for row in range(0, tiling.keys, rows):
        skewed += jnp.pad(tile[row : row + rows], ((0, 0), (tiling.keys - row, row)))
    while rows > 1:
        rows //= 2
        skewed = skewed[:rows] + pltpu.roll(skewed[rows:], width - rows, 1)
    return pltpu.roll(skewed, width - 1, 1)


def _forward_kernel(tiling: Tiling, active_ref: Any, *refs: Any) -> None:
    query_ref, key_ref, value_ref, queries_ref, keys_ref, *others = refs
    table_ref = others.pop(0) if tiling.biased else None
    mixed_ref, normaliser_ref, highest_ref, sum_ref, mixed_KL = others
    b, i, j = (pl.program_id(dim) for dim in (1, 2, 3))
    num_query_tiles, num_key_tiles = pl.num_programs(2), pl.num_programs(3)

    @pl.when(j == 0)
    def _() -> None:
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        mixed_KL[...] = jnp.zeros_like(mixed_KL)

    @pl.when(active_ref[(b * num_query_tiles + i) * num_key_tiles + j] != 0)
    def _() -> None:
        query, key, value = query_ref[0], key_ref[0], value_ref[0]
        value_KS = value.T
        visible = _visible(queries_ref, keys_ref, i, j, tiling)
        for head in range(tiling.heads):
            row, lanes = pl.ds(head, 1), slice(head * tiling.width, (head + 1) * tiling.width)
            logits_SL = _dot(key, _only(head, query, tiling), 1, 1)
            if table_ref is not None:
                logits_SL += _skew(table_ref[0, row, _band(i, j, num_key_tiles, tiling)], tiling)
            logits_SL = jnp.where(visible, logits_SL, NOT_VISIBLE)
            highest = jnp.maximum(highest_ref[row], logits_SL.max(0, keepdims=True))
            powers_SL = jnp.exp(logits_SL - highest)
            shrink = jnp.exp(highest_ref[row] - highest)
            highest_ref[row] = highest
            sum_ref[row] = shrink * sum_ref[row] + powers_SL.sum(0, keepdims=True)
            mixed_KL[lanes] = shrink * mixed_KL[lanes] + _dot(
                value_KS[lanes], powers_SL.astype(value.dtype), 1, 0
            )

    @pl.when(j == num_key_tiles - 1)
    def _() -> None:
        for head in range(tiling.heads):
            row, lanes = pl.ds(head, 1), slice(head * tiling.width, (head + 1) * tiling.width)
            total = jnp.where(sum_ref[row] == 0.0, 1.0, sum_ref[row])
            normaliser_ref[0, 0, row] = highest_ref[row] + jnp.log(total)
            mixed_KL[lanes] = mixed_KL[lanes] / total
        mixed_ref[0] = mixed_KL[...].T.astype(mixed_ref.dtype)


def _backward_kernel(tiling: Tiling, active_ref: Any, *refs: Any) -> None:
    query_ref, key_ref, value_ref, queries_ref, keys_ref, *others = refs
    table_ref = others.pop(0) if tiling.biased else None
    cotangent_ref, normaliser_ref, mean_ref, of_query_ref, of_key_ref, of_value_ref, *others = others
    of_table_ref = others.pop(0) if tiling.biased else None
    of_query_LK, of_key_SK, of_value_SK = others
    b, j, i = (pl.program_id(dim) for dim in (1, 2, 3))
    num_key_tiles, num_query_tiles = pl.num_programs(2), pl.num_programs(3)
    rows = pl.ds(pl.multiple_of(i * tiling.queries, tiling.queries), tiling.queries)

    if of_table_ref is not None:

        @pl.when((b == 0) & (j == 0) & (i == 0))
        def _() -> None:
            of_table_ref[...] = jnp.zeros_like(of_table_ref)

    @pl.when(j == 0)
    def _() -> None:
        of_query_LK[rows] = jnp.zeros((tiling.queries, tiling.lanes), jnp.float32)

    @pl.when(i == 0)
    def _() -> None:
        of_key_SK[...] = jnp.zeros_like(of_key_SK)
        of_value_SK[...] = jnp.zeros_like(of_value_SK)

    @pl.when(active_ref[(b * num_query_tiles + i) * num_key_tiles + j] != 0)
    def _() -> None:
        query, key, value, cotangent = query_ref[0], key_ref[0], value_ref[0], cotangent_ref[0]
        visible = _visible(queries_ref, keys_ref, i, j, tiling)
        band = _band(i, j, num_key_tiles, tiling)
        for head in range(tiling.heads):
            row = pl.ds(head, 1)
            own_query, own_cotangent = _only(head, query, tiling), _only(head, cotangent, tiling)
            logits_SL = _dot(key, own_query, 1, 1)
            if table_ref is not None:
                logits_SL += _skew(table_ref[0, row, band], tiling)
            weights_SL = jnp.where(visible, jnp.exp(logits_SL - normaliser_ref[0, 0, row]), 0.0)
            of_value_SK[...] += _dot(weights_SL.astype(cotangent.dtype), own_cotangent, 1, 0)
            of_logits_SL = weights_SL * (_dot(value, own_cotangent, 1, 1) - mean_ref[0, 0, row])
            if of_table_ref is not None:
                of_table_ref[0, row, band] += _unskew(of_logits_SL, tiling)
            of_logits_SL = of_logits_SL.astype(query.dtype)
            of_key_SK[...] += _dot(of_logits_SL, own_query, 1, 0)
            of_query_LK[rows] += _dot(of_logits_SL, _only(head, key, tiling), 0, 0)

    @pl.when(i == num_query_tiles - 1)
    def _() -> None:
        of_key_ref[0] = of_key_SK[...].astype(of_key_ref.dtype)
        of_value_ref[0] = of_value_SK[...].astype(of_value_ref.dtype)

    @pl.when(j == num_key_tiles - 1)
    def _() -> None:
        of_query_ref[0, rows] = of_query_LK[rows].astype(of_query_ref.dtype)


# --- Calls ------------------------------------------------------------------------------------------------


def _specs(tiling: Tiling, inputs: tuple, *, keys_outside: bool) -> dict[str, Any]:
    """Name the blocks of a grid (head block, row, query tile, key tile), or with the tiles the other way."""

    def spec(shape: tuple[int, ...], dims: str) -> Any:
        def index(h: Any, b: Any, first: Any, second: Any, _: Any) -> tuple:
            i, j = (second, first) if keys_outside else (first, second)
            return tuple({"h": h, "b": b, "i": i, "j": j, "0": 0}[dim] for dim in dims)

        return pl.BlockSpec(shape, index)

    num_queries, num_keys = inputs[0].shape[1], inputs[1].shape[1]
    return {
        "queries": spec((1, tiling.queries, tiling.lanes), "bih"),
        "keys": spec((1, tiling.keys, tiling.lanes), "bjh"),
        "query codes": spec((1, 1, tiling.queries), "b0i"),
        "key codes": spec((1, 1, tiling.keys), "b0j"),
        "table": spec((1, tiling.heads, num_queries + num_keys), "h00"),
        "statistics": spec((1, 1, tiling.heads, tiling.queries), "hb0i"),  # one of every head and query
        "all queries": spec((1, num_queries, tiling.lanes), "b0h"),
    }


def _arguments(tiling: Tiling, inputs: tuple) -> tuple[list[str], list[Array]]:
    """Return what both kernels read, by the name of its block, without the tiles' activity."""
    query_BLZ, key_BSZ, value_BSZ, table, (queries_BL, keys_BS, _) = inputs
    names = ["queries", "keys", "keys", "query codes", "key codes"]
    arrays = [query_BLZ, key_BSZ, value_BSZ, queries_BL[:, None], keys_BS[:, None]]
    return ([*names, "table"], [*arrays, table]) if tiling.biased else (names, arrays)


def _cost(inputs: tuple, tiling: Tiling, *, products: int) -> Any:
    """Tell the compiler what it cannot see in a kernel."""
    query_BLZ, key_BSZ, *_ = inputs
    (rows, num_queries, width), num_keys = query_BLZ.shape, key_BSZ.shape[1]
    weights = rows * num_queries * num_keys
    passes = 1 if num_keys == tiling.keys else num_queries // tiling.queries  # over keys, forward
    read = (products // 2) * (query_BLZ.nbytes + key_BSZ.nbytes * passes) + 2 * query_BLZ.nbytes
    return pl.CostEstimate(
        flops=2 * products * weights * width,
        transcendentals=weights * width // tiling.width,
        bytes_accessed=read,
    )


def _forward(tiling: Tiling, *inputs: Any) -> tuple[Array, Array]:
    """Return mixed [B, L, Z] and the logarithm of each softmax's denominator, [H / G, B, G, L]."""
    (rows, num_queries, width), num_keys = inputs[0].shape, inputs[1].shape[1]
    blocks = width // tiling.lanes
    specs = _specs(tiling, inputs, keys_outside=False)
    names, arrays = _arguments(tiling, inputs)
    return pl.pallas_call(
        functools.partial(_forward_kernel, tiling),
        out_shape=[
            jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype),
            jax.ShapeDtypeStruct((blocks, rows, tiling.heads, num_queries), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, rows, num_queries // tiling.queries, num_keys // tiling.keys),
            in_specs=[specs[name] for name in names],
            out_specs=[specs["queries"], specs["statistics"]],
            scratch_shapes=[
                pltpu.VMEM((tiling.heads, tiling.queries), jnp.float32),
                pltpu.VMEM((tiling.heads, tiling.queries), jnp.float32),
                pltpu.VMEM((tiling.lanes, tiling.queries), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(inputs, tiling, products=2),
        interpret=tiling.interpret,
        name="flash_attention_forward",
    )(inputs[4][2], *arrays)


def _backward(
    tiling: Tiling, inputs: tuple, mixed_BLZ: Array, normaliser: Array, cotangent_BLZ: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Return the gradients of query, key, value and table."""
    (rows, num_queries, width), num_keys = inputs[0].shape, inputs[1].shape[1]
    blocks = width // tiling.lanes
    weighted = cotangent_BLZ.astype(jnp.float32) * mixed_BLZ.astype(jnp.float32)
    mean = weighted.reshape(rows, num_queries, blocks, tiling.heads, tiling.width).sum(-1)
    specs = _specs(tiling, inputs, keys_outside=True)
    names, arrays = _arguments(tiling, inputs)
    outputs = ["all queries", "keys", "keys"] + ["table"] * tiling.biased
    of_query, of_key, of_value, *of_table = pl.pallas_call(
        functools.partial(_backward_kernel, tiling),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[: len(outputs)]],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, rows, num_keys // tiling.keys, num_queries // tiling.queries),
            in_specs=[specs[name] for name in (*names, "queries", "statistics", "statistics")],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[
                pltpu.VMEM((num_queries, tiling.lanes), jnp.float32),
                pltpu.VMEM((tiling.keys, tiling.lanes), jnp.float32),
                pltpu.VMEM((tiling.keys, tiling.lanes), jnp.float32),
            ],
        ),
        # The rows of a head share the gradient of its table, and key tiles that of a query.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        ),
        cost_estimate=_cost(inputs, tiling, products=5),
        interpret=tiling.interpret,
        name="flash_attention_backward",
    )(inputs[4][2], *arrays, cotangent_BLZ, normaliser, mean.transpose(2, 0, 3, 1))
    return of_query, of_key, of_value, of_table[0] if of_table else None
