"""DSelect-k: a differentiable choice of at most k experts (Hazimeh et al. 2021, https://arxiv.org/abs/2106.03760).

    S(x) = 0 below -g/2, 1 above g/2, -2 x^3 / g^3 + 3 x / (2 g) + 1/2 between
    r(z)_i = prod_j S(z_j) if bit j of i is set, else 1 - S(z_j)     one selector: one expert once S saturates
    q = sum_s softmax(alpha)_s r(z^s),  output = sum_i q_i expert_i(h)

Losses: entropy_factor * the selectors' entropies; and, where E is no power of 2, sum_s 1 / sum_i r(z^s)_i, which
keeps their mass on experts that exist.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtjax.models.routers.choice import Routing, group_mean, several
from mtjax.models.routers.gates import Gate
from mtjax.models.routers.tasks import check_num_tasks, task_rows, with_mean
from mtjax.types import Array, Context


@dataclasses.dataclass(frozen=True)
class DSelectK:
    """Select at most num_selected experts for each task; with a gate, for each token by its activations.

    Until the selectors saturate every expert is computed for every token.
    """

    num_selected: int = 2
    smoothing: float = 1.0  # g
    entropy_factor: float = 1e-6
    gate: Gate | None = None

    can_decode: ClassVar[bool] = True
    can_pack: ClassVar[bool] = True

    def make(self, emb_dim: int, num_experts: int, *, num_tasks: int = 0, key: Array) -> DSelectKRouter:
        """Make the router's module. Raises ValueError where there are fewer experts than selected, or one."""
        if not 1 <= self.num_selected <= num_experts or num_experts < 2:
            raise ValueError(
                f"DSelectK selects num_selected={self.num_selected} of num_experts={num_experts}; it needs two "
                "experts at least, and no more selected than there are."
            )
        bits = self.num_selected * math.ceil(math.log2(num_experts))
        if self.gate is not None:
            outputs = bits + self.num_selected
            return DSelectKRouter(
                self, num_experts, self.gate.make(emb_dim, outputs, num_tasks=num_tasks, key=key)
            )
        check_num_tasks(self, num_tasks)
        return DSelectKRouter(self, num_experts, TaskSelectors(self, num_tasks, bits, key=key))


class TaskSelectors(nnx.Module):
    """Every task's z [k * bits] and alpha [k], whatever the token."""

    def __init__(self, settings: DSelectK, num_tasks: int, bits: int, *, key: Array) -> None:
        z_key, alpha_key = jax.random.split(key)
        bound = settings.smoothing / 100
        self.task_z = nnx.Param(jax.random.uniform(z_key, (num_tasks, bits), minval=-bound, maxval=bound))
        shape = (num_tasks, settings.num_selected)
        self.task_alpha = nnx.Param(jax.random.uniform(alpha_key, shape, minval=-0.05, maxval=0.05))

    def __call__(self, x_GND: Array, context: Context) -> Array:
        """Return z and alpha of each token, [G, N, k * bits + k]."""
        table = with_mean(jnp.concatenate([self.task_z[...], self.task_alpha[...]], -1))
        return table[task_rows(context, table.shape[0] - 1, x_GND.shape[:2])]


class DSelectKRouter(nnx.Module):
    """The module of DSelectK."""

    def __init__(self, settings: DSelectK, num_experts: int, gate: Any) -> None:
        self.settings = settings
        self.num_experts = num_experts
        self.router_weights = gate

    def __call__(self, x_GND: Array, mask_GN: Array, context: Context) -> Routing:
        """Route tokens; see the package for shapes."""
        settings, num_selected = self.settings, self.settings.num_selected
        values = self.router_weights(x_GND.astype(jnp.float32), context)
        z, alpha_GNs = values[..., :-num_selected], values[..., -num_selected:]
        smooth = smooth_step(z.reshape(*z.shape[:2], num_selected, -1), settings.smoothing)
        selectors_GNsE = single_experts(smooth, self.num_experts)
        weights_GNE = (jax.nn.softmax(alpha_GNs)[..., None] * selectors_GNsE).sum(-2)
        probs_GNE = weights_GNE / jnp.maximum(weights_GNE.sum(-1, keepdims=True), 1e-6)
        # Where S is saturated its slope is 0 too, so what has no weight has no gradient either.
        choice = several(weights_GNE, (weights_GNE > 0) & mask_GN[..., None], probs_GNE)
        return choice, self._losses(selectors_GNsE, mask_GN)

    def _losses(self, selectors_GNsE: Array, mask_GN: Array) -> dict[str, Array]:
        losses = {}
        if self.settings.entropy_factor:
            entropy_GN = -(selectors_GNsE * jnp.log(selectors_GNsE + 1e-6)).sum((-2, -1))
            losses["router_entropy"] = self.settings.entropy_factor * group_mean(entropy_GN, mask_GN)
        if self.num_experts & (self.num_experts - 1):
            outside_GN = (1.0 / jnp.maximum(selectors_GNsE.sum(-1), 1e-6)).sum(-1)
            losses["router_reachable"] = group_mean(outside_GN, mask_GN)
        return losses


def smooth_step(x: Array, width: float) -> Array:
    """Return S(x): 0 up to -width / 2, 1 from width / 2, a cubic between with slope 0 at both ends."""
    x = jnp.clip(x, -width / 2, width / 2)
    return -2.0 * x**3 / width**3 + 3.0 * x / (2.0 * width) + 0.5


def single_experts(smooth: Array, num_experts: int) -> Array:
    """Return r [..., E] of smoothed bits [..., m]; the first bit is the most significant one."""
    bits = smooth.shape[-1]
    codes_Em = (np.arange(num_experts)[:, None] >> np.arange(bits)[::-1]) & 1
    return jnp.where(codes_Em == 1, smooth[..., None, :], 1.0 - smooth[..., None, :]).prod(-1)
