"""Cross-entropy with z-loss and label smoothing, as sums over target tokens: per task and in total.

Sums travel and means are taken once, on the host. Shapes: B rows, L target length, D width, V vocabulary,
T tasks, N = B * L tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What a token's loss is, and what the sum is divided by."""

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    normalizing_factor: float | str | None = None  # None or 'tokens': the global token count; 1.0: T5X's sum
    logits_chunk: int | None = None  # target positions whose logits exist at a time; None: all

    def __post_init__(self) -> None:
        factor = self.normalizing_factor
        if isinstance(factor, str) and factor != "tokens":
            raise ValueError(f"normalizing_factor must be None, 'tokens' or a number > 0, got {factor!r}.")
        if isinstance(factor, int | float) and not factor > 0:
            raise ValueError(f"normalizing_factor must be None, 'tokens' or a number > 0, got {factor!r}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}.")
        if not self.z_loss >= 0.0:
            raise ValueError(f"z_loss must be >= 0, got {self.z_loss!r}.")
        if self.logits_chunk is not None and self.logits_chunk < 1:
            raise ValueError(f"logits_chunk must be None or >= 1, got {self.logits_chunk!r}.")


class TaskSums(NamedTuple):
    """Float32 sums over target tokens: [T] per task, or scalars in total. `loss` includes `z_loss`."""

    loss_T: Array
    z_loss_T: Array
    correct_T: Array
    tokens_T: Array


def token_losses(
    logits_BLV: Array, targets_BL: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Return (loss including z-loss, z-loss), both [B, L], of float32 logits.

    z-loss is z_loss * logsumexp(logits)^2 (Mesh TensorFlow). With label smoothing the target has probability
    1 - s and every other entry s / (V - 1), and the entropy of that distribution is subtracted, so that the
    least possible loss is 0 (T5X).
    """
    return _token_losses(logits_BLV, targets_BL, z_loss, label_smoothing)


def _smoothing(label_smoothing: float, vocab_size: int) -> tuple[float, float, float]:
    """Return (probability of the target, of every other entry, minus the entropy)."""
    confidence = 1.0 - label_smoothing
    low = label_smoothing / (vocab_size - 1)
    constant = -(confidence * math.log(confidence) + (vocab_size - 1) * low * math.log(low + 1e-20))
    return confidence, low, constant


def _forward(
    logits_BLV: Array, targets_BL: Array, z_loss: float, label_smoothing: float
) -> tuple[tuple[Array, Array], Array]:
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    if label_smoothing == 0.0:
        loss_BL = log_z_BL - target_BL
    else:
        vocab_size = logits_BLV.shape[-1]
        confidence, low, constant = _smoothing(label_smoothing, vocab_size)
        # -sum(p * log_softmax) = log_z - low * sum(logits) - (confidence - low) * target logit
        loss_BL = log_z_BL - low * logits_BLV.sum(-1) - (confidence - low) * target_BL - constant
    z_loss_BL = z_loss * jnp.square(log_z_BL)
    return (loss_BL + z_loss_BL, z_loss_BL), log_z_BL


def _token_losses_forward(logits_BLV, targets_BL, z_loss, label_smoothing):
    losses, log_z_BL = _forward(logits_BLV, targets_BL, z_loss, label_smoothing)
    return losses, (logits_BLV, targets_BL, log_z_BL)


def _token_losses_backward(z_loss, label_smoothing, residuals, cotangents):
    logits_BLV, targets_BL, log_z_BL = residuals
    loss_BL, z_loss_BL = cotangents
    vocab_size = logits_BLV.shape[-1]
    probability_BLV = jnp.exp(logits_BLV - log_z_BL[..., None])
    of_softmax_BL = loss_BL + 2.0 * z_loss * log_z_BL * (loss_BL + z_loss_BL)
    is_target_BLV = jnp.arange(vocab_size) == targets_BL[..., None]
    if label_smoothing == 0.0:
        wanted_BLV = jnp.where(is_target_BLV, loss_BL[..., None], 0.0)
    else:
        confidence, low, _ = _smoothing(label_smoothing, vocab_size)
        wanted_BLV = loss_BL[..., None] * jnp.where(is_target_BLV, confidence, low)
    return probability_BLV * of_softmax_BL[..., None] - wanted_BLV, None


_token_losses = jax.custom_vjp(
    lambda logits_BLV, targets_BL, z_loss, label_smoothing: _forward(
        logits_BLV, targets_BL, z_loss, label_smoothing
    )[0],
    nondiff_argnums=(2, 3),
)
_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _is_largest(logits_BLV: Array, targets_BL: Array) -> Array:
    """Tell where the target's logit is larger than every other one; a tie is wrong.

    A count, because argmax takes four times as long on a CPU.
    """
    target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)
    return (logits_BLV >= target_BL1).sum(-1) == 1


def task_sums(
    logits_of: Callable[[Array], Array],
    hidden_BLD: Array,
    batch: Batch,
    *,
    num_tasks: int,
    config: LossConfig,
) -> tuple[TaskSums, TaskSums]:
    """Return the sums per task [T] and the sums over all weighted tokens (scalars).

    Tokens count by decoder_loss_weights, to the task of decoder_task_ids; id -1 counts only in the totals.
    logits_of maps hidden states [B, L, D] to float32 logits.
    """
    weights_BL = batch["decoder_loss_weights"].astype(jnp.float32)
    targets_BL = batch["decoder_target_tokens"]

    def values(hidden_BLD: Array, targets_BL: Array) -> tuple[Array, Array, Array]:
        logits_BLV = logits_of(hidden_BLD)
        losses = token_losses(
            logits_BLV, targets_BL, z_loss=config.z_loss, label_smoothing=config.label_smoothing
        )
        return *losses, _is_largest(jax.lax.stop_gradient(logits_BLV), targets_BL).astype(jnp.float32)

    per_token = _chunked(values, hidden_BLD, targets_BL, chunk=config.logits_chunk)
    columns = jnp.stack([*per_token, jnp.ones_like(weights_BL)]) * weights_BL
    totals = columns.sum((1, 2))
    by_task = columns.reshape(4, -1) @ _membership(batch, weights_BL.shape, num_tasks=num_tasks)
    return TaskSums(*by_task), TaskSums(*totals)


def _membership(batch: Batch, shape: tuple[int, ...], *, num_tasks: int) -> Array:
    """Return [N, T], 1 where a token belongs to a task. Batches without task ids belong to task 0."""
    task_ids_BL = batch.get("decoder_task_ids")
    task_ids_N = jnp.zeros(shape, jnp.int32).ravel() if task_ids_BL is None else task_ids_BL.ravel()
    return (task_ids_N[:, None] == jnp.arange(num_tasks)).astype(jnp.float32)


def _chunked(
    function: Callable[..., tuple[Array, ...]], *arrays_BL: Array, chunk: int | None
) -> tuple[Array, ...]:
    """Map function over chunks of dim 1, recomputed in the backward pass; the last chunk may be shorter."""
    length = arrays_BL[0].shape[1]
    if chunk is None or chunk >= length:
        return function(*arrays_BL)
    num_chunks = length // chunk
    whole = [array[:, : num_chunks * chunk] for array in arrays_BL]
    split = [jnp.moveaxis(a.reshape(a.shape[0], num_chunks, chunk, *a.shape[2:]), 1, 0) for a in whole]
    step = jax.checkpoint(function, prevent_cse=False)
    _, parts = jax.lax.scan(lambda carry, xs: (carry, step(*xs)), None, split)
    values = [jnp.moveaxis(part, 0, 1).reshape(part.shape[1], -1) for part in parts]
    if num_chunks * chunk < length:
        rest = jax.checkpoint(function)(*[array[:, num_chunks * chunk :] for array in arrays_BL])
        values = [jnp.concatenate(pair, axis=1) for pair in zip(values, rest, strict=True)]
    return tuple(values)


def non_padding(batch: Batch, side: str) -> Array:
    """Return which tokens of one side ('encoder' or 'decoder') of a batch are not padding, bool [B, L]."""
    return batch["encoder_input_tokens" if side == "encoder" else "decoder_target_tokens"] > 0


def token_counts(batch: Batch, *, num_tasks: int) -> tuple[Array, Array]:
    """Return target tokens per task [T] and in total, from data alone."""
    weights_BL = batch["decoder_loss_weights"].astype(jnp.float32)
    membership_NT = _membership(batch, weights_BL.shape, num_tasks=num_tasks)
    return weights_BL.ravel() @ membership_NT, weights_BL.sum()


def sequence_logprobs(logits_BLV: Array, targets_BL: Array, weights_BL: Array) -> Array:
    """Return each row's sum of target log-probabilities [B]."""
    loss_BL, _ = token_losses(logits_BLV, targets_BL)
    return -(loss_BL * weights_BL).sum(-1)
