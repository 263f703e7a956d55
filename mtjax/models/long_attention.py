"""LongT5's encoder attention: to neighbours in blocks, and to sums of blocks as transient global tokens.

Guo et al. 2022, https://arxiv.org/abs/2112.07916, section 3. With radius r and blocks of W = r + 1 tokens a
query sees the keys at distances -r, ..., r, which lie in its own block and in the two beside it. Transient
global tokens, G of them, are the normalised sums of every `global_block_size` tokens of a segment; a
segment's last tokens that fill no block join its last one, and a segment shorter than a block has none.

Shapes beside the legend's: N blocks of W tokens, G global tokens, Z = S + G keys and values. Memory is
S * (3 W + G): no array has [S, S].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from mtjax.models.attention import Bias, mix_values
from mtjax.types import Array, Context


class Globals(NamedTuple):
    """The transient global tokens of a batch."""

    slots_BS: Array  # int32, the global token that a token is summed into, -1 for none
    last_BG: Array  # int32, the last token of each global token's block
    visible_BSG: Array  # bool, those of a query's own segment

    @property
    def distance_BSG(self) -> Array:
        """Return how many blocks each global token lies after the query's own, int32."""
        return jnp.arange(self.last_BG.shape[1]) - self.slots_BS[:, :, None]

    def add(
        self, x_BSD: Array, normalise: Callable[[Array], Array], context: Context
    ) -> tuple[Array, Context]:
        """Append the normalised sums of the blocks [B, G, D] to x; the context gets their task ids too."""
        is_member_BSG = self.slots_BS[:, :, None] == jnp.arange(self.last_BG.shape[1])
        sums_BGD = jnp.einsum("bsg,bsd->bgd", is_member_BSG.astype(x_BSD.dtype), x_BSD)
        if context.task_ids is not None:
            ids_BG = jnp.take_along_axis(context.task_ids, self.last_BG, axis=1)
            context = dataclasses.replace(context, task_ids=jnp.append(context.task_ids, ids_BG, axis=1))
        return jnp.concatenate([x_BSD, normalise(sums_BGD)], axis=1), context


def global_tokens(keys_BS: Array, segments_BS: Array, *, block_size: int) -> Globals:
    """Lay out one global token for each whole block of each segment's tokens, in the row's order."""
    length = keys_BS.shape[1]
    index_S = jnp.arange(length)
    is_first_BS = jnp.diff(segments_BS, axis=1, prepend=segments_BS[:, :1] - 1) != 0
    first_BS = jnp.maximum.accumulate(jnp.where(is_first_BS, index_S, 0), axis=1)
    position_BS = index_S - first_BS
    is_last_BS = (keys_BS != 0) & (position_BS % block_size == block_size - 1)
    before_BS = jnp.cumsum(is_last_BS, axis=1) - is_last_BS
    # A token's block is whole where the segment holds the token that would end it.
    end_BS = index_S + block_size - 1 - position_BS % block_size
    inside_BS = jnp.minimum(end_BS, length - 1)
    is_whole_BS = (
        (end_BS < length)
        & (jnp.take_along_axis(segments_BS, inside_BS, axis=1) == segments_BS)
        & jnp.take_along_axis(is_last_BS, inside_BS, axis=1)
    )
    has_earlier_BS = position_BS >= block_size
    slots_BS = jnp.where(is_whole_BS, before_BS, jnp.where(has_earlier_BS, before_BS - 1, -1))
    slots_BS = jnp.where(keys_BS != 0, slots_BS, -1).astype(jnp.int32)
    ends_BSG = is_last_BS[:, :, None] & (before_BS[:, :, None] == jnp.arange(length // block_size))
    last_BG = ends_BSG.argmax(1).astype(jnp.int32)
    segments_BG = jnp.take_along_axis(segments_BS, last_BG, axis=1)
    is_same_BSG = segments_BS[:, :, None] == segments_BG[:, None]
    return Globals(slots_BS, last_BG, is_same_BSG & ends_BSG.any(1)[:, None])


class BlockBias(NamedTuple):
    """What is added to the logits of queries in N blocks: as attention.Bias, of rows B * N."""

    visible: Array  # bool [B * N, 1, W, 3 W + G]
    globals: Globals | None = None
    relative: Array | None = None  # float32 [1 or B * N, H, W, 3 W + G]

    def with_tables_of(self, owner: Any, length: int) -> BlockBias:
        """Add the relative biases of a stack or a layer that has tables: of neighbours, and of globals."""
        del length
        rows, _, width, _ = self.visible.shape
        relative = owner.relpos_bias(width, 3 * width, first_key=-width)[None]
        if self.globals is None:
            return self._replace(relative=relative)
        num_globals = self.globals.last_BG.shape[1]
        values_HZ = owner.global_relpos_bias.by_distance(-num_globals, num_globals + 1)
        distance = _blocks(self.globals.distance_BSG, width).reshape(rows, width, num_globals)
        of_globals = jnp.swapaxes(values_HZ[:, distance + num_globals], 0, 1)
        relative = jnp.broadcast_to(relative, (rows, *relative.shape[1:]))
        return self._replace(relative=jnp.concatenate([relative, of_globals], axis=-1))

    def mix(
        self, query_BHSK: Array, key_BHZK: Array, value_BHZK: Array, *, implementation: str = "xla"
    ) -> Array:
        """Return the values mixed by softmax(query @ key + bias), [B, H, S, K]; only 'xla' has blocks."""
        assert implementation in ("auto", "xla"), implementation
        batch, heads, length, head_dim = query_BHSK.shape
        width = self.visible.shape[-2]
        query = jnp.moveaxis(_blocks(query_BHSK, width, dim=2), 1, 2)  # [B, N, H, W, K]
        query = query.reshape(-1, heads, width, head_dim)
        key, value = (self._neighbours_and_globals(x, length) for x in (key_BHZK, value_BHZK))
        mixed = mix_values(query, key, value, Bias(self.visible, self.relative))
        mixed = jnp.moveaxis(mixed.reshape(batch, -1, heads, width, head_dim), 1, 2)
        return mixed.reshape(batch, heads, -1, head_dim)[:, :, :length]

    def _neighbours_and_globals(self, x_BHZK: Array, length: int) -> Array:
        """Return what the queries of each block see, [B * N, H, 3 W + G, K]."""
        x_BHSK, x_BHGK = x_BHZK[:, :, :length], x_BHZK[:, :, length:]
        blocks = _neighbours(_blocks(x_BHSK, self.visible.shape[-2], dim=2), dim=2)
        of_globals = jnp.broadcast_to(x_BHGK[:, :, None], (*blocks.shape[:3], *x_BHGK.shape[2:]))
        both = jnp.moveaxis(jnp.concatenate([blocks, of_globals], axis=3), 2, 1)
        return both.reshape(-1, *both.shape[2:])


def block_bias(
    keys_BS: Array, segments_BS: Array | None, *, radius: int, global_block_size: int | None = None
) -> BlockBias:
    """Return what queries may see of their neighbours, and of global tokens where they have a block size.

    keys_BS are the tokens that are not padding; with segments, a query sees only its own.
    """
    width = radius + 1
    segments_BS = jnp.ones(keys_BS.shape, jnp.int32) if segments_BS is None else segments_BS
    keys = _neighbours(_blocks(keys_BS != 0, width))[:, :, None]
    segments = _blocks(segments_BS, width)
    is_same = segments[..., None] == _neighbours(segments)[:, :, None]
    distance = jnp.arange(3 * width) - width - jnp.arange(width)[:, None]
    visible = keys & is_same & (abs(distance) <= radius)  # [B, N, W, 3 W]
    tokens = None
    if global_block_size is not None and keys_BS.shape[1] >= global_block_size:
        tokens = global_tokens(keys_BS, segments_BS, block_size=global_block_size)
        visible = jnp.concatenate([visible, _blocks(tokens.visible_BSG, width)], axis=-1)
    return BlockBias(visible.reshape(-1, 1, *visible.shape[2:]), tokens)


def _blocks(x: Array, width: int, *, dim: int = 1) -> Array:
    """Cut a dim into blocks [..., N, W, ...], the last one padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[dim] = (0, -x.shape[dim] % width)
    return jnp.pad(x, padding).reshape(*x.shape[:dim], -1, width, *x.shape[dim + 1 :])


def _neighbours(blocks: Array, *, dim: int = 1) -> Array:
    """Join each block of [..., N, W, ...] with the ones before and after it: [..., N, 3 W, ...]."""
    padding = [(0, 0)] * blocks.ndim
    padding[dim] = (1, 1)
    padded = jnp.pad(blocks, padding)
    num_blocks = blocks.shape[dim]
    parts = [jnp.take(padded, jnp.arange(i, i + num_blocks), axis=dim) for i in range(3)]
    return jnp.concatenate(parts, axis=dim + 1)
