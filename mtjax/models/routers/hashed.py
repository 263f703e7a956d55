"""Hash layers: a token's id decides its expert (Roller et al. 2021, https://arxiv.org/abs/2106.04426).

expert = hash(token id, seed) mod E,  weight 1,  nothing is learned
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models.routers.choice import Routing, TokenChoice
from mtjax.types import Array, Context


@dataclasses.dataclass(frozen=True)
class Hash:
    """Send a token to the expert that its id hashes to: the paper's random hash."""

    seed: int = 0

    can_decode: ClassVar[bool] = True
    can_pack: ClassVar[bool] = True

    def make(self, emb_dim: int, num_experts: int, *, num_tasks: int = 0, key: Array) -> HashRouter:
        """Make the router's module, which has no parameters."""
        del emb_dim, num_tasks, key
        return HashRouter(self.seed, num_experts)


class HashRouter(nnx.Module):
    """The module of Hash."""

    def __init__(self, seed: int, num_experts: int) -> None:
        self.seed = seed
        self.num_experts = num_experts

    def __call__(self, x_GND: Array, mask_GN: Array, context: Context) -> Routing:
        """Route tokens; see the package for shapes. Raises ValueError where the context has no token ids."""
        del x_GND
        if context.tokens is None:
            raise ValueError("Hash routes by token ids, and there are none (Context.tokens).")
        experts_GN = (mixed(context.tokens, self.seed) % jnp.uint32(self.num_experts)).astype(jnp.int32)
        choice = TokenChoice(
            jnp.where(mask_GN, experts_GN, self.num_experts)[..., None],
            mask_GN.astype(jnp.float32)[..., None],
            None,
            jax.nn.one_hot(experts_GN, self.num_experts),
        )
        return choice, {}


def mixed(tokens: Array, seed: int) -> Array:
    """Hash ids to uint32, every bit of which depends on all bits of the id (MurmurHash3's finalizer)."""
    x = tokens.astype(jnp.uint32) + jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
