"""Uniform weighting: the sum of all losses, the baseline of every balancing method (Kurin et al. 2022, 2201.04122).

w_g = 1 for every group in the batch;  gradient = sum_g grad L_g + grad aux
"""

from __future__ import annotations

import jax.numpy as jnp

from mtjax.types import Balancer


def uniform() -> Balancer:
    """Weigh every group by one: one pullback, bit-identical to the gradient of the summed loss."""

    def init(key, num_groups, params):
        del key, num_groups, params
        return {}

    def weights(state, counts_G):
        del state
        return (counts_G > 0).astype(jnp.float32)

    def update(state, losses_G, counts_G, at):
        del losses_G
        return at.pullback(weights(state, counts_G), 1.0), state, {}

    return Balancer(init, weights, update)
