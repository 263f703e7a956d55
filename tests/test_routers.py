"""Every router keeps one contract; each one's own equations beside a naive reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import tree
from mtjax.models import functional, routers
from mtjax.types import Context

G, N, D, E, T = 3, 6, 8, 4, 3
ROUTERS = {
    "switch": routers.Switch(),
    "top 2": routers.TopK(),
    "gshard": routers.TopK(normalize_weights=True, random_second=True, balance_first=True),
    "st-moe": routers.TopK(z_factor=1e-3, batch_prioritized=True),
}


def make(router):
    return router.make(D, E, num_tasks=T, key=jax.random.key(0))


def inputs(seed=1, dtype=jnp.float32):
    """Return (x_GND, mask_GN, context); groups of 6, 4 and 1 tokens."""
    x_GND = 3 * jax.random.normal(jax.random.key(seed), (G, N, D), dtype)
    lengths = jnp.array([6, 4, 1])
    rng = np.random.default_rng(seed)
    context = Context(task_ids=jnp.asarray(rng.integers(-1, T, (G, N)), jnp.int32))
    return x_GND, jnp.arange(N) < lengths[:, None], context


def dense(choice, num_tokens=N):
    """Return what a choice does as [G, N, E]: each expert's weight for each token."""
    one_hot = jax.nn.one_hot(choice.experts_GNK, choice.probs_GNE.shape[-1])
    return (one_hot * choice.weights_GNK[..., None]).sum(2)


@pytest.fixture(params=ROUTERS, name="router")
def _router(request):
    return ROUTERS[request.param]


def test_shapes_and_float32(router):
    x_GND, mask_GN, context = inputs(dtype=jnp.bfloat16)
    choice, losses = make(router)(x_GND, mask_GN, context)
    assert choice.probs_GNE.shape == (G, N, E)
    assert dense(choice).shape == (G, N, E)
    assert all(
        x.dtype == jnp.float32 for x in choice if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    )
    assert all(loss.shape == (G,) and loss.dtype == jnp.float32 for loss in losses.values())
    np.testing.assert_allclose(choice.probs_GNE.sum(-1), 1, rtol=1e-5)


def test_padding_takes_no_part(router):
    x_GND, mask_GN, context = inputs()
    module = make(router)
    choice, losses = module(x_GND, mask_GN, context)
    assert not dense(choice)[~mask_GN].any()
    other = jnp.where(mask_GN[..., None], x_GND, 100.0)
    again, other_losses = module(other, mask_GN, context)
    np.testing.assert_array_equal(dense(again), dense(choice))
    for name, loss in losses.items():
        np.testing.assert_array_equal(loss, other_losses[name])


def test_gradients_reach_every_parameter(router):
    x_GND, mask_GN, context = inputs()
    abstract = jax.eval_shape(lambda: make(router))
    params = functional.parameters(make(router))

    def output(params):
        choice, _ = functional.bind(abstract, params)(x_GND, mask_GN, context)
        return (dense(choice) * jnp.cos(jnp.arange(E))).sum()

    for path, gradient in tree.flatten(jax.grad(output)(params)).items():
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).sum() > 0, path


def test_groups_are_apart(router):
    x_GND, mask_GN, context = inputs()
    module = make(router)
    order = jnp.array([2, 0, 1])
    choice, losses = module(x_GND, mask_GN, context)
    moved = jax.tree.map(lambda x: x[order], context)
    choice_moved, losses_moved = module(x_GND[order], mask_GN[order], moved)
    for there, here in zip(jax.tree.leaves(choice_moved), jax.tree.leaves(choice), strict=True):
        np.testing.assert_allclose(there, here[order], rtol=1e-6)
    for name, loss in losses.items():
        np.testing.assert_allclose(losses_moved[name], loss[order], rtol=1e-6)


@pytest.mark.parametrize(("num_selected", "uniform"), [(1, 1.0), (2, 2.0)])
def test_balance_loss_of_uniform_and_of_collapsed_routing(num_selected, uniform):
    module = make(routers.TopK(num_selected, balance_factor=0.5))
    x_GND, mask_GN, context = inputs()
    losses = module(0 * x_GND, mask_GN, context)[1]
    np.testing.assert_allclose(losses["router_balance"], 0.5 * uniform, rtol=1e-5)
    module = make(routers.Switch(balance_factor=0.5))
    kernel = jnp.zeros((D, E)).at[:, 2].set(100.0)
    module.router_weights.w.kernel[...] = kernel
    losses = module(jnp.abs(x_GND), mask_GN, context)[1]
    np.testing.assert_allclose(losses["router_balance"], 0.5 * E, rtol=1e-5)


def test_z_loss():
    module = make(routers.TopK(balance_factor=0.0, z_factor=0.5))
    x_GND, mask_GN, context = inputs()
    _, losses = module(x_GND, mask_GN, context)
    assert losses.keys() == {"router_z"}
    logits = np.asarray(x_GND) @ np.asarray(module.router_weights.w.kernel[...])
    square = np.log(np.exp(logits).sum(-1)) ** 2
    wanted = [0.5 * square[g, :n].mean() for g, n in enumerate((6, 4, 1))]
    np.testing.assert_allclose(losses["router_z"], wanted, rtol=1e-5)


def test_switch_weighs_by_probability_and_gshard_normalises():
    x_GND, mask_GN, context = inputs()
    choice, _ = make(routers.Switch())(x_GND, mask_GN, context)
    np.testing.assert_allclose(choice.weights_GNK[mask_GN][:, 0], choice.probs_GNE[mask_GN].max(-1))
    np.testing.assert_array_equal(choice.experts_GNK[mask_GN][:, 0], choice.probs_GNE[mask_GN].argmax(-1))
    choice, _ = make(ROUTERS["gshard"])(x_GND, mask_GN, context)
    np.testing.assert_allclose(choice.weights_GNK[mask_GN].sum(-1), 1, rtol=1e-6)


def test_second_expert_is_drawn_in_training_only():
    module = make(ROUTERS["gshard"])
    x_GND = jnp.tile(50 * inputs()[0][:1, :1], (200, N, 1))
    mask_GN = jnp.ones((200, N), bool)
    training = Context(key=jax.random.key(0), train=True)
    choice, _ = module(x_GND, mask_GN, training)
    everyone, _ = module(x_GND, mask_GN, Context())
    assert (everyone.experts_GNK < E).all()
    assert (choice.experts_GNK[..., 0] < E).all()
    share = (choice.experts_GNK[..., 1] < E).mean()
    weight = everyone.weights_GNK[0, 0, 1]
    assert 0.05 < weight < 0.45
    np.testing.assert_allclose(share, 2 * weight, atol=0.05)
    np.testing.assert_array_equal(choice.weights_GNK[..., 1] == 0, choice.experts_GNK[..., 1] == E)


def test_jitter_moves_probabilities_in_training_only():
    x_GND, mask_GN, context = inputs()
    module, still = make(routers.Switch(jitter=0.1)), make(routers.Switch(jitter=0.0))
    training = dataclasses.replace(context, key=jax.random.key(1), train=True)
    np.testing.assert_array_equal(
        module(x_GND, mask_GN, context)[0].probs_GNE, still(x_GND, mask_GN, training)[0].probs_GNE
    )
    moved = module(x_GND, mask_GN, training)[0].probs_GNE
    assert 0 < jnp.abs(moved - still(x_GND, mask_GN, context)[0].probs_GNE).max() < 0.1


def test_batch_priority_is_the_best_probability():
    x_GND, mask_GN, context = inputs()
    choice, _ = make(ROUTERS["st-moe"])(x_GND, mask_GN, context)
    np.testing.assert_array_equal(choice.priority_GN, choice.probs_GNE.max(-1))
    assert make(routers.TopK())(x_GND, mask_GN, context)[0].priority_GN is None


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="num_selected=5 is more than num_experts=4"):
        make(routers.TopK(5))
    with pytest.raises(ValueError, match="random_second needs num_selected=2"):
        routers.TopK(1, random_second=True)
