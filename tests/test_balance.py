"""Contract tests of every balancer, on three quadratics with known gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import balance

METHODS = {"uniform": balance.uniform}

TARGETS = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])


class At:
    """Losses L_g = |p - target_g|^2 / 2 at p; `absent` groups have none."""

    def __init__(self, params, present):
        self.params, self.present = params, present

    def losses(self, params):
        return self.present * 0.5 * jnp.sum((params["p"] - TARGETS[: len(self.present)]) ** 2, axis=1)

    def pullback(self, w_G, aux=0.0):
        _, vjp = jax.vjp(lambda p: (self.losses(p), jnp.sum(p["p"])), self.params)
        return vjp((w_G.astype(jnp.float32), jnp.float32(aux)))[0]

    def moved(self, delta):
        there = At(jax.tree.map(jnp.add, self.params, delta), self.present)
        return there.losses(there.params), there.pullback


def one_step(method, present):
    params = {"p": jnp.array([0.5, 0.5])}
    present = jnp.array(present, jnp.float32)
    balancer = METHODS[method]()
    state = balancer.init(jax.random.key(0), len(present), params)
    at = At(params, present)
    step = jax.jit(lambda state: balancer.update(state, at.losses(params), 10 * present, at))
    return step(state), at, params


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("present", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1,)])
def test_update_is_finite_and_keeps_structure(method, present):
    (grads, state, metrics), _, params = one_step(method, present)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((grads, state, metrics)))


@pytest.mark.parametrize("method", METHODS)
def test_one_group_is_its_gradient_and_the_auxiliary_loss_once(method):
    (grads, _, _), at, _ = one_step(method, (1,))
    np.testing.assert_allclose(grads["p"], at.pullback(jnp.ones(1), 1.0)["p"], rtol=1e-6)


def test_uniform_is_the_gradient_of_the_sum():
    (grads, _, _), at, params = one_step("uniform", (1, 1, 1))
    plain = jax.grad(lambda p: at.losses(p).sum() + p["p"].sum())(params)
    np.testing.assert_array_equal(grads["p"], plain["p"])
