"""Expert choice: every expert takes its C best tokens (Zhou et al. 2022, https://arxiv.org/abs/2202.09368).

    p = softmax over experts of W h;  expert e takes the C tokens of its group with the largest p_e
    C = ceil(capacity_factor * tokens / E);  output of a token = sum of p_e expert_e(h) over who took it

Load is even by design, so there is no balance loss. Whether a token is taken depends on tokens after it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models.routers.choice import ExpertChoice, Routing, z_loss
from mtjax.models.routers.gates import LINEAR, Gate
from mtjax.models.routers.top_k import jittered
from mtjax.types import Array, Context


@dataclasses.dataclass(frozen=True)
class ExpertsChoose:
    """Let every expert choose its tokens; encoders only."""

    capacity_factor: float = 1.0  # experts a token has on average
    z_factor: float = 0.0
    jitter: float = 0.0
    gate: Gate = LINEAR

    can_decode: ClassVar[bool] = False
    can_pack: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.capacity_factor <= 0:
            raise ValueError(f"ExpertsChoose.capacity_factor must be above 0, got {self.capacity_factor}.")

    def make(self, emb_dim: int, num_experts: int, *, num_tasks: int = 0, key: Array) -> ExpertsChooseRouter:
        """Make the router's module."""
        return ExpertsChooseRouter(self, self.gate.make(emb_dim, num_experts, num_tasks=num_tasks, key=key))


class ExpertsChooseRouter(nnx.Module):
    """The module of ExpertsChoose."""

    def __init__(self, settings: ExpertsChoose, gate: Any) -> None:
        self.settings = settings
        self.router_weights = gate

    def __call__(self, x_GND: Array, mask_GN: Array, context: Context) -> Routing:
        """Route tokens; see the package for shapes."""
        settings = self.settings
        x_GND = jittered(x_GND.astype(jnp.float32), settings.jitter, context)
        logits_GNE = self.router_weights(x_GND, context)
        probs_GNE = jax.nn.softmax(logits_GNE)
        scores_GEN = jnp.where(mask_GN[:, None], probs_GNE.swapaxes(1, 2), 0.0)
        num_tokens, num_experts = probs_GNE.shape[1:]
        share = settings.capacity_factor / num_experts
        capacity = min(math.ceil(share * num_tokens), num_tokens)
        weights_GEC, tokens_GEC = jax.lax.top_k(scores_GEN, capacity)
        # As many slots as the group's own tokens fill: more padding does not change who is taken.
        used_G = jnp.ceil(share * mask_GN.sum(-1)).astype(jnp.int32)
        is_used_GC = jnp.arange(capacity) < used_G[:, None]
        choice = ExpertChoice(
            tokens_GEC.astype(jnp.int32), jnp.where(is_used_GC[:, None], weights_GEC, 0.0), probs_GNE
        )
        losses = {"router_z": settings.z_factor * z_loss(logits_GNE, mask_GN)} if settings.z_factor else {}
        return choice, losses
