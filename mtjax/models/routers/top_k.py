"""Token choice by scores: Switch (Fedus et al. 2021), GShard (Lepikhin et al. 2020), ST-MoE (Zoph et al. 2022).

    p = softmax(gate(h)),  experts = the K largest p_e,  output = sum over them of w_e expert_e(h)
    w_e = p_e (Switch, ST-MoE), or p_e / sum of the chosen p (GShard)
    losses: balance_factor * E sum_e f_e P_e  and  z_factor * mean logsumexp(gate(h))^2

https://arxiv.org/abs/2101.03961 https://arxiv.org/abs/2006.16668 https://arxiv.org/abs/2202.08906
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models.routers.choice import Routing, TokenChoice, balance_loss, z_loss
from mtjax.models.routers.gates import LINEAR, Gate
from mtjax.types import Array, Context

JITTER_SITE, SECOND_SITE = 30, 31  # of the layer's key


@dataclasses.dataclass(frozen=True)
class TopK:
    """Send a token to the experts with the largest scores.

    ST-MoE is TopK(z_factor=1e-3); GShard is TopK(normalize_weights=True, random_second=True,
    balance_first=True); V-MoE's batch priority (Riquelme et al. 2021) is batch_prioritized. Another gate makes
    it task-aware (Gupta et al. 2022, https://arxiv.org/abs/2204.07689).
    """

    num_selected: int = 2
    balance_factor: float = 0.01
    z_factor: float = 0.0
    jitter: float = 0.0  # in training, the gate's input is multiplied by U(1 - jitter, 1 + jitter)
    normalize_weights: bool = False  # the chosen experts' weights sum to 1
    random_second: bool = False  # in training, the second expert takes part with probability 2 w_2
    balance_first: bool = False  # f_e counts a token's first expert only
    batch_prioritized: bool = False  # tokens with large p are served first where capacity is short
    gate: Gate = LINEAR

    can_pack: ClassVar[bool] = True

    @property
    def can_decode(self) -> bool:
        """Tell whether no later token changes what becomes of a token: by priority one may take its place."""
        return not self.batch_prioritized

    def __post_init__(self) -> None:
        if self.num_selected < 1:
            raise ValueError(f"TopK.num_selected must be at least 1, got {self.num_selected}.")
        if self.random_second and self.num_selected != 2:
            raise ValueError(f"TopK.random_second needs num_selected=2, got {self.num_selected}.")
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"TopK.jitter must be in [0, 1), got {self.jitter}.")

    def make(self, emb_dim: int, num_experts: int, *, num_tasks: int = 0, key: Array) -> TopKRouter:
        """Make the router's module. Raises ValueError where there are fewer experts than selected."""
        if num_experts < self.num_selected:
            raise ValueError(f"TopK.num_selected={self.num_selected} is more than num_experts={num_experts}.")
        return TopKRouter(self, self.gate.make(emb_dim, num_experts, num_tasks=num_tasks, key=key))


@dataclasses.dataclass(frozen=True)
class Switch:
    """Send a token to the one expert with the largest score, weighted by its probability."""

    balance_factor: float = 0.01
    z_factor: float = 0.0
    jitter: float = 0.01
    gate: Gate = LINEAR

    can_decode: ClassVar[bool] = True
    can_pack: ClassVar[bool] = True

    def make(self, emb_dim: int, num_experts: int, *, num_tasks: int = 0, key: Array) -> TopKRouter:
        """Make the router's module."""
        settings = TopK(
            num_selected=1,
            balance_factor=self.balance_factor,
            z_factor=self.z_factor,
            jitter=self.jitter,
            gate=self.gate,
        )
        return settings.make(emb_dim, num_experts, num_tasks=num_tasks, key=key)


class TopKRouter(nnx.Module):
    """The module of TopK and Switch."""

    def __init__(self, settings: TopK, gate: Any) -> None:
        self.settings = settings
        self.router_weights = gate

    def __call__(self, x_GND: Array, mask_GN: Array, context: Context) -> Routing:
        """Route tokens; see the package for shapes."""
        settings = self.settings
        logits_GNE = self.router_weights(
            jittered(x_GND.astype(jnp.float32), settings.jitter, context), context
        )
        probs_GNE = jax.nn.softmax(logits_GNE)
        best_GNK, experts_GNK = jax.lax.top_k(probs_GNE, settings.num_selected)
        weights_GNK = best_GNK
        if settings.normalize_weights:
            weights_GNK = best_GNK / best_GNK.sum(-1, keepdims=True)
        taken_GNK = jnp.broadcast_to(mask_GN[..., None], experts_GNK.shape)
        if settings.random_second:
            taken_GNK = taken_GNK & sampled_second(weights_GNK, context)
        choice = TokenChoice(
            jnp.where(taken_GNK, experts_GNK, probs_GNE.shape[-1]),
            jnp.where(taken_GNK, weights_GNK, 0.0),
            best_GNK[..., 0] if settings.batch_prioritized else None,
            probs_GNE,
        )
        return choice, self._losses(logits_GNE, probs_GNE, experts_GNK, mask_GN)

    def _losses(
        self, logits_GNE: Array, probs_GNE: Array, experts_GNK: Array, mask_GN: Array
    ) -> dict[str, Array]:
        settings, losses = self.settings, {}
        if settings.balance_factor:
            counted = experts_GNK[..., :1] if settings.balance_first else experts_GNK
            losses["router_balance"] = settings.balance_factor * balance_loss(probs_GNE, counted, mask_GN)
        if settings.z_factor:
            losses["router_z"] = settings.z_factor * z_loss(logits_GNE, mask_GN)
        return losses


def jittered(x_GND: Array, jitter: float, context: Context) -> Array:
    """Multiply every number by its own U(1 - jitter, 1 + jitter), when the context trains."""
    if not context.train or context.key is None or jitter == 0.0:
        return x_GND
    key = jax.random.fold_in(context.key, JITTER_SITE)
    return x_GND * jax.random.uniform(key, x_GND.shape, minval=1.0 - jitter, maxval=1.0 + jitter)


def sampled_second(weights_GNK: Array, context: Context) -> Array:
    """Draw who takes part: the first expert always, the second with probability 2 w_2 when the context trains."""
    if not context.train or context.key is None:
        return jnp.ones(weights_GNK.shape, bool)
    drawn_GN = jax.random.uniform(jax.random.fold_in(context.key, SECOND_SITE), weights_GNK.shape[:-1])
    return jnp.stack([jnp.ones(drawn_GN.shape, bool), drawn_GN < 2.0 * weights_GNK[..., 1]], -1)
