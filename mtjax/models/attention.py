"""T5's attention: relative position bias, masks for padding and packing, and its cached form."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtjax import sharding
from mtjax.models import fast_attention
from mtjax.models.flash import PADDING, TokenBias
from mtjax.models.layers import Linear, dropout, fan_in_normal
from mtjax.types import Array, Context

MASKED = -1e10


def relative_position_bucket(
    distance: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Map key position minus query position to a bucket (Raffel et al. 2020, section 2.1).

    Half of the buckets are exact small distances, the other half logarithmic up to max_distance; with
    `bidirectional`, keys before and after the query get half of the buckets each, else keys after it share
    the bucket of distance 0.
    """
    backward = -distance
    offset = np.zeros_like(backward)
    if bidirectional:
        num_buckets //= 2
        offset = (backward < 0) * num_buckets
        backward = np.abs(backward)
    else:
        backward = np.maximum(backward, 0)
    exact = num_buckets // 2
    with np.errstate(divide="ignore"):
        ratio = np.log(backward.astype(np.float32) / exact + np.finfo(np.float32).eps)
    large = exact + (ratio / math.log(max_distance / exact) * (num_buckets - exact)).astype(np.int32)
    return offset + np.where(backward < exact, backward, np.minimum(large, num_buckets - 1))


class RelativePositionBias(nnx.Module):
    """One learned bias per head and bucket of relative distance, shared by the layers of a stack."""

    def __init__(
        self, num_heads: int, *, num_buckets: int, max_distance: int, bidirectional: bool, key: Array
    ) -> None:
        init = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        self.rel_embedding = nnx.Param(init(key, (num_heads, num_buckets), jnp.float32))
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def by_distance(self, low: int, high: int) -> Array:
        """Return the bias [H, high - low] of the distances key - query = low, ..., high - 1."""
        buckets = relative_position_bucket(
            np.arange(low, high),
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return self.rel_embedding[...][:, buckets]

    def __call__(self, num_queries: int, num_keys: int, *, first_key: int = 0) -> Array:
        """Return the bias [H, L, S] of queries that count from position 0, and keys from first_key."""
        values = self.by_distance(first_key + 1 - num_queries, first_key + num_keys + 1)
        return _skew(values, num_queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _skew(values: Array, num_queries: int) -> Array:
    """Cut rows [H, L, S] from values [H, L + S]: row q is the slice that starts at L - 1 - q."""
    # Copies of `values`, flattened and cut into rows one shorter, are skewed just so: no gather.
    num_heads, width = values.shape
    copies = jnp.broadcast_to(values[:, None], (num_heads, num_queries, width)).reshape(num_heads, -1)
    skewed = copies[:, : num_queries * (width - 1)].reshape(num_heads, num_queries, width - 1)
    return skewed[:, :, num_queries - 1 :]


def _skew_forward(values: Array, num_queries: int) -> tuple[Array, None]:
    return _skew(values, num_queries), None


def _skew_backward(num_queries: int, residuals: None, cotangent_HLS: Array) -> tuple[Array]:
    # The same way back, without a scatter-add; the sum is a product because XLA sums slowly over a dim that
    # is not the last one (CPU).
    num_heads = cotangent_HLS.shape[0]
    skewed = jnp.pad(cotangent_HLS, ((0, 0), (0, 0), (num_queries - 1, 0))).reshape(num_heads, -1)
    copies = jnp.pad(skewed, ((0, 0), (0, num_queries))).reshape(num_heads, num_queries, -1)
    return (jnp.einsum("l,hlw->hw", jnp.ones(num_queries, copies.dtype), copies),)


_skew.defvjp(_skew_forward, _skew_backward)


def attention_mask(
    *,
    keys_BS: Array,
    query_segments_BL: Array | None = None,
    key_segments_BS: Array | None = None,
    causal: bool = False,
    prefix_BS: Array | None = None,
) -> Array:
    """Return what queries may see, bool, broadcastable to [B, H, L, S].

    keys_BS are the keys that are not padding. With segments, only keys of the query's own segment; with
    `causal`, no keys after the query, except that positions marked in prefix_BS see each other. Padded
    queries are not masked: nothing reads them.
    """
    mask = (keys_BS != 0)[:, None, None, :]
    if causal:
        position = jnp.arange(keys_BS.shape[1])
        visible = (position[:, None] >= position)[None, None]
        if prefix_BS is not None:
            prefix = prefix_BS != 0
            visible = visible | (prefix[:, None, :, None] & prefix[:, None, None, :])
        mask = mask & visible
    if query_segments_BL is not None and key_segments_BS is not None:
        mask = mask & (query_segments_BL[:, None, :, None] == key_segments_BS[:, None, None, :])
    return mask


class Bias(NamedTuple):
    """What is added to attention logits: -1e10 where not visible, and the relative position bias.

    They stay apart: the visible part has rows and no heads, the relative part heads and no rows.
    """

    visible: Array  # bool, broadcastable to [B, H, L, S]
    relative: Array | None = None  # float32, broadcastable too; [1, H, L, S] in training
    by_token: TokenBias | None = None  # the same for kernels that hold no [L, S]; None for single positions

    def __call__(self, logits_BHLS: Array) -> Array:
        """Add the bias to float32 logits."""
        if self.relative is not None:
            logits_BHLS = logits_BHLS + self.relative
        return jnp.where(self.visible, logits_BHLS, MASKED)

    def with_tables_of(self, owner: Any, length: int) -> Bias:
        """Add the relative bias of a stack or a layer that has a table."""
        table: RelativePositionBias = owner.relpos_bias
        by_token = self.by_token
        if by_token is not None:
            by_token = dataclasses.replace(by_token, by_distance_HX=table.by_distance(1 - length, length + 1))
        return self._replace(relative=table(length, length)[None], by_token=by_token)

    def mix(
        self, query_BHLK: Array, key_BHSK: Array, value_BHSK: Array, *, implementation: str = "xla"
    ) -> Array:
        """Return softmax(query @ key + bias) @ value, [B, H, L, K], by one of fast_attention.IMPLEMENTATIONS.

        Single positions (decoding) always take the reference, mix_values. What a query that sees no key gets
        differs. Raises ValueError for an implementation that cannot run here.
        """
        if self.by_token is None:
            return mix_values(query_BHLK, key_BHSK, value_BHSK, self)
        has_relative = self.relative is not None
        chosen = fast_attention.choose(implementation, query_BHLK, key_BHSK, has_relative_bias=has_relative)
        if chosen == "pallas":
            return fast_attention.pallas(query_BHLK, key_BHSK, value_BHSK, self.by_token)
        if chosen == "cudnn":
            return fast_attention.cudnn(
                query_BHLK, key_BHSK, value_BHSK, visible=self.visible, relative=self.relative
            )
        return mix_values(query_BHLK, key_BHSK, value_BHSK, self._replace(by_token=None))


class Mixer(Protocol):
    """A bias that knows which queries meet which keys: Bias, or long_attention.BlockBias."""

    def with_tables_of(self, owner: Any, length: int) -> Mixer:
        """Add the relative biases of a stack or a layer that has tables."""
        ...

    def mix(self, query_BHLK: Array, key_BHSK: Array, value_BHSK: Array, /, *, implementation: str) -> Array:
        """Return the mixed values [B, H, L, K], by one of fast_attention.IMPLEMENTATIONS."""
        ...


def attention_bias(
    *,
    keys_BS: Array,
    query_segments_BL: Array | None = None,
    key_segments_BS: Array | None = None,
    causal: bool = False,
    prefix_BS: Array | None = None,
) -> Bias:
    """Return the bias of what attention_mask's arguments let queries see, without a relative one."""
    visible = attention_mask(
        keys_BS=keys_BS,
        query_segments_BL=query_segments_BL,
        key_segments_BS=key_segments_BS,
        causal=causal,
        prefix_BS=prefix_BS,
    )
    queries_BL, keys = None, jnp.int32(0)
    if query_segments_BL is not None and key_segments_BS is not None:
        queries_BL, keys = 2 * query_segments_BL, 2 * key_segments_BS
    if prefix_BS is not None:
        prefix_BS = (prefix_BS != 0).astype(jnp.int32)
        queries_BL = prefix_BS if queries_BL is None else queries_BL + prefix_BS
        keys = keys + prefix_BS
    codes_BS = jnp.where(keys_BS != 0, keys, PADDING)
    return Bias(visible, by_token=TokenBias(codes_BS, queries_BL, causal=causal))


@jax.custom_vjp
def mix_values(query_BHLK: Array, key_BHSK: Array, value_BHSK: Array, bias: Bias) -> Array:
    """Return softmax(query @ key + bias) @ value, [B, H, L, K]; the softmax is computed in float32.

    The backward pass keeps one array of [B, H, L, S], where differentiating a softmax would keep four.
    """
    return _mix_forward(query_BHLK, key_BHSK, value_BHSK, bias)[0]


def _mix_forward(query_BHLK: Array, key_BHSK: Array, value_BHSK: Array, bias: Bias) -> tuple[Array, tuple]:
    logits_BHLS = bias(_logits(query_BHLK, key_BHSK))
    powers_BHLS = jnp.exp(logits_BHLS - logits_BHLS.max(-1, keepdims=True))
    scale_BHL1 = 1.0 / powers_BHLS.sum(-1, keepdims=True)
    powers_BHLS = powers_BHLS.astype(query_BHLK.dtype)
    mixed_BHLK = (powers_BHLS @ value_BHSK).astype(jnp.float32) * scale_BHL1  # fewer entries than the weights
    mixed_BHLK = mixed_BHLK.astype(query_BHLK.dtype)
    return mixed_BHLK, (query_BHLK, key_BHSK, value_BHSK, bias, powers_BHLS, scale_BHL1, mixed_BHLK)


def _mix_backward(residuals: tuple, cotangent_BHLK: Array) -> tuple[Array, Array, Array, Bias]:
    """Pull back as FlashAttention does (Dao et al. 2022, appendix B.2)."""
    query_BHLK, key_BHSK, value_BHSK, bias, powers_BHLS, scale_BHL1, mixed_BHLK = residuals
    dtype = query_BHLK.dtype
    cotangent_BHLK = cotangent_BHLK.astype(jnp.float32) * scale_BHL1
    mean_BHL1 = (cotangent_BHLK * mixed_BHLK).sum(-1, keepdims=True)
    cotangent_BHLK = cotangent_BHLK.astype(dtype)
    of_logits_BHLS = powers_BHLS * (_logits(cotangent_BHLK, value_BHSK) - mean_BHL1)
    of_relative = None if bias.relative is None else _sum_to(of_logits_BHLS, bias.relative.shape)
    of_logits_BHLS = of_logits_BHLS.astype(dtype)
    # Products that give [K, S] rather than [S, K] take half the time on a CPU.
    of_value_BHKS = jnp.einsum("bhlk,bhls->bhks", cotangent_BHLK, powers_BHLS)
    of_key_BHKS = jnp.einsum("bhlk,bhls->bhks", query_BHLK, of_logits_BHLS)
    of_query_BHLK = of_logits_BHLS @ key_BHSK
    no_mask: Array = None  # type: ignore[assignment]  # a mask has no gradient
    return (
        of_query_BHLK,
        jnp.swapaxes(of_key_BHKS, -1, -2),
        jnp.swapaxes(of_value_BHKS, -1, -2),
        Bias(no_mask, of_relative),
    )


mix_values.defvjp(_mix_forward, _mix_backward)


def _sum_to(x_BHLS: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the dims that were broadcast from `shape`."""
    if shape[0] == 1 != x_BHLS.shape[0]:
        # As a product: on CPUs XLA sums over a first dim forty times slower.
        x_BHLS = jnp.einsum("b,bhls->hls", jnp.ones(x_BHLS.shape[0], x_BHLS.dtype), x_BHLS)[None]
    return x_BHLS.sum([i for i in range(1, 4) if shape[i] != x_BHLS.shape[i]], keepdims=True)


class Attention(nnx.Module):
    """Multi-head attention without biases and without 1/sqrt(K), which the query's initialiser holds.

    With fewer num_kv_heads, a group of neighbouring heads shares its keys and values (Ainslie et al. 2023).
    """

    def __init__(
        self,
        emb_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        dropout_rate: float,
        implementation: str = "auto",
        key: Array,
    ) -> None:
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        kv_heads = num_kv_heads or num_heads
        self.query = Linear(fan_in_normal(query_key, (emb_dim, num_heads * head_dim), scale=1.0 / head_dim))
        self.key = Linear(fan_in_normal(key_key, (emb_dim, kv_heads * head_dim)))
        self.value = Linear(fan_in_normal(value_key, (emb_dim, kv_heads * head_dim)))
        self.out = Linear(fan_in_normal(out_key, (num_heads * head_dim, emb_dim)))
        self.head_dim = head_dim
        self.group = num_heads // kv_heads  # heads that share keys and values
        self.dropout_rate = dropout_rate
        self.implementation = implementation

    def split_heads(self, x_BLZ: Array) -> Array:
        """Turn [B, L, H*K] into [B, H, L, K]."""
        return jnp.swapaxes(x_BLZ.reshape(*x_BLZ.shape[:-1], -1, self.head_dim), -3, -2)

    def for_every_head(self, x_BHSK: Array) -> Array:
        """Repeat keys or values for the heads that share them."""
        return x_BHSK if self.group == 1 else jnp.repeat(x_BHSK, self.group, axis=1)

    def keys_values(self, source_BSD: Array, context: Context) -> tuple[Array, Array]:
        """Project a source to keys and values [B, H, S, K], of the heads that have their own."""
        key_BHSK = self.split_heads(self.key(source_BSD, context))
        value_BHSK = self.split_heads(self.value(source_BSD, context))
        key_BHSK = sharding.constrain(key_BHSK, "attention/key")
        return key_BHSK, sharding.constrain(value_BHSK, "attention/value")

    def project_out(self, mixed_BHLK: Array, context: Context) -> Array:
        """Join the heads [B, H, L, K] and project them to [B, L, D]."""
        mixed_BLHK = jnp.swapaxes(mixed_BHLK, -3, -2)
        return self.out(mixed_BLHK.reshape(*mixed_BLHK.shape[:-2], -1), context)

    def attend(self, x_BLD: Array, keys_values: tuple[Array, Array], bias: Mixer, context: Context) -> Array:
        """Attend from x to keys and values [B, H, S, K] and project back to [B, L, D]."""
        key_BHSK, value_BHSK = map(self.for_every_head, keys_values)
        query_BHLK = sharding.constrain(self.split_heads(self.query(x_BLD, context)), "attention/query")
        # One mask for all queries, so that dropping weights is dropping values.
        value_BHSK = dropout(value_BHSK, self.dropout_rate, context=context, site=20, broadcast_dim=-1)
        mixed_BHLK = bias.mix(query_BHLK, key_BHSK, value_BHSK, implementation=self.implementation)
        return self.project_out(mixed_BHLK, context)

    def __call__(
        self, x_BLD: Array, source_BSD: Array, bias: Mixer, context: Context, source_context: Context
    ) -> Array:
        """Attend from x [B, L, D] to source [B, S, D]; the contexts describe the tokens of each."""
        return self.attend(x_BLD, self.keys_values(source_BSD, source_context), bias, context)

    def decode(
        self,
        x_B1D: Array,
        cache: tuple[Array, Array],
        bias: Bias,
        *,
        step: Array,
        context: Context,
        prefix: tuple[tuple[Array, Array], Bias] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Attend from one new position to itself and the cached ones; returns also the grown cache.

        The cache holds keys and values [B * num_beams, H, S, K] of the steps so far. A prefix is (keys and
        values [B, H, P, K], bias): more positions to attend to, which beams share.
        """
        new = self.keys_values(x_B1D, context)
        key_BHSK, value_BHSK = (
            jax.lax.dynamic_update_slice_in_dim(old, entry, step, axis=2)
            for old, entry in zip(cache, new, strict=True)
        )
        cache = (key_BHSK, value_BHSK)
        if prefix is None:
            return self.attend(x_B1D, cache, bias, context), cache
        key_BHSK, value_BHSK = map(self.for_every_head, cache)
        prefix_key_BHPK, prefix_value_BHPK = map(self.for_every_head, prefix[0])
        prefix_bias = prefix[1]
        sources = prefix_key_BHPK.shape[0]
        query_BH1K = self.split_heads(self.query(x_B1D, context))
        prefix_logits = prefix_bias(_logits(_beams_to_queries(query_BH1K, sources), prefix_key_BHPK))
        prefix_logits = _queries_to_beams(prefix_logits)
        logits = jnp.concatenate([prefix_logits, bias(_logits(query_BH1K, key_BHSK))], -1)
        weights = jax.nn.softmax(logits, axis=-1).astype(x_B1D.dtype)
        prefix_weights, own_weights = jnp.split(weights, [prefix_logits.shape[-1]], axis=-1)
        prefix_mixed = _queries_to_beams(_beams_to_queries(prefix_weights, sources) @ prefix_value_BHPK)
        return self.project_out(prefix_mixed + own_weights @ value_BHSK, context), cache

    def decode_source(
        self, x_B1D: Array, keys_values: tuple[Array, Array], bias: Bias, context: Context
    ) -> Array:
        """Attend from one position of B * num_beams rows to the keys and values of B sources."""
        rows = keys_values[0].shape[0]
        x_BND = x_B1D.reshape(rows, -1, x_B1D.shape[-1])  # a source's beams become its queries
        return self.attend(x_BND, keys_values, bias, context).reshape(x_B1D.shape)


def _logits(query_BHLK: Array, key_BHSK: Array) -> Array:
    return jnp.einsum("bhlk,bhsk->bhls", query_BHLK, key_BHSK, preferred_element_type=jnp.float32)


def _beams_to_queries(x: Array, sources: int) -> Array:
    """Turn one query of B * num_beams rows [B * num_beams, H, 1, ...] into num_beams queries [B, H, N, ...]."""
    _, num_heads, _, width = x.shape
    return jnp.swapaxes(x.reshape(sources, -1, num_heads, width), 1, 2)


def _queries_to_beams(x: Array) -> Array:
    sources, num_heads, num_beams, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(sources * num_beams, num_heads, 1, width)
