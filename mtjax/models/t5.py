"""T5 1.0 and 1.1: the encoder-decoder of Raffel et al. 2020 and Shazeer 2020, with T5X's parameters.

All positions are relative and packed segments are contiguous, so `*_positions` change nothing here; they
travel in the context for layers that read them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import sharding, tree
from mtjax.models import functional, future
from mtjax.models.attention import Bias, Mixer, attention_bias, attention_mask
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
from mtjax.models.long_attention import BlockBias, block_bias
from mtjax.models.moe import MoeConfig
from mtjax.types import Array, Aux, Context, Features, Model, Whole

ENCODER_ATTENTION = ("full", "local", "transient_global")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The architecture. T5 1.0: mlp_activations=('relu',), logits_via_embedding=True."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"  # of activations; parameters are float32
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    decoder_kv_heads: int | None = None  # grouped queries (arXiv:2305.13245); None: each head its own keys
    relative_bias_per_layer: bool = False  # UMT5: each layer has its own table (Chung et al. 2023)
    encoder_attention: str = "full"  # or LongT5's 'local' and 'transient_global' (arXiv:2112.07916)
    local_radius: int = 127  # of local attention: tokens seen to either side
    global_block_size: int = 16  # of transient global attention: tokens summed into one
    num_predicted_tokens: int = 1  # heads for the tokens 1, ..., n places ahead (arXiv:2404.19737)
    decoder_of_task: tuple[int, ...] = ()  # by task id; more than one decoder where they differ
    scan_layers: bool = False
    attention: str = "auto"  # or 'xla', 'cudnn' (GPU), 'pallas' (TPU): models/fast_attention.py
    remat_policy: str = "none"
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        check_config(self)
        if self.encoder_attention not in ENCODER_ATTENTION:
            raise tree.unknown_name("encoder_attention", str(self.encoder_attention), ENCODER_ATTENTION)
        if self.encoder_attention != "full" and self.attention not in ("auto", "xla"):
            raise ValueError(
                f"attention={self.attention!r} has no encoder_attention={self.encoder_attention!r}; use 'auto', "
                "which takes the reference there and a fast one in the decoder where it can, or 'xla'."
            )
        future.check(self, num_layers=self.num_decoder_layers)
        if set(self.decoder_of_task) != set(range(self.num_decoders)) and self.decoder_of_task:
            raise ValueError(
                f"decoder_of_task={self.decoder_of_task} must name, by task id, every decoder from 0 to "
                f"{self.num_decoders - 1}."
            )

    @property
    def num_layers_by_side(self) -> tuple[tuple[str, int], ...]:
        """Return the layers of the encoder and the decoder."""
        return (("encoder", self.num_encoder_layers), ("decoder", self.num_decoder_layers))

    @property
    def num_decoders(self) -> int:
        """Count the decoders over the encoder."""
        return 1 + max(self.decoder_of_task, default=0)


def t5(config: T5Config) -> Model:
    """Return the encoder-decoder as pure functions of its parameters."""
    return functional.functional(
        lambda key: T5(config, key), config=config, flops=functools.partial(flops, config)
    )


def flops(config: T5Config, batch_size: int, *, lengths: Mapping[str, int]) -> float:
    """Count a training step's operations: all forward matrix products (2 a multiply-add), times 3.

    lengths are those of 'inputs' and 'targets'. Attention counts whole squares or blocks, as computed.
    """
    S, L = lengths["inputs"], lengths["targets"]
    kv_heads = config.decoder_kv_heads or config.num_heads
    cross = 2 * (L * config.num_heads + S * kv_heads) * config.emb_dim * config.head_dim
    own = block_products(config, num_kv_heads=kv_heads) + attention_products(config, L)
    decoder = L * (own + attention_products(config, S)) + cross
    logits = L * config.emb_dim * config.vocab_size
    heads = config.num_predicted_tokens
    decoding = (config.num_decoder_layers + heads - 1) * decoder + heads * logits
    decoding += sparse_products(config, "decoder", L)
    encoding = config.num_encoder_layers * encoder_products(config, S) + sparse_products(config, "encoder", S)
    total = encoding + config.num_decoders * decoding
    return float(3 * 2 * batch_size * total)


def encoder_products(config: T5Config, length: int) -> int:
    """Count the multiply-adds of an encoder layer and a row."""
    keys, products = length, length * block_products(config)
    if config.encoder_attention != "full":
        keys = 3 * (config.local_radius + 1)
    if config.encoder_attention == "transient_global":
        num_globals = length // config.global_block_size
        keys += num_globals
        products += num_globals * (length + 2 * config.num_heads * config.head_dim) * config.emb_dim
    return products + length * attention_products(config, keys)


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: T5Config, key: Array, make_mlp: MakeMlp | None = None) -> None:
        attention_key, mlp_key = jax.random.split(key)
        if config.relative_bias_per_layer:
            add_encoder_tables(self, config, jax.random.fold_in(key, 1))
        self.pre_attention_layer_norm = RMSNorm(config.emb_dim)
        if config.encoder_attention == "transient_global":
            self.global_input_layer_norm = RMSNorm(config.emb_dim)
        self.attention = attention_block(config, attention_key)
        self.pre_mlp_layer_norm = RMSNorm(config.emb_dim)
        self.mlp = make_mlp(mlp_key) if make_mlp else mlp_block(config, mlp_key)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x_BLD: Array, bias: Mixer, context: Context) -> tuple[Array, Aux]:
        """Return the layer's output and its auxiliary losses."""
        drop = residual_dropout(self.dropout_rate, context)
        y_BLD = self.pre_attention_layer_norm(x_BLD)
        bias = with_bias_of(self, bias, x_BLD.shape[1])
        source = (y_BLD, context)
        if isinstance(bias, BlockBias) and bias.globals is not None:
            source = bias.globals.add(y_BLD, self.global_input_layer_norm, context)
        x_BLD = x_BLD + drop(self.attention(y_BLD, source[0], bias, context, source[1]), 0)
        y_BLD, aux = self.mlp(self.pre_mlp_layer_norm(x_BLD), context)
        return x_BLD + drop(y_BLD, 1), aux


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the encoder, and feed-forward."""

    def __init__(self, config: T5Config, key: Array, make_mlp: MakeMlp | None = None) -> None:
        self_key, cross_key, mlp_key = jax.random.split(key, 3)
        if config.relative_bias_per_layer:
            self.relpos_bias = relative_bias(config, bidirectional=False, key=jax.random.fold_in(key, 1))
        self.pre_self_attention_layer_norm = RMSNorm(config.emb_dim)
        self.self_attention = attention_block(config, self_key, num_kv_heads=config.decoder_kv_heads)
        self.pre_cross_attention_layer_norm = RMSNorm(config.emb_dim)
        self.encoder_decoder_attention = attention_block(
            config, cross_key, num_kv_heads=config.decoder_kv_heads
        )
        self.pre_mlp_layer_norm = RMSNorm(config.emb_dim)
        self.mlp = make_mlp(mlp_key) if make_mlp else mlp_block(config, mlp_key)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x_BLD: Array,
        encoded_BSD: Array,
        biases: tuple[Bias, Bias],
        contexts: tuple[Context, Context],
    ) -> tuple[Array, Aux]:
        """Return the layer's output and its auxiliary losses; biases and contexts: own, encoder's."""
        context, source_context = contexts
        drop = residual_dropout(self.dropout_rate, context)
        y_BLD = self.pre_self_attention_layer_norm(x_BLD)
        bias = with_bias_of(self, biases[0], x_BLD.shape[1])
        x_BLD = x_BLD + drop(self.self_attention(y_BLD, y_BLD, bias, context, context), 0)
        y_BLD = self.pre_cross_attention_layer_norm(x_BLD)
        y_BLD = self.encoder_decoder_attention(
            y_BLD, encoded_BSD, biases[1], _other_site(context, 1), source_context
        )
        x_BLD = x_BLD + drop(y_BLD, 1)
        y_BLD, aux = self.mlp(self.pre_mlp_layer_norm(x_BLD), context)
        return x_BLD + drop(y_BLD, 2), aux

    def decode(
        self,
        x_B1D: Array,
        cache: dict[str, Any],
        biases: tuple[Bias, Bias],
        *,
        step: Array,
        context: Context,
    ) -> tuple[Array, dict[str, Any]]:
        """Run one position; the cache holds own keys and values, and the source's."""
        y_B1D = self.pre_self_attention_layer_norm(x_B1D)
        bias = with_step_bias_of(self, biases[0], step)
        y_B1D, own = self.self_attention.decode(y_B1D, cache["own"], bias, step=step, context=context)
        x_B1D = x_B1D + y_B1D
        y_B1D = self.pre_cross_attention_layer_norm(x_B1D)
        y_B1D = self.encoder_decoder_attention.decode_source(y_B1D, cache["source"], biases[1], context)
        x_B1D = x_B1D + y_B1D
        x_B1D = x_B1D + self.mlp(self.pre_mlp_layer_norm(x_B1D), context)[0]
        return x_B1D, cache | {"own": own}


def _other_site(context: Context, site: int) -> Context:
    """Give a second block of the same kind in a layer its own dropout key."""
    if context.key is None:
        return context
    return dataclasses.replace(context, key=jax.random.fold_in(context.key, 100 + site))


def add_encoder_tables(owner: nnx.Module, config: T5Config, key: Array) -> None:
    """Give a stack or a layer of the encoder its tables of relative biases."""
    tables = {"relpos_bias": key}
    if config.encoder_attention == "transient_global":
        tables["global_relpos_bias"] = jax.random.fold_in(key, 1)
    for name, table_key in tables.items():
        setattr(owner, name, relative_bias(config, bidirectional=True, key=table_key))


def encoder_bias(config: T5Config, keys_BS: Array, context: Context) -> Mixer:
    """Return what the encoder's tokens see of each other, as its kind of attention has it."""
    if config.encoder_attention == "full":
        segments_BS = context.segment_ids
        return attention_bias(keys_BS=keys_BS, query_segments_BL=segments_BS, key_segments_BS=segments_BS)
    has_globals = config.encoder_attention == "transient_global"
    return block_bias(
        keys_BS,
        context.segment_ids,
        radius=config.local_radius,
        global_block_size=config.global_block_size if has_globals else None,
    )


class Encoder(nnx.Module):
    """The encoder's layers, their table of relative position biases where they share one, its last norm."""

    def __init__(self, config: T5Config, key: Array) -> None:
        bias_key, layers_key = jax.random.split(key)
        if not config.relative_bias_per_layer:
            add_encoder_tables(self, config, bias_key)
        functional.add_layers(
            self,
            lambda layer_key: EncoderLayer(config, layer_key),
            key=layers_key,
            num_layers=config.num_encoder_layers,
            scan=config.scan_layers,
            nth=every_nth(config, "encoder", functools.partial(EncoderLayer, config)),
        )
        self.encoder_norm = RMSNorm(config.emb_dim)
        self.config = config

    def __call__(self, x_BSD: Array, keys_BS: Array, context: Context) -> tuple[Array, Aux]:
        """Encode embeddings, of which keys_BS are not padding; returns also the auxiliary losses."""
        config, length = self.config, x_BSD.shape[1]
        bias = with_bias_of(self, encoder_bias(config, keys_BS, context), length)
        x_BSD = dropout(x_BSD, config.dropout_rate, context=context, site=1000, broadcast_dim=-2)
        x_BSD, aux = functional.run_layers(
            self,
            lambda layer, x, layer_context: layer(x, bias, layer_context),
            x_BSD,
            context,
            num_layers=config.num_encoder_layers,
            remat_policy=config.remat_policy,
        )
        x_BSD = self.encoder_norm(x_BSD)
        return dropout(x_BSD, config.dropout_rate, context=context, site=1001, broadcast_dim=None), aux


class Decoder(nnx.Module):
    """The decoder's layers, their table of relative position biases where they share one, norm, untied logits."""

    def __init__(self, config: T5Config, key: Array) -> None:
        bias_key, layers_key, logits_key = jax.random.split(key, 3)
        if not config.relative_bias_per_layer:
            self.relpos_bias = relative_bias(config, bidirectional=False, key=bias_key)
        make_layer = lambda layer_key: DecoderLayer(config, layer_key)  # noqa: E731
        self.num_layers = future.trunk_layers(config.num_predicted_tokens, config.num_decoder_layers)
        functional.add_layers(
            self,
            make_layer,
            key=layers_key,
            num_layers=self.num_layers,
            scan=config.scan_layers,
            nth=every_nth(config, "decoder", functools.partial(DecoderLayer, config)),
        )
        future.add_heads(self, make_layer, config=config, key=layers_key)
        self.decoder_norm = RMSNorm(config.emb_dim)
        if not config.logits_via_embedding:
            self.logits_dense = Linear(fan_in_truncated(logits_key, (config.emb_dim, config.vocab_size)))
        self.config = config

    def __call__(
        self,
        x_BLD: Array,
        encoded_BSD: Array,
        biases: tuple[Bias, Bias],
        contexts: tuple[Context, Context],
        ahead: future.Future | None,
    ) -> tuple[Array, Aux]:
        """Decode embeddings of whole targets; biases and contexts: own, encoder's."""
        config, length = self.config, x_BLD.shape[1]
        context, source_context = contexts
        with_tables = (with_bias_of(self, biases[0], length), biases[1])
        x_BLD = dropout(x_BLD, config.dropout_rate, context=context, site=1000, broadcast_dim=-2)
        call = lambda layer, x, own_context: layer(  # noqa: E731
            x, encoded_BSD, with_tables, (own_context, source_context)
        )
        x_BLD, aux = functional.run_layers(
            self, call, x_BLD, context, num_layers=self.num_layers, remat_policy=config.remat_policy
        )
        x_BLD, of_heads = future.run_heads(self, call, x_BLD, context, future=ahead)
        x_BLD = dropout(
            self.decoder_norm(x_BLD), config.dropout_rate, context=context, site=1001, broadcast_dim=-2
        )
        return x_BLD, functional.add_aux(aux, of_heads)

    def start(self, encoded_BSD: Array, context: Context, *, rows: int, max_length: int) -> dict[str, Any]:
        """Make a cache of `rows` rows; the encoder's keys and values are made once."""
        keys_values = lambda layer: layer.encoder_decoder_attention.keys_values(encoded_BSD, context)  # noqa: E731
        cache = {
            "own": empty_cache(self.config, rows, max_length, num_layers=self.num_layers),
            "source": functional.map_layers(self, keys_values, num_layers=self.num_layers),
        }
        if (head := future.first_head(self)) is not None:
            own = future.empty_head_cache(self.config, rows, max_length)
            cache["head"] = {"own": own, "source": keys_values(head)}
        return cache

    def decode(
        self, x_B1D: Array, cache: dict[str, Any], mask_BS: Array, *, step: Array, context: Context
    ) -> tuple[Array, dict[str, Any]]:
        """Run one position; returns the last hidden state, normalised, and the grown cache."""
        visible = Bias(jnp.arange(jax.tree.leaves(cache["own"])[0].shape[-2]) <= step)
        biases = (with_step_bias_of(self, visible, step), Bias(attention_mask(keys_BS=mask_BS)))
        call = lambda layer, x, layer_cache: layer.decode(  # noqa: E731
            x, layer_cache, biases, step=step, context=context
        )
        of_layers = {name: cache[name] for name in ("own", "source")}
        x_B1D, of_layers = functional.decode_layers(self, call, x_B1D, of_layers, num_layers=self.num_layers)
        x_B1D, of_head = future.decode_head(self, call, x_B1D, cache)
        return self.decoder_norm(x_B1D), cache | of_layers | of_head


def decoder_names(config: T5Config) -> list[str]:
    """Name the parameters of each decoder; the first is T5's own."""
    return ["decoder", *(f"decoder_{i}" for i in range(1, config.num_decoders))]


class T5(nnx.Module):
    """The encoder-decoder; see functional.functional for what its methods become."""

    def __init__(self, config: T5Config, key: Array) -> None:
        embed_key, encoder_key, decoder_key = jax.random.split(key, 3)
        self.token_embedder = Embed(config.vocab_size, config.emb_dim, key=embed_key)
        self.encoder = Encoder(config, encoder_key)
        for i, name in enumerate(decoder_names(config)):
            own_key = decoder_key if i == 0 else jax.random.fold_in(decoder_key, i)
            setattr(self, name, Decoder(config, own_key))
        self.config = config

    @property
    def decoders(self) -> list[Decoder]:
        """Return the decoders in the order of their numbers."""
        return [getattr(self, name) for name in decoder_names(self.config)]

    def features(self, batch: Mapping[str, Array], key: Array | None, whole: Whole | None = None) -> Features:
        """Return the decoder's last hidden states for a batch of whole targets."""
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        source_context = batch_context(batch, "encoder", key=encoder_key, whole=whole)
        context = batch_context(batch, "decoder", key=decoder_key, whole=whole)
        source_BSD, x_BLD = self.token_embedder.pair(
            batch["encoder_input_tokens"], batch["decoder_input_tokens"], self.config.dtype
        )
        encoded_BSD, encoder_aux = self._encode(source_BSD, batch, source_context)
        biases = (
            attention_bias(
                keys_BS=batch["decoder_target_tokens"] > 0,
                query_segments_BL=context.segment_ids,
                key_segments_BS=context.segment_ids,
                causal=True,
            ),
            attention_bias(
                keys_BS=batch["encoder_input_tokens"] > 0,
                query_segments_BL=context.segment_ids,
                key_segments_BS=source_context.segment_ids,
            ),
        )
        ahead = functools.partial(
            future.of_batch, num_predicted_tokens=self.config.num_predicted_tokens, whole=whole
        )
        parts, aux = [], encoder_aux
        self._check_tasks(whole)
        for i, decoder in enumerate(self.decoders):
            is_own_BL = self._is_own(i, context.task_ids)
            learnt = ahead(_only(is_own_BL, batch), functools.partial(self.own_logits, i))
            contexts = (_only_of(is_own_BL, context), source_context)
            hidden_BLD, decoder_aux = decoder(x_BLD, encoded_BSD, biases, contexts, learnt)
            aux = functional.add_aux(aux, decoder_aux)
            parts.append(hidden_BLD if is_own_BL is None else jnp.where(is_own_BL[..., None], hidden_BLD, 0))
        return Features(parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1), *aux)

    def _check_tasks(self, whole: Whole | None) -> None:
        told = len(self.config.decoder_of_task)
        if whole is not None and told and whole.num_tasks != told:
            raise ValueError(
                f"decoder_of_task names the decoders of {told} tasks, the run has {whole.num_tasks}; name one "
                "for each task, in the order of the mixture."
            )

    def logits(self, hidden_BLD: Array) -> Array:
        """Return float32 logits; tied ones are divided by sqrt(D)."""
        # The states of several decoders lie side by side, 0 where a token is another's.
        parts = jnp.split(hidden_BLD, self.config.num_decoders, axis=-1)
        if self.config.logits_via_embedding:
            return self.own_logits(0, functools.reduce(jnp.add, parts))
        return functools.reduce(jnp.add, [self.own_logits(i, part) for i, part in enumerate(parts)])

    def own_logits(self, i: int, hidden_BLD: Array) -> Array:
        """Return the logits of one decoder's states."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(hidden_BLD)
        logits_BLV = self.decoders[i].logits_dense(hidden_BLD.astype(jnp.float32), Context())
        return sharding.constrain(logits_BLV, "logits")

    def _is_own(self, i: int, task_ids: Array | None) -> Array | None:
        """Tell which tokens are decoder i's, None where there is one decoder.

        Decoder 0 also takes padding and tasks never seen, id -1.
        """
        table = self.config.decoder_of_task
        if self.config.num_decoders == 1:
            return None
        if task_ids is None:
            raise ValueError("Several decoders need the batch's task ids, which say whose each token is.")
        is_known = (task_ids >= 0) & (task_ids < len(table))
        return jnp.where(is_known, jnp.array(table)[jnp.clip(task_ids, 0, len(table) - 1)], 0) == i

    def _encode(self, x_BSD: Array, batch: Mapping[str, Array], context: Context) -> tuple[Array, Aux]:
        return self.encoder(x_BSD, batch["encoder_input_tokens"] > 0, context)

    def encode(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Encode unpacked inputs for decoding: `encoded`, the token mask, and each row's task id if given."""
        context = batch_context(batch, "encoder", key=None)
        tokens_BS = batch["encoder_input_tokens"]
        x_BSD = self.token_embedder(tokens_BS, self.config.dtype)
        encoding = {"encoded": self._encode(x_BSD, batch, context)[0], "mask": tokens_BS > 0}
        if context.task_ids is not None:
            encoding["task_ids"] = context.task_ids.max(axis=1, keepdims=True)  # padding has -1
        return encoding

    def start(self, encoding: Mapping[str, Array], max_length: int, num_beams: int) -> dict[str, Any]:
        """Make a cache of B * num_beams rows; the encoder's keys and values stay B rows, made once."""
        rows = encoding["encoded"].shape[0] * num_beams
        context = Context(task_ids=encoding.get("task_ids"))
        cache = {
            "step": jnp.int32(0),
            "first_B": jnp.zeros(rows, jnp.int32),
            "decoders": [
                decoder.start(encoding["encoded"], context, rows=rows, max_length=max_length)
                for decoder in self.decoders
            ],
            "mask": encoding["mask"],
        }
        return cache | {name: encoding[name] for name in ("task_ids",) if name in encoding}

    def decode(self, cache: dict[str, Any], tokens_B: Array) -> tuple[Array, dict[str, Any]]:
        """Run one position of every row; returns float32 logits [B, V] and the grown cache."""
        step = cache["step"]
        context = cache_context(cache, tokens_B, num_beams=tokens_B.shape[0] // cache["mask"].shape[0])
        x_B1D = self.token_embedder(tokens_B[:, None], self.config.dtype)
        parts, caches = [], []
        for i, (decoder, own) in enumerate(zip(self.decoders, cache["decoders"], strict=True)):
            hidden_B1D, own = decoder.decode(x_B1D, own, cache["mask"], step=step, context=context)
            is_own_B1 = self._is_own(i, context.task_ids)
            parts.append(hidden_B1D if is_own_B1 is None else jnp.where(is_own_B1[..., None], hidden_B1D, 0))
            caches.append(own)
        logits_B1V = self.logits(jnp.concatenate(parts, -1))
        return logits_B1V[:, 0], cache | {"step": step + 1, "decoders": caches}

    def reorder(self, cache: dict[str, Any], rows_B: Array) -> dict[str, Any]:
        """Pick rows of a cache. Beams of one source share its keys and values, which stay in place."""
        caches = [future.reorder(own, rows_B, self.config) for own in cache["decoders"]]
        return cache | {"decoders": caches}


def _only(is_own_BL: Array | None, batch: Mapping[str, Array]) -> Mapping[str, Array]:
    """Leave the weights of a decoder's own tokens."""
    if is_own_BL is None or "decoder_loss_weights" not in batch:
        return batch
    return {**batch, "decoder_loss_weights": batch["decoder_loss_weights"] * is_own_BL}


def _only_of(is_own_BL: Array | None, context: Context) -> Context:
    """Take the others' tokens for padding, so that no expert counts them."""
    if is_own_BL is None:
        return context
    mask_BL = is_own_BL if context.mask is None else context.mask & is_own_BL
    return dataclasses.replace(context, mask=mask_BL)
