"""Optimizers: T5X's Adafactor against a float64 reference, schedules against T5X's values, and wrappers."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import optim, tree

# Computed by T5X itself (see "what" and "versions" in the file); only a change of T5X's formulas justifies another.
SCHEDULES = json.loads((pathlib.Path(__file__).parent / "golden/t5x_training/lr_schedules.json").read_text())
SHAPES = {
    "token_embedder/embedding": (384, 128),
    "encoder/layers_0/mlp/wi_0/kernel": (128, 256),
    "encoder/layers_0/mlp/wo/kernel": (256, 128),
    "encoder/layers_0/attention/query/kernel": (128, 128),
    "encoder/layers_0/pre_mlp_layer_norm/scale": (128,),
    "encoder/relpos_bias/rel_embedding": (4, 32),
    "decoder/narrow/kernel": (127, 512),
}


def random_tree(shapes, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        {k: jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    )


def apply(params, updates):
    return jax.tree.map(jnp.add, params, updates)


def run(optimizer, params, grads):
    """Train on a list of gradients, jitted."""
    state = optimizer.init(params)

    @jax.jit
    def step(g, state, params):
        updates, state = optimizer.update(g, state, params)
        return apply(params, updates), state

    for g in grads:
        params, state = step(g, state, params)
    return params, state


def reference_adafactor(p, gradients, rates, *, factored, beta1=None, weight_decay=0.0):
    """Adafactor on one matrix or vector in float64, straight from T5X's definition."""
    p, v, r, c, m = p.astype(np.float64), 0.0, 0.0, 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True)):
        g, d = g.astype(np.float64), 1 - (t + 1.0) ** -0.8
        if factored:
            column = 0 if g.shape[0] > g.shape[1] else 1
            r = d * r + (1 - d) * (g**2 + 1e-30).mean(column, keepdims=True)
            c = d * c + (1 - d) * (g**2 + 1e-30).mean(1 - column, keepdims=True)
            u = g / np.sqrt(r * c / r.mean())
        else:
            v = d * v + (1 - d) * (g**2 + 1e-30)
            u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        u = rate * max(1e-3, np.sqrt((p**2).mean())) * u
        if beta1 is not None:
            u = m = beta1 * m + (1 - beta1) * u
        p = p - u - weight_decay * p
    return p, v, r, c


@pytest.mark.parametrize("arguments", [{}, {"beta1": 0.9}, {"weight_decay_rate": 0.01}])
def test_adafactor_follows_the_float64_reference(arguments):
    params = random_tree(SHAPES, 0, 0.1)
    params["encoder"]["relpos_bias"]["rel_embedding"] *= 1e-6  # below the floor of the parameter scale
    # Update clipping acts where gradients grow, and does not where they shrink.
    grads = [random_tree(SHAPES, 1 + i, scale) for i, scale in enumerate([0.01, 0.1, 1.0, 0.1, 0.01, 0.5])]
    schedule = optim.learning_rate(factors="constant * rsqrt_decay", warmup_steps=2)
    got, state = run(optim.adafactor(schedule, **arguments), params, grads)
    rates = [float(schedule(t)) for t in range(6)]
    factored = {path for path, shape in SHAPES.items() if len(shape) == 2 and min(shape) >= 128}
    assert tree.flatten(state.v_row).keys() == factored == tree.flatten(state.v_col).keys()
    assert tree.flatten(state.v).keys() == SHAPES.keys() - factored
    for path, p in tree.flatten(params).items():
        gradients = [np.asarray(tree.flatten(g)[path]) for g in grads]
        want, v, r, c = reference_adafactor(
            np.asarray(p),
            gradients,
            rates,
            factored=path in factored,
            beta1=arguments.get("beta1"),
            weight_decay=arguments.get("weight_decay_rate", 0.0),
        )
        np.testing.assert_allclose(tree.flatten(got)[path], want, rtol=2e-6, atol=2e-7, err_msg=path)
        if path in factored:
            np.testing.assert_allclose(tree.flatten(state.v_row)[path], r.squeeze(), rtol=1e-5)
            np.testing.assert_allclose(tree.flatten(state.v_col)[path], c.squeeze(), rtol=1e-5)
        else:
            np.testing.assert_allclose(tree.flatten(state.v)[path], v, rtol=1e-5)
    assert state.step == 6 and state.step.dtype == jnp.int32


def test_adafactor_sums_wide_matrices_in_slabs_to_the_same_moments():
    shapes = {"logits_dense/kernel": (144, 16384)}
    params, grad = random_tree(shapes, 0), random_tree(shapes, 1)
    _, state = run(optim.adafactor(0.01), params, [grad])
    g = np.asarray(grad["logits_dense"]["kernel"], np.float64)
    np.testing.assert_allclose(state.v_col["logits_dense"]["kernel"], (g**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.v_row["logits_dense"]["kernel"], (g**2).mean(1), rtol=1e-5)


def test_adafactor_on_stacked_layers_equals_each_layer_alone():
    shapes = {"mlp/wi/kernel": (128, 256), "mlp/wo/kernel": (256, 128), "norm/scale": (128,), "bias": (4, 8)}
    # Layers of very different size: a scale or clipping over all of them would show.
    layers = [random_tree(shapes, i, 10.0 ** (i - 1)) for i in range(3)]
    steps = [[random_tree(shapes, 10 * s + i, 10.0 ** (1 - i) * 3**s) for i in range(3)] for s in range(4)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    optimizer = optim.adafactor(0.1, beta1=0.5)
    stacked, state = run(optimizer, {"layers": stack(layers)}, [{"layers": stack(g)} for g in steps])
    alone = {f"layers_{i}": layer for i, layer in enumerate(layers)}
    unstacked, state_alone = run(optimizer, alone, [{f"layers_{i}": g[i] for i in range(3)} for g in steps])
    for i in range(3):
        for got, want in [(stacked, unstacked), (state.v_row, state_alone.v_row), (state.v, state_alone.v)]:
            jax.tree.map(
                lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-6),
                got["layers"],
                want[f"layers_{i}"],
            )


def test_adafactor_treats_experts_as_a_stack_of_matrices():
    params = {"layers": {"expert": {"wi": {"kernel": jnp.ones((2, 3, 128, 256))}}}}
    state = jax.eval_shape(optim.adafactor(0.1).init, params)
    assert state.v_row["layers"]["expert"]["wi"]["kernel"].shape == (2, 3, 128)
    assert state.v_col["layers"]["expert"]["wi"]["kernel"].shape == (2, 3, 256)


def test_adafactor_scans_the_gradient_without_a_copy_of_it():
    shapes = {"token_embedder/embedding": (4096, 512), "logits_dense/kernel": (512, 32128)}
    params = jax.eval_shape(lambda: random_tree(shapes, 0))
    optimizer = optim.adafactor(0.1)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return apply(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20 * 8, "a temporary as large as a parameter (at least 8 MiB)"


@pytest.mark.parametrize("schedule", SCHEDULES["schedules"], ids=lambda s: str(s["arguments"]))
def test_learning_rates_equal_those_of_t5x(schedule):
    rate = jax.jit(optim.learning_rate(**schedule["arguments"]))
    got = [float(rate(step)) for step in SCHEDULES["steps"]]
    np.testing.assert_allclose(got, schedule["values"], rtol=1e-6, atol=0)


@hypothesis.given(step=st.integers(0, 2**31 - 1), warmup=st.integers(1, 10**5))
@hypothesis.settings(deadline=None, max_examples=30)
def test_learning_rates_are_never_below_the_minimum(step, warmup):
    for factors in ("linear_decay", "constant * linear_warmup * cosine_decay", "constant * rsqrt_decay"):
        rate = optim.learning_rate(factors=factors, warmup_steps=warmup, min_learning_rate=1e-5)(step)
        assert np.float32(1e-5) <= rate <= 1.0 and rate.dtype == jnp.float32


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"factor 'rsqrt_decai'.*'rsqrt_decay'"):
        optim.learning_rate(factors="constant * rsqrt_decai")
    with pytest.raises(ValueError, match="warmup_steps must be positive, got 0"):
        optim.learning_rate(warmup_steps=0)
    with pytest.raises(ValueError, match=r"transformation 'adamm'.*'adam'"):
        optim.transformation("adamm", 0.1)
    with pytest.raises(ValueError, match=r"argument of optax's adam 'bb1'.*'b1'"):
        optim.transformation("adam", 0.1, bb1=0.9)


@pytest.mark.parametrize("name", ["sgd", "lion", "lamb", "adafactor", "muon", "scale_by_adam"])
def test_transformations_are_those_of_optax(name):
    params, grads = random_tree(SHAPES, 0), [random_tree(SHAPES, i) for i in (1, 2)]
    schedule = optim.learning_rate(warmup_steps=1)
    got, state = run(optim.transformation(name, schedule), params, grads)
    if name == "scale_by_adam":
        plain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))
    else:
        plain = getattr(optax, name, None) or getattr(optax.contrib, name)
        plain = plain(learning_rate=schedule)
    want, _ = run(plain, params, grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)
    assert state.step == 2


def test_adamw_equals_optax():
    params, grads = random_tree(SHAPES, 0), [random_tree(SHAPES, i) for i in (1, 2, 3)]
    schedule = optim.learning_rate(warmup_steps=1)
    got, _ = run(optim.adamw(schedule, b1=0.8, weight_decay=0.1), params, grads)
    want, _ = run(optax.adamw(schedule, b1=0.8, weight_decay=0.1), params, grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


def test_weight_decay_follows_its_rules():
    params = random_tree(SHAPES, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    rules = [(r".*(scale|embedding)", 0.0), (".*", 0.5)]
    got, _ = run(optim.adamw(0.1, weight_decay=rules), params, [zeros])
    for path, p in tree.flatten(params).items():
        factor = 1.0 if path.endswith(("scale", "embedding")) else 1 - 0.1 * 0.5
        np.testing.assert_allclose(tree.flatten(got)[path], factor * p, rtol=1e-6)


def test_frozen_parameters_keep_their_bits_and_hold_no_memory():
    params = random_tree(SHAPES, 0)
    odd = jnp.array([-0.0, 0.0, 1e-40, jnp.inf] * 32, jnp.float32)
    params["encoder"]["layers_0"]["pre_mlp_layer_norm"]["scale"] = odd
    grads = random_tree(SHAPES, 1)
    optimizer = optim.chain(
        optim.adamw(0.1),
        freeze=["encoder/.*"],
        weight_decay=0.1,
        learning_rate_multipliers=[(".*", 2.0)],
        clip_global_norm=1.0,
    )
    assert not any("encoder" in path for path in tree.flatten(optimizer.init(params)))
    got, state = run(optimizer, params, [grads, grads])
    assert not any("encoder" in path for path in tree.flatten(state))
    for path, p in tree.flatten(params).items():
        equal = np.asarray(p).tobytes() == np.asarray(tree.flatten(got)[path]).tobytes()
        assert equal == path.startswith("encoder/"), path
    # Also where nothing folds the addition away.
    updates, _ = optimizer.update(grads, state, params)
    moved = odd.__array__() + np.asarray(updates["encoder"]["layers_0"]["pre_mlp_layer_norm"]["scale"])
    assert moved.tobytes() == odd.__array__().tobytes()


def test_clipping_scales_the_whole_gradient():
    params, grads = random_tree(SHAPES, 0), random_tree(SHAPES, 1)
    sgd = optim.transformation("sgd", 1.0)
    updates, _ = optim.chain(sgd, clip_global_norm=0.5).update(grads, sgd.init(params), params)
    np.testing.assert_allclose(tree.norm(updates), 0.5, rtol=1e-5)
    np.testing.assert_allclose(tree.dot(updates, grads), -0.5 * tree.norm(grads), rtol=1e-5)
    norm = float(tree.norm(grads))
    updates, _ = optim.chain(sgd, clip_global_norm=2 * norm).update(grads, sgd.init(params), params)
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -g), updates, grads)
    # The gradient of frozen parameters is not part of the norm.
    frozen = optim.chain(sgd, clip_global_norm=0.5, freeze=["encoder/.*"])
    updates, _ = frozen.update(grads, frozen.init(params), params)
    np.testing.assert_allclose(tree.norm(updates), 0.5, rtol=1e-5)


def test_learning_rate_multipliers_scale_updates():
    params, grads = random_tree(SHAPES, 0), random_tree(SHAPES, 1)
    plain = optim.adafactor(0.1)
    rules = [("encoder/.*", 0.0), ("token_embedder/.*", 0.5), (".*", 1.0)]
    wrapped = optim.chain(plain, learning_rate_multipliers=rules)
    want, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    got, _ = jax.jit(wrapped.update)(grads, wrapped.init(params), params)
    for path, u in tree.flatten(want).items():
        factor = 0.0 if path.startswith("encoder") else 0.5 if path.startswith("token") else 1.0
        np.testing.assert_allclose(tree.flatten(got)[path], factor * u, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": ["encodr/.*"]}, r"freeze: the regex 'encodr/\.\*' matches no parameter"),
        ({"weight_decay": [("scale", 0.0), (".*", 0.1)]}, "weight_decay: the regex 'scale' matches no"),
        ({"learning_rate_multipliers": [("x", 2.0)]}, "learning_rate_multipliers: the regex 'x' matches no"),
        ({"weight_decay": [("encoder/.*", 0.1)]}, "weight_decay: No rule matches parameter"),
        ({"learning_rate_multipliers": [("encoder/.*", 0.1)]}, "multipliers: No rule matches parameter"),
    ],
)
def test_rules_that_miss_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.chain(optim.adafactor(0.1), **arguments).init(random_tree(SHAPES, 0))


def test_clipping_to_nothing_is_an_error():
    with pytest.raises(ValueError, match="clip_global_norm must be positive, got 0"):
        optim.chain(optim.adafactor(0.1), clip_global_norm=0)


def test_average_is_exponential():
    a, p = {"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([3.0, 2.0])}
    np.testing.assert_allclose(optim.average(a, p, 0.75)["x"], [1.5, 2.0])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), a)
    assert optim.average(half, p, 0.75)["x"].dtype == jnp.bfloat16
