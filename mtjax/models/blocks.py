"""What both architectures are built from: checked configs, pre-norm blocks, contexts, caches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import losses, tree
from mtjax.models import fast_attention, functional
from mtjax.models.attention import Attention, Bias, Mixer, RelativePositionBias
from mtjax.models.layers import MlpBlock, dropout
from mtjax.models.moe import MoeConfig, SparseMlp, choices_per_token
from mtjax.models.routers import check_decoder
from mtjax.types import Array, Context, Whole

MakeMlp = Callable[[Array], nnx.Module]  # (key) -> the feed-forward block of a layer
DTYPES = ("float32", "bfloat16")


def check_config(config: Any) -> None:
    """Raise ValueError for sizes below 1, a dropout rate outside [0, 1) and unknown names."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{type(config).__name__}.{field.name} must be a positive int, got {value!r}.")
    if config.decoder_kv_heads is not None and (
        config.decoder_kv_heads < 1 or config.num_heads % config.decoder_kv_heads
    ):
        divisors = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ValueError(
            f"decoder_kv_heads={config.decoder_kv_heads} does not divide num_heads={config.num_heads}; use one of {divisors}."
        )
    if not 0.0 <= config.dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {config.dropout_rate!r}.")
    if config.dtype not in DTYPES:
        raise tree.unknown_name("dtype", str(config.dtype), DTYPES)
    if config.attention not in fast_attention.IMPLEMENTATIONS:
        raise tree.unknown_name("attention", str(config.attention), fast_attention.IMPLEMENTATIONS)
    if config.remat_policy not in functional.REMAT_POLICIES:
        raise tree.unknown_name("remat policy", config.remat_policy, list(functional.REMAT_POLICIES))
    if config.moe is not None:
        _check_moe(config)


def _check_moe(config: Any) -> None:
    sides = dict(config.num_layers_by_side)
    if "encoder" not in sides and config.moe.encoder_router is not None:
        raise ValueError("This model has no encoder: leave MoeConfig.encoder_router None.")
    for side, num_layers in sides.items():
        config.moe.check_layers(side, num_layers)
    if config.moe.decoder_router is not None:
        check_decoder(config.moe.decoder_router)


def attention_block(config: Any, key: Array, *, num_kv_heads: int | None = None) -> Attention:
    """Make an attention block of a config's sizes."""
    return Attention(
        config.emb_dim,
        config.num_heads,
        config.head_dim,
        num_kv_heads=num_kv_heads,
        dropout_rate=config.dropout_rate,
        implementation=config.attention,
        key=key,
    )


def mlp_block(config: Any, key: Array) -> MlpBlock:
    """Make a feed-forward block of a config's sizes."""
    return MlpBlock(
        config.emb_dim, config.mlp_dim, config.mlp_activations, dropout_rate=config.dropout_rate, key=key
    )


def sparse_mlp(config: Any, side: str, key: Array) -> SparseMlp:
    """Make a sparse feed-forward block of a config's sizes, for its 'encoder' or 'decoder'."""
    return SparseMlp(
        config.moe,
        side,
        emb_dim=config.emb_dim,
        mlp_dim=config.mlp_dim,
        activations=config.mlp_activations,
        dropout_rate=config.dropout_rate,
        num_sparse_layers=sum(config.moe.num_sparse(*layers) for layers in config.num_layers_by_side),
        key=key,
    )


def every_nth(
    config: Any, side: str, make_layer: Callable[[Array, Any], nnx.Module]
) -> tuple[int, Callable[[Array], nnx.Module]] | None:
    """Return add_layers' nth: the layers of a side with a sparse block, or None where there are none.

    make_layer(key, make_mlp) makes a layer.
    """
    if config.moe is None or config.moe.router(side) is None:
        return None
    sparse = functools.partial(sparse_mlp, config, side)
    return config.moe.every, lambda key: make_layer(key, sparse)


def block_products(config: Any, *, num_kv_heads: int | None = None) -> int:
    """Count a token's multiply-adds in one layer's self-attention projections and feed-forward."""
    heads = config.num_heads + (num_kv_heads or config.num_heads)
    attention = 2 * config.emb_dim * heads * config.head_dim
    return attention + mlp_products(config, config.mlp_dim)


def mlp_products(config: Any, mlp_dim: int) -> int:
    """Count a token's multiply-adds in a dense feed-forward block."""
    return config.emb_dim * mlp_dim * (len(config.mlp_activations) + 1)


def sparse_products(config: Any, side: str, num_tokens: int) -> float:
    """Count the multiply-adds that sparse blocks add to a side's dense layers, for a row of num_tokens.

    Experts count as often as tokens choose them, whatever their capacity; a router counts as one product.
    """
    if config.moe is None or config.moe.router(side) is None:
        return 0.0
    moe: MoeConfig = config.moe
    num_sparse = moe.num_sparse(side, dict(config.num_layers_by_side)[side])
    choices = choices_per_token(moe, side, emb_dim=config.emb_dim, num_tokens=num_tokens * moe.group_rows)
    experts = choices * mlp_products(config, moe.mlp_dim or config.mlp_dim)
    replaced = 0 if moe.extra_mlp else mlp_products(config, config.mlp_dim)
    return num_sparse * num_tokens * (experts - replaced + config.emb_dim * moe.num_experts)


def attention_products(config: Any, num_keys: int) -> int:
    """Count a query token's multiply-adds with num_keys keys and values."""
    return 2 * num_keys * config.num_heads * config.head_dim


def relative_bias(config: Any, *, bidirectional: bool, key: Array) -> RelativePositionBias:
    """Make a stack's table of relative position biases."""
    return RelativePositionBias(
        config.num_heads,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        bidirectional=bidirectional,
        key=key,
    )


def residual_dropout(rate: float, context: Context) -> Callable[[Array, int], Array]:
    """Return the dropout (x, site) of a block's output, one mask for all positions."""
    return lambda x_BLD, site: dropout(x_BLD, rate, context=context, site=site, broadcast_dim=-2)


def batch_context(
    batch: Mapping[str, Array],
    side: str,
    *,
    key: Array | None,
    whole: Whole | None = None,
    mask_BL: Array | None = None,
) -> Context:
    """Collect what layers get beside the activations of one side ('encoder' or 'decoder') of a batch.

    mask_BL says what is not padding, where the batch's tokens do not.
    """
    return Context(
        tokens=batch[f"{side}_input_tokens"],
        mask=losses.non_padding(batch, side) if mask_BL is None else mask_BL,
        num_tokens=None if whole is None else whole.num_tokens[side],
        num_tasks=0 if whole is None else whole.num_tasks,
        task_ids=batch.get(f"{side}_task_ids"),
        segment_ids=batch.get(f"{side}_segment_ids"),
        positions=batch.get(f"{side}_positions"),
        key=key,
        train=key is not None,
    )


def cache_context(cache: Mapping[str, Any], tokens_B: Array, *, num_beams: int) -> Context:
    """Build the context of one decoded position; a task id of each source holds for its beams."""
    task_ids = cache.get("task_ids")
    if task_ids is not None:
        task_ids = jnp.repeat(task_ids, num_beams, axis=0)
    return Context(task_ids=task_ids, tokens=tokens_B[:, None])


def empty_cache(config: Any, rows: int, max_length: int, *, num_layers: int) -> Any:
    """Make zero keys and values [B, H, S, K] for every layer: stacked where layers are scanned, else a list."""
    shape = (rows, config.decoder_kv_heads or config.num_heads, max_length, config.head_dim)
    if config.scan_layers:
        return tuple(jnp.zeros((num_layers, *shape), config.dtype) for _ in range(2))
    return [tuple(jnp.zeros(shape, config.dtype) for _ in range(2)) for _ in range(num_layers)]


def take_rows(cache: Any, rows_B: Array, config: Any) -> Any:
    """Pick rows of keys and values made by empty_cache."""
    dim = 1 if config.scan_layers else 0
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=dim), cache)


def with_bias_of(owner: Any, bias: Mixer, length: int) -> Mixer:
    """Add the relative bias of a stack or a layer that has a table of its own."""
    return bias.with_tables_of(owner, length) if hasattr(owner, "relpos_bias") else bias


def with_step_bias_of(owner: Any, bias: Bias, step: Array) -> Bias:
    """Add the relative bias of a causal query at position `step` to the cached positions of bias.visible."""
    table: RelativePositionBias | None = getattr(owner, "relpos_bias", None)
    if table is None:
        return bias
    length = bias.visible.shape[-1]
    values = table.by_distance(1 - length, length)  # [H, 2 S - 1], distance 0 at S - 1
    row_HS = jax.lax.dynamic_slice_in_dim(values, length - 1 - step, length, axis=1)
    return bias._replace(relative=row_HS[None, :, None])
