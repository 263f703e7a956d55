"""Multi-token prediction: n heads on one trunk, head i predicts the token i places ahead.

Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737, section 2:

    p_i(x_{t+i}) = softmax(U norm(f_i(z_t)))        f_i a layer, z_t the trunk's state, U and the norm shared
    L = -sum_t sum_i log p_i(x_{t+i})               over targets of t's own segment

Head 1 is the model's last layer: it alone decodes, so n = 1 is the model as it is. The others, `future_heads`,
run one after the other, each recomputed in the backward pass, so that one head's logits exist at a time. Their
cross-entropies are auxiliary losses, `future_loss/i`, a mean over the global batch's target tokens each: they
belong to no task, and get neither z-loss nor label smoothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import losses, tree
from mtjax.models import functional
from mtjax.models.blocks import empty_cache, take_rows
from mtjax.types import Array, Aux, Context, Whole

FIRST_HEAD, OTHER_HEADS = "first_head", "future_heads"


class Heads(nnx.Module):
    """Holds the layers of heads 2 to n."""


class Future(NamedTuple):
    """What heads 2 to n learn from a batch; [n - 1, B, L] each."""

    targets: Array  # int32
    weights: Array  # float32, 0 where there is no such target
    num_tokens: Array  # float32 scalar, target tokens of the global batch
    logits_of: Callable[[Array], Array]  # hidden [B, L, D] -> float32 logits [B, L, V]


def check(config: Any, *, num_layers: int) -> None:
    """Raise ValueError where no trunk is left below the heads, and where layers are sparse."""
    count = config.num_predicted_tokens
    if count > 1 and num_layers < 2:
        raise ValueError(
            f"num_predicted_tokens={count} needs a trunk of at least 1 layer below the heads, the decoder has "
            f"{num_layers} in all; give it 2 or more."
        )
    if count > 1 and config.moe is not None and config.moe.router("decoder") is not None:
        raise ValueError(f"num_predicted_tokens={count} needs a dense decoder; take its experts away.")


def trunk_layers(num_predicted_tokens: int, num_layers: int) -> int:
    """Count the layers below the heads; the first head counts among num_layers."""
    return num_layers - (num_predicted_tokens > 1)


def add_heads(owner: nnx.Module, make_layer: Callable[[Array], Any], *, config: Any, key: Array) -> None:
    """Give a decoder its heads, where it predicts more than one token."""
    if config.num_predicted_tokens == 1:
        return
    setattr(owner, FIRST_HEAD, make_layer(jax.random.fold_in(key, 0)))
    others = Heads()
    functional.add_layers(
        others,
        make_layer,
        key=jax.random.fold_in(key, 1),
        num_layers=config.num_predicted_tokens - 1,
        scan=config.scan_layers,
    )
    setattr(owner, OTHER_HEADS, others)


def of_batch(
    batch: Mapping[str, Array],
    logits_of: Callable[[Array], Array],
    *,
    num_predicted_tokens: int,
    whole: Whole | None,
) -> Future | None:
    """Return what heads 2 to n learn from a batch, None where there are none or the batch has no weights.

    Head i at position t predicts the target at t + i - 1, if both are weighted and of one segment.
    """
    if num_predicted_tokens == 1 or "decoder_loss_weights" not in batch:
        return None
    targets_BL, weights_BL = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    segments_BL = batch.get("decoder_segment_ids")
    targets, weights = [], []
    for ahead in range(1, num_predicted_tokens):
        weight_BL = weights_BL.astype(jnp.float32) * _ahead(weights_BL != 0, ahead)
        if segments_BL is not None:
            weight_BL = weight_BL * (_ahead(segments_BL, ahead) == segments_BL)
        targets.append(_ahead(targets_BL, ahead))
        weights.append(weight_BL)
    num_tokens = weights_BL.sum(dtype=jnp.float32) if whole is None else whole.num_tokens["targets"]
    return Future(jnp.stack(targets), jnp.stack(weights), num_tokens, logits_of)


def _ahead(x_BL: Array, distance: int) -> Array:
    """Shift rows to the left, 0 behind their end."""
    return jnp.pad(x_BL, ((0, 0), (0, distance)))[:, distance:]


def run_heads(
    owner: Any,
    call: Callable[[Any, Array, Context], tuple[Array, Aux]],
    trunk_BLD: Array,
    context: Context,
    *,
    future: Future | None,
) -> tuple[Array, Aux]:
    """Return head 1's states and every head's auxiliary losses; without heads, the trunk's states."""
    if (first := first_head(owner)) is None:
        return trunk_BLD, Aux({}, {})
    key = context.key
    at = lambda i: context if key is None else dataclasses.replace(context, key=jax.random.fold_in(key, i))  # noqa: E731
    hidden_BLD, aux = call(first, trunk_BLD, at(2000))
    if future is None:
        return hidden_BLD, aux

    @jax.checkpoint
    def head(layer: Any, i: Array, targets_BL: Array, weights_BL: Array) -> tuple[Array, Aux]:
        hidden_BLD, aux = call(layer, trunk_BLD, at(2001 + i))
        logits_BLV = future.logits_of(owner.decoder_norm(hidden_BLD))
        loss_BL, _ = losses.token_losses(logits_BLV, targets_BL)
        return (loss_BL * weights_BL).sum() / jnp.maximum(future.num_tokens, 1.0), aux

    num_heads = len(future.targets)
    # A loop, so that no two heads are alive at a time.
    loss_N, of_layers = jax.lax.scan(
        lambda carry, xs: (carry, head(*xs)),
        None,
        (_stacked(getattr(owner, OTHER_HEADS), num_heads), jnp.arange(num_heads), *future[:2]),
    )[1]
    aux = functional.add_aux(aux, jax.tree.map(lambda x: x.sum(0), of_layers))
    named = {f"future_loss/{i + 2}": loss_N[i] for i in range(num_heads)}
    return hidden_BLD, functional.add_aux(aux, Aux(named, {}))


def first_head(owner: Any) -> Any | None:
    """Return head 1, where it is a layer of its own."""
    return getattr(owner, FIRST_HEAD, None)


def empty_head_cache(config: Any, rows: int, max_length: int) -> Any:
    """Make zero keys and values for head 1."""
    unscanned = dataclasses.replace(config, scan_layers=False)
    return empty_cache(unscanned, rows, max_length, num_layers=1)[0]


def decode_head(
    owner: Any, call: Callable[..., tuple[Array, dict[str, Any]]], x_B1D: Array, cache: Mapping[str, Any]
) -> tuple[Array, dict[str, Any]]:
    """Run head 1 for one position, call(layer, x, its cache); returns what changes in the decoder's cache."""
    if (head := first_head(owner)) is None:
        return x_B1D, {}
    x_B1D, of_head = call(head, x_B1D, cache["head"])
    return x_B1D, {"head": of_head}


def reorder(cache: Mapping[str, Any], rows_B: Array, config: Any) -> dict[str, Any]:
    """Pick rows of a decoder's own keys and values, head 1's too. What beams share stays in place."""
    changed: dict[str, Any] = {"own": take_rows(cache["own"], rows_B, config)}
    if "head" in cache:
        own = jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0), cache["head"]["own"])
        changed["head"] = cache["head"] | {"own": own}
    return dict(cache) | changed


def _stacked(heads: Any, num_heads: int) -> Any:
    if hasattr(heads, tree.STACK):
        return getattr(heads, tree.STACK)
    layers = [getattr(heads, f"{tree.STACK}_{i}") for i in range(num_heads)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
