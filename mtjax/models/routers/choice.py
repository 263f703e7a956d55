"""What routers return, and the auxiliary losses they share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.types import Array


class TokenChoice(NamedTuple):
    """Every token chooses up to K of E experts.

    An entry whose expert is E, one past the last, takes no expert and no capacity: padding, or an expert that
    the token leaves out. Its weight is 0. A chosen expert may have weight 0 as well (straight-through).
    """

    experts_GNK: Array  # int32 in [0, E], best first
    weights_GNK: Array  # float32 combine weights
    priority_GN: Array | None  # higher is served first where capacity is short; None = by position
    probs_GNE: Array  # float32, the distribution over experts


class ExpertChoice(NamedTuple):
    """Every expert chooses C tokens of its group."""

    tokens_GEC: Array  # int32, the token that each slot takes
    weights_GEC: Array  # float32, 0 = an empty slot
    probs_GNE: Array


class Slots(NamedTuple):
    """Every expert sees C mixtures of its group's tokens."""

    dispatch_GNEC: Array  # float32, sums to 1 over N
    combine_GNEC: Array  # float32, sums to 1 over E and C
    probs_GNE: Array


Routing = tuple[TokenChoice | ExpertChoice | Slots, dict[str, Array]]


def check_decoder(router: Any) -> None:
    """Raise ValueError for a router with which tokens depend on later ones."""
    if not router.can_decode:
        why = " by priority" if getattr(router, "batch_prioritized", False) else ""
        raise ValueError(
            f"{type(router).__name__} routes a token{why} by tokens after it, so a decoder would see its targets. "
            "Use it in the encoder only, and Switch, TopK without priority, Hash or a task router as "
            "decoder_router, or None for a dense decoder."
        )


def several(weights_GNE: Array, taken_GNE: Array, probs_GNE: Array) -> TokenChoice:
    """Send every token to all the experts that are marked as taken, largest weight first."""
    num_experts = weights_GNE.shape[-1]
    weights_GNK, experts_GNK = jax.lax.top_k(weights_GNE, num_experts)
    taken_GNK = jnp.take_along_axis(taken_GNE, experts_GNK, axis=-1)
    return TokenChoice(
        jnp.where(taken_GNK, experts_GNK, num_experts),
        jnp.where(taken_GNK, weights_GNK, 0.0),
        None,
        probs_GNE,
    )


def group_mean(values_GN: Array, mask_GN: Array) -> Array:
    """Return the mean [G] over each group's tokens; 0 for a group of padding only."""
    total_G = jnp.where(mask_GN, values_GN, 0.0).sum(-1)
    return total_G / jnp.maximum(mask_GN.sum(-1), 1)


def balance_loss(probs_GNE: Array, experts_GNK: Array, mask_GN: Array) -> Array:
    """Return E * sum_e f_e P_e of each group [G] (Fedus et al. 2021, equation 4).

    f_e is the fraction of tokens that have e among their experts, P_e the mean probability of e. It is K
    under uniform routing.
    """
    num_experts = probs_GNE.shape[-1]
    chosen_GNE = jax.nn.one_hot(experts_GNK, num_experts).max(-2)  # expert E, which is none, gives zeros
    mean_GE = lambda values_GNE: jax.vmap(group_mean, (-1, None), -1)(values_GNE, mask_GN)  # noqa: E731
    return num_experts * (mean_GE(chosen_GNE) * mean_GE(probs_GNE)).sum(-1)


def z_loss(logits_GNE: Array, mask_GN: Array) -> Array:
    """Return the mean square of logsumexp(logits) of each group [G] (Zoph et al. 2022, equation 5)."""
    return group_mean(jnp.square(jax.nn.logsumexp(logits_GNE, axis=-1)), mask_GN)
