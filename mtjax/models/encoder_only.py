"""An encoder with a pooled embedding and one classification head a task, as MUPPET pre-finetunes.

Aghajanyan et al. 2021, https://arxiv.org/abs/2101.11038. The embedding is the mean of an example's encoded
tokens (Ni et al. 2022, https://arxiv.org/abs/2108.08877, section 3.1), in packed rows of its segment's; task t's
head maps it to num_classes[t] logits. A target is one class, counted from 0: the data's `encoder_only`
architecture makes it of a task's options. Losses per task, balancing and evaluation are those of any model.

A task never seen, id -1, has no head: all classes are equally likely.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models import functional, t5
from mtjax.models.attention import MASKED
from mtjax.models.blocks import batch_context, check_config
from mtjax.models.layers import Embed, dropout, fan_in_truncated
from mtjax.types import Array, Features, Model, Whole


@dataclasses.dataclass(frozen=True)
class EncoderOnlyConfig:
    """The architecture: T5's encoder. num_classes: of each task, in the order of the mixture."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int
    num_classes: tuple[int, ...]
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    dtype: str = "float32"  # of activations; parameters are float32
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_bias_per_layer: bool = False
    encoder_attention: str = "full"  # or LongT5's 'local' and 'transient_global'
    local_radius: int = 127
    global_block_size: int = 16
    scan_layers: bool = False
    remat_policy: str = "none"

    def __post_init__(self) -> None:
        check_config(self.as_t5())
        if not self.num_classes or min(self.num_classes) < 2:
            raise ValueError(
                f"num_classes={self.num_classes} must give each task, in the mixture's order, 2 classes or more."
            )

    def as_t5(self) -> t5.T5Config:
        """Return the T5 that has this encoder."""
        shared = {field.name for field in dataclasses.fields(t5.T5Config)}
        values = {name: value for name, value in vars(self).items() if name in shared}
        return t5.T5Config(**values, num_encoder_layers=self.num_layers, num_decoder_layers=1)


def encoder_only(config: EncoderOnlyConfig) -> Model:
    """Return the classifier as pure functions of its parameters; its logits are over classes."""
    return functional.functional(
        lambda key: EncoderOnly(config, key), config=config, flops=functools.partial(flops, config)
    )


def flops(config: EncoderOnlyConfig, batch_size: int, *, lengths: Mapping[str, int]) -> float:
    """Count a training step's operations: all forward matrix products (2 a multiply-add), times 3."""
    S, L = lengths["inputs"], lengths["targets"]
    pooled = L * config.emb_dim * (S + max(config.num_classes))
    encoder = config.num_layers * t5.encoder_products(config.as_t5(), S)
    return float(3 * 2 * batch_size * (encoder + pooled))


class EncoderOnly(nnx.Module):
    """The classifier; see functional.functional for what its methods become."""

    def __init__(self, config: EncoderOnlyConfig, key: Array) -> None:
        embed_key, encoder_key, heads_key = jax.random.split(key, 3)
        self.token_embedder = Embed(config.vocab_size, config.emb_dim, key=embed_key)
        self.encoder = t5.Encoder(config.as_t5(), encoder_key)
        num_tasks, num_classes = len(config.num_classes), max(config.num_classes)
        kernel = fan_in_truncated(heads_key, (config.emb_dim, num_tasks * num_classes))
        kernel_TDC = jnp.moveaxis(kernel.reshape(-1, num_tasks, num_classes), 0, 1)
        self.task_heads = TaskHeads(kernel_TDC)
        self.config = config

    def features(self, batch: Mapping[str, Array], key: Array | None, whole: Whole | None = None) -> Features:
        """Return the logits of each target's class in place of hidden states, float32 [B, L, C]."""
        config = self.config
        if whole is not None and whole.num_tasks != len(config.num_classes):
            raise ValueError(
                f"num_classes has heads for {len(config.num_classes)} tasks, the run has {whole.num_tasks}."
            )
        context = batch_context(batch, "encoder", key=key, whole=whole)
        x_BSD = self.token_embedder(batch["encoder_input_tokens"], config.dtype)
        encoded_BSD, aux = self.encoder(x_BSD, batch["encoder_input_tokens"] > 0, context)
        pooled_BLD = _pool(encoded_BSD, batch, batch["decoder_target_tokens"].shape[1])
        pooled_BLD = dropout(pooled_BLD, config.dropout_rate, context=context, site=1002, broadcast_dim=None)
        task_ids_BL = batch.get("decoder_task_ids")
        if task_ids_BL is None:
            raise ValueError("Heads per task need the batch's decoder_task_ids.")
        return Features(self.task_heads(pooled_BLD, task_ids_BL, config.num_classes), *aux)

    def logits(self, hidden_BLC: Array) -> Array:
        """Return what features gives: the logits of classes."""
        return hidden_BLC

    def encode(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Return the pooled embeddings `pooled` [B, D] of unpacked rows."""
        context = batch_context(batch, "encoder", key=None)
        x_BSD = self.token_embedder(batch["encoder_input_tokens"], self.config.dtype)
        encoded_BSD, _ = self.encoder(x_BSD, batch["encoder_input_tokens"] > 0, context)
        return {"pooled": _pool(encoded_BSD, batch, 1)[:, 0]}

    def start(self, encoding: Mapping[str, Array], max_length: int, num_beams: int) -> Any:
        """Raise ValueError: a classifier decodes nothing."""
        raise ValueError("An encoder-only model decodes no text; score or rank classes instead.")

    def decode(self, cache: Any, tokens_B: Array) -> Any:
        """Raise ValueError: a classifier decodes nothing."""
        return self.start(cache, 0, 1)

    def reorder(self, cache: Any, rows_B: Array) -> Any:
        """Raise ValueError: a classifier decodes nothing."""
        return self.start(cache, 0, 1)


class TaskHeads(nnx.Module):
    """One linear map a task from the pooled embedding to its classes."""

    def __init__(self, kernel_TDC: Array) -> None:
        self.task_kernel = nnx.Param(kernel_TDC)  # its rows move by the tasks' names

    def __call__(self, x_BLD: Array, task_ids_BL: Array, num_classes: Sequence[int]) -> Array:
        """Return float32 logits [B, L, C]: masked beyond a task's classes, all 0 for a task without a head."""
        kernel_TDC = self.task_kernel[...]
        each_BLTC = jnp.einsum("bld,tdc->bltc", x_BLD.astype(jnp.float32), kernel_TDC)
        is_class_TC = jnp.arange(kernel_TDC.shape[-1]) < jnp.array(num_classes)[:, None]
        each_BLTC = jnp.where(is_class_TC, each_BLTC, MASKED)
        is_task_BLT = task_ids_BL[..., None] == jnp.arange(len(num_classes))
        return jnp.where(is_task_BLT[..., None], each_BLTC, 0.0).sum(2)


def _pool(encoded_BSD: Array, batch: Mapping[str, Array], length: int) -> Array:
    """Return the mean of the encoded tokens of each target's segment [B, L, D], or of the row; 0 of none."""
    keys_BS = batch["encoder_input_tokens"] > 0
    is_member_BLS = jnp.broadcast_to(keys_BS[:, None], (keys_BS.shape[0], length, keys_BS.shape[1]))
    if "decoder_segment_ids" in batch:
        is_member_BLS &= batch["decoder_segment_ids"][:, :, None] == batch["encoder_segment_ids"][:, None]
    counts_BL1 = jnp.maximum(is_member_BLS.sum(-1, keepdims=True), 1).astype(encoded_BSD.dtype)
    return is_member_BLS.astype(encoded_BSD.dtype) @ encoded_BSD / counts_BL1
