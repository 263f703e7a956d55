"""A decoder-only T5: causal or prefix language model, with T5X's parameters (t5x.examples.decoder_only).

Positions marked in decoder_causal_attention (the inputs and one more, since tokens are shifted right) see
each other in both directions; the relative bias stays one-directional. As in models/t5.py positions are
relative, so decoder_positions change nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import sharding
from mtjax.models import functional, future
from mtjax.models.attention import Bias, attention_bias
from mtjax.models.blocks import (
    MakeMlp,
    attention_block,
    attention_products,
    batch_context,
    block_products,
    cache_context,
    check_config,
    empty_cache,
    every_nth,
    mlp_block,
    relative_bias,
    residual_dropout,
    sparse_products,
    with_bias_of,
    with_step_bias_of,
)
from mtjax.models.layers import Embed, Linear, RMSNorm, dropout, fan_in_truncated
from mtjax.models.moe import MoeConfig
from mtjax.types import Array, Aux, Context, Features, Model, Whole


@dataclasses.dataclass(frozen=True)
class DecoderOnlyConfig:
    """The architecture. Without inputs_bidirectional_attention, inputs are attended to causally too."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    inputs_bidirectional_attention: bool = True
    dtype: str = "float32"  # of activations; parameters are float32
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    decoder_kv_heads: int | None = None  # grouped queries (arXiv:2305.13245); None: each head its own keys
    num_predicted_tokens: int = 1  # heads for the tokens 1, ..., n places ahead (arXiv:2404.19737)
    scan_layers: bool = False
    attention: str = "auto"  # or 'xla', 'cudnn' (GPU), 'pallas' (TPU): models/fast_attention.py
    remat_policy: str = "none"
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        check_config(self)
        future.check(self, num_layers=self.num_layers)

    @property
    def num_layers_by_side(self) -> tuple[tuple[str, int], ...]:
        """Return the layers of the decoder."""
        return (("decoder", self.num_layers),)


def decoder_only(config: DecoderOnlyConfig) -> Model:
    """Return the language model as pure functions of its parameters."""
    return functional.functional(
        lambda key: DecoderOnly(config, key), config=config, flops=functools.partial(flops, config)
    )


def flops(config: DecoderOnlyConfig, batch_size: int, *, lengths: Mapping[str, int]) -> float:
    """Count a training step's operations: all forward matrix products (2 a multiply-add), times 3.

    lengths are those of 'inputs' (if any) and 'targets', which share a row. Attention counts whole squares.
    """
    L = lengths.get("inputs", 0) + lengths["targets"]
    layer = block_products(config, num_kv_heads=config.decoder_kv_heads) + attention_products(config, L)
    heads = config.num_predicted_tokens
    dense = L * ((config.num_layers + heads - 1) * layer + heads * config.emb_dim * config.vocab_size)
    return float(3 * 2 * batch_size * (dense + sparse_products(config, "decoder", L)))


class DecoderOnlyLayer(nnx.Module):
    """Self-attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: DecoderOnlyConfig, key: Array, make_mlp: MakeMlp | None = None) -> None:
        attention_key, mlp_key = jax.random.split(key)
        self.pre_self_attention_layer_norm = RMSNorm(config.emb_dim)
        self.self_attention = attention_block(config, attention_key, num_kv_heads=config.decoder_kv_heads)
        self.pre_mlp_layer_norm = RMSNorm(config.emb_dim)
        self.mlp = make_mlp(mlp_key) if make_mlp else mlp_block(config, mlp_key)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x_BLD: Array, bias: Bias, context: Context) -> tuple[Array, Aux]:
        """Return the layer's output and its auxiliary losses."""
        drop = residual_dropout(self.dropout_rate, context)
        y_BLD = self.pre_self_attention_layer_norm(x_BLD)
        x_BLD = x_BLD + drop(self.self_attention(y_BLD, y_BLD, bias, context, context), 0)
        y_BLD, aux = self.mlp(self.pre_mlp_layer_norm(x_BLD), context)
        return x_BLD + drop(y_BLD, 1), aux

    def prefill(self, x_BPD: Array, bias: Bias, context: Context) -> tuple[Array, dict[str, Any]]:
        """Run a whole prefix; returns also its keys and values."""
        y_BPD = self.pre_self_attention_layer_norm(x_BPD)
        prefix = self.self_attention.keys_values(y_BPD, context)
        x_BPD = x_BPD + self.self_attention.attend(y_BPD, prefix, bias, context)
        return x_BPD + self.mlp(self.pre_mlp_layer_norm(x_BPD), context)[0], {"prefix": prefix}

    def decode(
        self,
        x_B1D: Array,
        cache: dict[str, Any],
        biases: tuple[Bias, Bias],
        *,
        step: Array,
        context: Context,
    ) -> tuple[Array, dict[str, Any]]:
        """Run one position; the cache holds keys and values of the steps so far, and of the prefix."""
        y_B1D = self.pre_self_attention_layer_norm(x_B1D)
        prefix = (cache["prefix"], biases[1])
        y_B1D, own = self.self_attention.decode(
            y_B1D, cache["own"], biases[0], step=step, context=context, prefix=prefix
        )
        x_B1D = x_B1D + y_B1D
        x_B1D = x_B1D + self.mlp(self.pre_mlp_layer_norm(x_B1D), context)[0]
        return x_B1D, cache | {"own": own}


class Decoder(nnx.Module):
    """Embeddings, layers, their table of relative position biases, the last norm and untied logits."""

    def __init__(self, config: DecoderOnlyConfig, key: Array) -> None:
        embed_key, bias_key, layers_key, logits_key = jax.random.split(key, 4)
        self.token_embedder = Embed(config.vocab_size, config.emb_dim, key=embed_key)
        self.relpos_bias = relative_bias(config, bidirectional=False, key=bias_key)
        make_layer = lambda layer_key: DecoderOnlyLayer(config, layer_key)  # noqa: E731
        self.num_layers = future.trunk_layers(config.num_predicted_tokens, config.num_layers)
        functional.add_layers(
            self,
            make_layer,
            key=layers_key,
            num_layers=self.num_layers,
            scan=config.scan_layers,
            nth=every_nth(config, "decoder", functools.partial(DecoderOnlyLayer, config)),
        )
        future.add_heads(self, make_layer, config=config, key=layers_key)
        self.decoder_norm = RMSNorm(config.emb_dim)
        if not config.logits_via_embedding:
            self.logits_dense = Linear(fan_in_truncated(logits_key, (config.emb_dim, config.vocab_size)))


class DecoderOnly(nnx.Module):
    """The language model; see functional.functional for what its methods become."""

    def __init__(self, config: DecoderOnlyConfig, key: Array) -> None:
        self.decoder = Decoder(config, key)
        self.config = config

    def features(self, batch: Mapping[str, Array], key: Array | None, whole: Whole | None = None) -> Features:
        """Return the last hidden states for a batch of whole sequences."""
        config, decoder = self.config, self.decoder
        context = batch_context(batch, "decoder", key=key, whole=whole)
        bidirectional = config.inputs_bidirectional_attention
        bias = attention_bias(
            keys_BS=batch["decoder_target_tokens"] > 0,
            query_segments_BL=context.segment_ids,
            key_segments_BS=context.segment_ids,
            causal=True,
            prefix_BS=batch.get("decoder_causal_attention") if bidirectional else None,
        )
        bias = with_bias_of(decoder, bias, batch["decoder_input_tokens"].shape[1])
        x_BLD = decoder.token_embedder(batch["decoder_input_tokens"], config.dtype)
        x_BLD = dropout(x_BLD, config.dropout_rate, context=context, site=1000, broadcast_dim=-2)
        call = lambda layer, x, layer_context: layer(x, bias, layer_context)  # noqa: E731
        x_BLD, aux = functional.run_layers(
            decoder, call, x_BLD, context, num_layers=decoder.num_layers, remat_policy=config.remat_policy
        )
        ahead = future.of_batch(
            batch, self.logits, num_predicted_tokens=config.num_predicted_tokens, whole=whole
        )
        x_BLD, of_heads = future.run_heads(decoder, call, x_BLD, context, future=ahead)
        aux = functional.add_aux(aux, of_heads)
        x_BLD = decoder.decoder_norm(x_BLD)
        x_BLD = dropout(x_BLD, config.dropout_rate, context=context, site=1001, broadcast_dim=-2)
        return Features(x_BLD, *aux)

    def logits(self, hidden_BLD: Array) -> Array:
        """Return float32 logits; tied ones are divided by sqrt(D)."""
        if self.config.logits_via_embedding:
            return self.decoder.token_embedder.attend(hidden_BLD)
        logits_BLV = self.decoder.logits_dense(hidden_BLD.astype(jnp.float32), Context())
        return sharding.constrain(logits_BLV, "logits")

    def encode(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Run the prefix, marked in decoder_causal_attention, of unpacked rows; keep its keys and values.

        The last marked position is left to be decoded: its token is `first_B`, its index `length_B`.
        """
        if "decoder_causal_attention" not in batch:
            raise ValueError(
                "Decoding needs decoder_causal_attention in the batch: 1 at the inputs and at the position "
                "after them, 0 elsewhere."
            )
        decoder, tokens_BP = self.decoder, batch["decoder_input_tokens"]
        prefix_BP = batch["decoder_causal_attention"] != 0
        context = batch_context(batch, "decoder", key=None, mask_BL=prefix_BP)
        bias = attention_bias(
            keys_BS=prefix_BP,
            causal=True,
            prefix_BS=prefix_BP if self.config.inputs_bidirectional_attention else None,
        )
        bias = with_bias_of(decoder, bias, tokens_BP.shape[1])
        x_BPD, layers = functional.decode_layers(
            decoder,
            lambda layer, x, _: layer.prefill(x, bias, context),
            decoder.token_embedder(jnp.where(prefix_BP, tokens_BP, 0), self.config.dtype),
            {},
            num_layers=decoder.num_layers,
        )
        if (head := future.first_head(decoder)) is not None:
            layers["head"] = head.prefill(x_BPD, bias, context)[1]
        length_B = jnp.maximum(prefix_BP.sum(-1, dtype=jnp.int32) - 1, 0)
        first_B = jnp.take_along_axis(tokens_BP, length_B[:, None], axis=1)[:, 0]
        encoding = layers | {"length_B": length_B, "first_B": first_B}
        if context.task_ids is not None:
            encoding["task_ids"] = context.task_ids.max(axis=1, keepdims=True)  # padding has -1
        return encoding

    def start(self, encoding: Mapping[str, Any], max_length: int, num_beams: int) -> dict[str, Any]:
        """Make a cache of B * num_beams rows; the prefix's keys and values stay B rows."""
        first_B = jnp.repeat(encoding["first_B"], num_beams)
        rows = first_B.shape[0]
        own = empty_cache(self.config, rows, max_length, num_layers=self.decoder.num_layers)
        cache = dict(encoding) | {"first_B": first_B, "step": jnp.int32(0), "own": own}
        if "head" in encoding:
            of_head = {"own": future.empty_head_cache(self.config, rows, max_length)}
            cache["head"] = encoding["head"] | of_head
        return cache

    def decode(self, cache: dict[str, Any], tokens_B: Array) -> tuple[Array, dict[str, Any]]:
        """Run one position of every row; returns float32 logits [B, V] and the grown cache."""
        decoder, step, length_B = self.decoder, cache["step"], cache["length_B"]
        context = cache_context(cache, tokens_B, num_beams=tokens_B.shape[0] // length_B.shape[0])
        prefix_length = jax.tree.leaves(cache["prefix"])[0].shape[-2]
        max_length = jax.tree.leaves(cache["own"])[0].shape[-2]
        # The prefix [B, H, 1, P]: a query at length + step sees keys before `length`.
        values_HZ = decoder.relpos_bias.by_distance(-prefix_length - max_length, 1)
        keys_P = jnp.arange(prefix_length)
        distance_BP = keys_P - length_B[:, None] - step
        bias_HBP = values_HZ[:, jnp.clip(distance_BP + prefix_length + max_length, 0)]
        visible_BP = keys_P < length_B[:, None]
        biases = (
            with_step_bias_of(decoder, Bias(jnp.arange(max_length) <= step), step),
            Bias(visible_BP[:, None, None], jnp.moveaxis(bias_HBP, 0, 1)[:, :, None]),
        )
        call = lambda layer, x, layer_cache: layer.decode(  # noqa: E731
            x, layer_cache, biases, step=step, context=context
        )
        x_B1D = decoder.token_embedder(tokens_B[:, None], self.config.dtype)
        of_layers = {name: cache[name] for name in ("own", "prefix")}
        x_B1D, of_layers = functional.decode_layers(
            decoder, call, x_B1D, of_layers, num_layers=decoder.num_layers
        )
        x_B1D, of_head = future.decode_head(decoder, call, x_B1D, cache)
        logits_B1V = self.logits(decoder.decoder_norm(x_B1D))
        return logits_B1V[:, 0], cache | {"step": step + 1, "own": of_layers["own"]} | of_head

    def reorder(self, cache: dict[str, Any], rows_B: Array) -> dict[str, Any]:
        """Pick rows of a cache. Beams of one source share its prefix, which stays in place."""
        return future.reorder(cache, rows_B, self.config)
