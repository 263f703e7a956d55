"""Soft mixture of experts: an expert sees mixtures of tokens (Puigcerver et al. 2023, https://arxiv.org/abs/2308.00951).

l = scale * (h / |h|) (phi / |phi|)                    one logit for every token and slot (section 2.3)
slot = sum_n softmax over tokens of l * h_n,  output of a token = sum over slots of softmax(l) expert(slot)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models.layers import fan_in_normal
from mtjax.models.routers.choice import Routing, Slots
from mtjax.types import Array, Context


@dataclasses.dataclass(frozen=True)
class Soft:
    """Mix a group's tokens into every expert's slots; encoders only, one example a row.

    Its cost is that of num_experts * slots_per_expert tokens a group: with as many slots as tokens, that of
    the dense layer.
    """

    slots_per_expert: int

    can_decode: ClassVar[bool] = False
    can_pack: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.slots_per_expert < 1:
            raise ValueError(f"Soft.slots_per_expert must be at least 1, got {self.slots_per_expert}.")

    def make(self, emb_dim: int, num_experts: int, *, num_tasks: int = 0, key: Array) -> SoftRouter:
        """Make the router's module."""
        del num_tasks
        return SoftRouter(emb_dim, num_experts, self.slots_per_expert, key=key)


class SoftRouter(nnx.Module):
    """The module of Soft; `phi` is kept as [D, E * C], a linear map's kernel."""

    def __init__(self, emb_dim: int, num_experts: int, slots_per_expert: int, *, key: Array) -> None:
        self.phi = nnx.Param(fan_in_normal(key, (emb_dim, num_experts * slots_per_expert)))
        self.scale = nnx.Param(jnp.ones((1,), jnp.float32))
        self.num_experts = num_experts

    def __call__(self, x_GND: Array, mask_GN: Array, context: Context) -> Routing:
        """Mix tokens; see the package for shapes. Raises ValueError for packed rows."""
        if context.segment_ids is not None:
            raise ValueError(
                "Soft mixes the tokens of a row, so examples packed into one row would see each other. Train "
                "without packing, or use a router of tokens (Switch, TopK, ExpertsChoose)."
            )
        phi = normalized(self.phi[...], 0) * self.scale[...]
        logits_GNS = jnp.matmul(normalized(x_GND.astype(jnp.float32), -1), phi, precision="highest")
        groups, num_tokens, slots = logits_GNS.shape
        mask_GN1 = mask_GN[..., None]
        # A group of padding only has slots of zeros.
        dispatch_GNS = jnp.where(
            mask_GN1, jax.nn.softmax(jnp.where(mask_GN1, logits_GNS, -1e30), axis=1), 0.0
        )
        combine_GNS = jnp.where(mask_GN1, jax.nn.softmax(logits_GNS, axis=2), 0.0)
        shape = (groups, num_tokens, self.num_experts, slots // self.num_experts)
        probs_GNE = jax.nn.softmax(logits_GNS, axis=2).reshape(shape).sum(-1)
        return Slots(dispatch_GNS.reshape(shape), combine_GNS.reshape(shape), probs_GNE), {}


def normalized(x: Array, dim: int) -> Array:
    """Scale to length 1 along a dim; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(dim, keepdims=True) + 1e-12)
