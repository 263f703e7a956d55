"""Every router keeps one contract; each one's own equations beside a naive reference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import tree
from mtjax.models import functional, routers
from mtjax.types import Context

G, N, D, E, T = 3, 6, 8, 4, 3
TEXTS = {
    "cola": "Is the sentence grammatical?",
    "sst2": "Is the review of a film positive?",
    "wmt_de": "Translate English to German.",
}
GSHARD = routers.TopK(normalize_weights=True, random_second=True, balance_first=True)
ROUTERS = {
    "switch": routers.Switch(),
    "gshard": GSHARD,
    "st-moe": routers.TopK(z_factor=1e-3, batch_prioritized=True),
    "experts choose": routers.ExpertsChoose(1.5, z_factor=1e-3),
    "hash": routers.Hash(),
    "soft": routers.Soft(2),
    "task matrix": routers.TopK(gate=routers.TaskMatrix()),
    "task embedding": routers.Switch(gate=routers.TaskEmbedding(5)),
    "descriptions": routers.TopK(gate=routers.Descriptions(TEXTS, width=5)),
    "task level": routers.TaskLevel(width=6, hidden=5),
    "task level, gumbel": routers.TaskLevel("gumbel", width=6, hidden=5),
    "dselect-k": routers.DSelectK(),
    "dselect-k, by token": routers.DSelectK(gate=routers.TaskEmbedding(5)),
}
CAUSAL = [name for name, router in ROUTERS.items() if router.can_decode]
OF_TASKS = [name for name in ROUTERS if name.startswith(("task", "descr", "dselect"))]


def make(router, num_experts=E):
    return router.make(D, num_experts, num_tasks=T, key=jax.random.key(0))


def batch(seed=1):
    """Return x_GND, mask_GN (6, 4 and 1 tokens), task_ids_GN and tokens_GN."""
    rng = np.random.default_rng(seed)
    x_GND = np.asarray(3 * rng.normal(size=(G, N, D)), np.float32)
    mask_GN = np.arange(N) < np.array([6, 4, 1])[:, None]
    task_ids_GN = rng.integers(-1, T, (G, N)).astype(np.int32)
    return x_GND, mask_GN, task_ids_GN, rng.integers(1, 100, (G, N)).astype(np.int32)


def table(choice):
    """Return what a choice does, [G, N, E, ...]: the weight of each expert (or slot) for each token."""
    num_experts = choice.probs_GNE.shape[-1]
    if isinstance(choice, routers.Slots):
        return choice.combine_GNEC + choice.dispatch_GNEC
    if isinstance(choice, routers.ExpertChoice):
        taken_GECN = jax.nn.one_hot(choice.tokens_GEC, choice.probs_GNE.shape[1])
        return jnp.einsum("gec,gecn->gne", choice.weights_GEC, taken_GECN)
    one_hot_GNKE = jax.nn.one_hot(choice.experts_GNK, num_experts)  # expert E is none
    return (one_hot_GNKE * choice.weights_GNK[..., None]).sum(2)


@functools.cache
def compiled(name):
    """Return (parameters, jitted (params, x, mask, task_ids, tokens) -> choice, table, losses)."""
    router = ROUTERS[name]
    abstract = jax.eval_shape(lambda: make(router))

    @jax.jit
    def call(params, x_GND, mask_GN, task_ids_GN, tokens_GN):
        context = Context(task_ids=task_ids_GN, tokens=tokens_GN)
        choice, losses = functional.bind(abstract, params)(x_GND, mask_GN, context)
        return choice, table(choice), losses

    return jax.jit(lambda: functional.parameters(make(router)))(), call


def route(name, *arrays):
    params, call = compiled(name)
    return jax.device_get(call(params, *arrays))


@pytest.mark.parametrize("name", ROUTERS)
def test_contract(name):
    arrays = x_GND, mask_GN, task_ids_GN, tokens_GN = batch()
    choice, table_GNE, losses = route(name, *arrays)

    # Shapes; float32; a distribution.
    assert choice.probs_GNE.shape == table_GNE.shape[:3] == (G, N, E)
    assert {x.dtype for x in jax.tree.leaves(choice)} <= {np.dtype("float32"), np.dtype("int32")}
    assert all(loss.shape == (G,) and loss.dtype == np.float32 for loss in losses.values())
    np.testing.assert_allclose(choice.probs_GNE.sum(-1), 1, rtol=1e-5)
    assert (table_GNE >= 0).all()
    assert table_GNE[mask_GN].any()

    # Padding takes no expert and changes nothing for others.
    assert not table_GNE[~mask_GN].any()
    if isinstance(choice, routers.TokenChoice):
        assert (choice.experts_GNK[~mask_GN] == E).all()
        assert (choice.experts_GNK[mask_GN].min(-1) < E).all()
    changed = (
        np.where(mask_GN[..., None], x_GND, 100.0).astype(np.float32),
        mask_GN,
        np.where(mask_GN, task_ids_GN, (task_ids_GN + 1) % T).astype(np.int32),
        np.where(mask_GN, tokens_GN, 0).astype(np.int32),
    )
    _, table_again_GNE, losses_again = route(name, *changed)
    np.testing.assert_array_equal(table_again_GNE, table_GNE)
    jax.tree.map(np.testing.assert_array_equal, losses_again, losses)

    # Groups are apart: in another order they do the same.
    order = np.array([2, 0, 1])
    _, moved_GNE, losses_moved = route(name, *(x[order] for x in arrays))
    np.testing.assert_allclose(moved_GNE, table_GNE[order], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[order], rtol=1e-5), losses_moved, losses)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_reach_every_parameter_and_bfloat16_is_routed_in_float32(name):
    x_GND, mask_GN, task_ids_GN, tokens_GN = batch()
    router, params = ROUTERS[name], compiled(name)[0]
    abstract = jax.eval_shape(lambda: make(router))
    context = Context(task_ids=task_ids_GN, tokens=tokens_GN, key=jax.random.key(0), train=True)

    @functools.partial(jax.grad, has_aux=True)
    def output(params):
        router = functional.bind(abstract, params)
        choice, losses = router(jnp.asarray(x_GND, jnp.bfloat16), jnp.asarray(mask_GN), context)
        return jnp.einsum("gne...,e->", table(choice), jnp.cos(jnp.arange(E))), (choice, losses)

    gradients, said = jax.device_get(jax.jit(output)(params))
    assert {x.dtype for x in jax.tree.leaves(said)} <= {np.dtype("float32"), np.dtype("int32")}
    for path, gradient in tree.flatten(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).sum() > 0, path


@pytest.mark.parametrize("name", ROUTERS)
def test_a_decoder_takes_causal_routers_only(name):
    arrays = x_GND, mask_GN, *rest = batch()
    choice, table_GNE, _ = route(name, *arrays)
    later_GND = x_GND.copy()
    later_GND[:, 3:] = 9 * np.cos(np.arange(D)) * np.arange(N - 3)[:, None] + 1
    is_same = (route(name, later_GND, mask_GN, *rest)[1][:, :3] == table_GNE[:, :3]).all()
    # A later token with priority takes the place of an earlier one.
    assert (is_same and getattr(choice, "priority_GN", None) is None) == (name in CAUSAL)
    if name in CAUSAL:
        routers.check_decoder(ROUTERS[name])
        # One position of one row, as in decoding.
        one = [np.broadcast_to(x[:1, 2:3], (G, N, *x.shape[2:])) for x in arrays]
        np.testing.assert_allclose(route(name, *one)[1][0, 0], table_GNE[0, 2], rtol=1e-5)
    else:
        with pytest.raises(
            ValueError, match=f"{type(ROUTERS[name]).__name__} routes a token.* by tokens after"
        ):
            routers.check_decoder(ROUTERS[name])


@pytest.mark.parametrize("name", OF_TASKS)
def test_a_task_never_seen_routes_as_the_mean_of_tasks(name):
    x_GND, mask_GN, _, tokens_GN = batch()
    ids = lambda task: np.full((G, N), task, np.int32)  # noqa: E731
    unseen = route(name, x_GND, mask_GN, ids(-1), tokens_GN)
    np.testing.assert_array_equal(unseen[1], route(name, x_GND, mask_GN, ids(T + 5), tokens_GN)[1])
    seen = route(name, x_GND, mask_GN, ids(1), tokens_GN)
    assert np.abs(unseen[0].probs_GNE - seen[0].probs_GNE).max() > 1e-4, "a task does not matter"
    if name == "descriptions":
        return  # its rows are no parameters
    params, call = compiled(name)
    alike = tree.map_with_path(
        lambda path, x: np.broadcast_to(x.mean(0), x.shape) if "task_" in path else x, jax.device_get(params)
    )
    as_mean = call(alike, x_GND, mask_GN, ids(1), tokens_GN)
    np.testing.assert_allclose(as_mean[0].probs_GNE, unseen[0].probs_GNE, atol=1e-5)


# Top-k ----------------------------------------------------------------------------------------------------


def routed(router, x_GND, mask_GN, context=None, *, kernel=None):
    module = make(router)
    if kernel is not None:
        module.router_weights.w.kernel[...] = kernel
    routing = jax.jit(lambda x, mask, context: module(x, mask, context))(x_GND, mask_GN, context or Context())
    return jax.device_get(routing)


@pytest.mark.parametrize(("num_selected", "uniform"), [(1, 1.0), (2, 2.0)])
def test_balance_loss_of_uniform_routing(num_selected, uniform):
    x_GND, mask_GN, *_ = batch()
    losses = routed(routers.TopK(num_selected, balance_factor=0.5), 0 * x_GND, mask_GN)[1]
    np.testing.assert_allclose(losses["router_balance"], 0.5 * uniform, rtol=1e-5)


def test_balance_loss_of_collapsed_routing():
    x_GND, mask_GN, *_ = batch()
    kernel = jnp.zeros((D, E)).at[:, 2].set(100.0)
    losses = routed(routers.Switch(balance_factor=0.5), np.abs(x_GND), mask_GN, kernel=kernel)[1]
    np.testing.assert_allclose(losses["router_balance"], 0.5 * E, rtol=1e-5)


def test_losses_are_means_over_a_groups_own_tokens():
    x_GND, mask_GN, *_ = batch()
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(D, E)), jnp.float32)
    _, losses = routed(routers.TopK(balance_factor=0.2, z_factor=0.5), x_GND, mask_GN, kernel=kernel)
    for g, n in enumerate((6, 4, 1)):
        logits = np.asarray(x_GND[g, :n], np.float64) @ np.asarray(kernel)
        exponents = np.exp(logits)
        probs = exponents / exponents.sum(-1, keepdims=True)
        np.testing.assert_allclose(losses["router_z"][g], 0.5 * (np.log(exponents.sum(-1)) ** 2).mean(), 1e-4)
        chosen = np.zeros((n, E))
        np.put_along_axis(chosen, np.argsort(-probs)[:, :2], 1.0, axis=1)
        balance = E**2 * (chosen.mean(0) * probs.mean(0)).mean()
        np.testing.assert_allclose(losses["router_balance"][g], 0.2 * balance, 1e-4)


def test_switch_weighs_by_probability_and_gshard_normalises():
    x_GND, mask_GN, *_ = batch()
    choice, _ = routed(routers.Switch(), x_GND, mask_GN)
    np.testing.assert_allclose(choice.weights_GNK[mask_GN][:, 0], choice.probs_GNE[mask_GN].max(-1))
    np.testing.assert_array_equal(choice.experts_GNK[mask_GN][:, 0], choice.probs_GNE[mask_GN].argmax(-1))
    choice, _ = routed(GSHARD, x_GND, mask_GN)
    np.testing.assert_allclose(choice.weights_GNK[mask_GN].sum(-1), 1, rtol=1e-6)


def test_gshard_draws_the_second_expert_in_training():
    x_GND = np.tile(50 * batch()[0][:1, :1], (200, N, 1))
    mask_GN = np.ones((200, N), bool)
    choice, _ = routed(GSHARD, x_GND, mask_GN, Context(key=jax.random.key(0), train=True))
    everyone, _ = routed(GSHARD, x_GND, mask_GN)
    assert (everyone.experts_GNK < E).all()
    assert (choice.experts_GNK[..., 0] < E).all()
    weight = everyone.weights_GNK[0, 0, 1]
    assert 0.05 < weight < 0.45
    np.testing.assert_allclose((choice.experts_GNK[..., 1] < E).mean(), 2 * weight, atol=0.05)
    np.testing.assert_array_equal(choice.weights_GNK[..., 1] == 0, choice.experts_GNK[..., 1] == E)


def test_jitter_moves_probabilities_in_training_only():
    x_GND, mask_GN, *_ = batch()
    training = Context(key=jax.random.key(1), train=True)
    still = routed(routers.Switch(jitter=0.0), x_GND, mask_GN, training)[0].probs_GNE
    np.testing.assert_array_equal(routed(routers.Switch(jitter=0.1), x_GND, mask_GN)[0].probs_GNE, still)
    moved = routed(routers.Switch(jitter=0.1), x_GND, mask_GN, training)[0].probs_GNE
    assert 0 < np.abs(moved - still).max() < 0.1


def test_batch_priority_is_the_best_probability():
    x_GND, mask_GN, *_ = batch()
    choice, _ = routed(routers.TopK(batch_prioritized=True), x_GND, mask_GN)
    np.testing.assert_array_equal(choice.priority_GN, choice.probs_GNE.max(-1))
    assert routed(routers.TopK(), x_GND, mask_GN)[0].priority_GN is None


# The others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1.0, 9.0])
def test_experts_take_their_best_tokens(factor):
    x_GND, mask_GN, *_ = batch()
    choice, _ = routed(routers.ExpertsChoose(factor), x_GND, mask_GN)
    for g, n in enumerate((6, 4, 1)):
        capacity = min(int(np.ceil(factor * n / E)), n)
        for e in range(E):
            scores = np.asarray(choice.probs_GNE[g, :n, e])
            wanted = sorted(scores)[::-1][:capacity]
            weights = np.asarray(choice.weights_GEC[g, e])
            np.testing.assert_array_equal(weights[weights > 0], wanted)
            np.testing.assert_array_equal(scores[choice.tokens_GEC[g, e][weights > 0]], wanted)


def test_hash_needs_tokens_and_spreads_them():
    ids_GN = np.arange(32000).reshape(1, -1)
    x_GND, mask_GN = np.zeros((1, 32000, D)), np.ones((1, 32000), bool)
    choice, losses = routed(routers.Hash(), x_GND, mask_GN, Context(tokens=ids_GN))
    load = np.bincount(choice.experts_GNK.ravel(), minlength=E)
    assert not losses
    assert (choice.weights_GNK == 1).all()
    np.testing.assert_allclose(load, 8000, rtol=0.05)
    other, _ = routed(routers.Hash(1), x_GND, mask_GN, Context(tokens=ids_GN))
    np.testing.assert_allclose((other.experts_GNK == choice.experts_GNK).mean(), 1 / E, atol=0.02)
    with pytest.raises(ValueError, match="Hash routes by token ids"):
        routed(routers.Hash(), x_GND, mask_GN)


def test_soft_mixes_tokens_of_one_example():
    x_GND, mask_GN, *_ = batch()
    slots, _ = routed(routers.Soft(2), x_GND, mask_GN)
    np.testing.assert_allclose(slots.dispatch_GNEC.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(slots.combine_GNEC.sum((2, 3))[mask_GN], 1, rtol=1e-5)
    assert not slots.dispatch_GNEC[~mask_GN].any()
    empty, _ = routed(routers.Soft(2), x_GND, np.zeros_like(mask_GN))
    assert not empty.dispatch_GNEC.any()
    phi = np.asarray(make(routers.Soft(2)).phi[...])
    h = np.asarray(x_GND[1, :4])
    logits = (h / np.linalg.norm(h, axis=1, keepdims=True)) @ (phi / np.linalg.norm(phi, axis=0))
    wanted = np.exp(logits) / np.exp(logits).sum(0)
    np.testing.assert_allclose(slots.dispatch_GNEC[1, :4].reshape(4, -1), wanted, rtol=1e-4)
    with pytest.raises(ValueError, match="examples packed into one row would see each other"):
        routed(routers.Soft(2), x_GND, mask_GN, Context(segment_ids=jnp.ones((G, N), jnp.int32)))


def gate_logits(gate, tasks, num_tasks=T):
    """Return the logits of one token under each of some tasks."""
    x_GND = np.broadcast_to(batch()[0][0, 0], (1, len(tasks), D))
    make_and_call = lambda x, ids: gate.make(D, E, num_tasks=num_tasks, key=jax.random.key(0))(  # noqa: E731
        x, Context(task_ids=ids)
    )
    return np.asarray(jax.jit(make_and_call)(x_GND, np.array([tasks])))[0]


@pytest.mark.parametrize("gate", [routers.TaskMatrix(), routers.TaskEmbedding(5)])
def test_a_token_routes_by_its_task(gate):
    first, second, again = gate_logits(gate, [0, 1, 0])
    np.testing.assert_allclose(first, again, rtol=1e-6)
    assert np.abs(first - second).max() > 1e-3


def test_descriptions_route_tasks_never_trained_on():
    seen = routers.Descriptions(TEXTS, width=5)
    more = routers.Descriptions({**TEXTS, "copy": TEXTS["cola"], "wmt_fr": "Translate English to French."}, 5)
    logits = gate_logits(more, [0, 1, 2, 3, 4, -1])
    np.testing.assert_allclose(logits[3], logits[0], rtol=1e-6)
    np.testing.assert_allclose(gate_logits(seen, [0, 1, 2, -1]), logits[[0, 1, 2, 5]], rtol=1e-6)
    assert np.abs(logits[4] - logits[2]).max() > 1e-3
    cola, sst2, german, french = routers.descriptions.embed(
        (*TEXTS.values(), "Translate English to French."), 512
    )
    assert french @ german > 0.6 > max(french @ cola, french @ sst2)
    with pytest.raises(ValueError, match=r"describes 3 tasks.*of num_tasks=4"):
        gate_logits(seen, [0], num_tasks=4)
    with pytest.raises(ValueError, match=r"a text for every task; it has none for \['b'\]"):
        routers.Descriptions({"a": "x", "b": " "})


@dataclasses.dataclass(frozen=True)
class Both:
    """The part of a configuration that matters here."""

    encoder_router: Any
    decoder_router: Any


def test_a_models_descriptions_are_of_the_runs_tasks():
    gate = routers.Descriptions(TEXTS)
    config = Both(routers.Switch(gate=gate), routers.TopK(gate=gate))
    assert routers.described_tasks(config) == tuple(TEXTS)
    routers.check_descriptions(config, ["cola", "sst2"])
    with pytest.raises(ValueError, match=r"it has them as \['cola', 'sst2'\]"):
        routers.check_descriptions(config, ["sst2", "cola"])
    with pytest.raises(ValueError, match=r"it lacks \['copa'\]"):
        routers.check_descriptions(config, ["cola", "copa"])
    routers.check_descriptions(Both(None, GSHARD), ["x"])
    other = Both(config.encoder_router, routers.Switch(gate=routers.Descriptions({"a": "b"})))
    with pytest.raises(ValueError, match="need the same tasks in the same order"):
        routers.described_tasks(other)


def test_task_level_temperature_and_straight_through():
    x_GND, mask_GN, task_ids_GN, _ = batch()
    context = Context(task_ids=task_ids_GN, key=jax.random.key(0), train=True)
    hot, _ = routed(routers.TaskLevel("softmax", 1e6, width=6, hidden=5), x_GND, mask_GN, context)
    np.testing.assert_allclose(hot.weights_GNK[mask_GN], 1 / E, rtol=1e-4)

    hard, _ = routed(routers.TaskLevel(width=6, hidden=5), x_GND, mask_GN, context)
    soft, _ = routed(routers.TaskLevel("gumbel", width=6, hidden=5), x_GND, mask_GN, context)
    np.testing.assert_allclose(hard.weights_GNK[mask_GN], np.eye(E)[:1].repeat(mask_GN.sum(), 0), atol=1e-6)
    np.testing.assert_array_equal(hard.experts_GNK[..., 0], soft.experts_GNK[..., 0])
    assert (hard.experts_GNK[mask_GN] < E).all(), "the gradient needs every expert's output"
    for task in range(-1, T):  # one choice a task and step
        assert len(set(np.asarray(hard.experts_GNK[..., 0][mask_GN & (task_ids_GN == task)]))) <= 1

    still, _ = routed(routers.TaskLevel(width=6, hidden=5), x_GND, mask_GN, Context(task_ids=task_ids_GN))
    assert still.experts_GNK.shape == (G, N, 1)
    np.testing.assert_array_equal(still.experts_GNK[mask_GN][:, 0], still.probs_GNE[mask_GN].argmax(-1))


@pytest.mark.parametrize("num_experts", [4, 6])
def test_dselect_k_selectors(num_experts):
    router = routers.DSelectK(entropy_factor=0.5)
    module = make(router, num_experts)
    bits = module.router_weights.task_z.shape[-1] // 2
    z = np.random.default_rng(0).uniform(-0.6, 0.6, (T, 2, bits)).astype(np.float32)
    module.router_weights.task_z[...] = jnp.asarray(z.reshape(T, -1))
    alpha = np.asarray(module.router_weights.task_alpha[...])
    x_GND, _, _, _ = batch()
    context = Context(task_ids=jnp.broadcast_to(jnp.arange(G)[:, None], (G, N)))
    choice, losses = jax.jit(lambda x: module(x, jnp.ones((G, N), bool), context))(x_GND)
    for task in range(T):
        share = np.exp(alpha[task]) / np.exp(alpha[task]).sum()
        wanted, entropy, outside = np.zeros(num_experts), 0.0, 0.0
        for s in range(2):
            x = np.clip(z[task, s], -0.5, 0.5)
            smooth = -2 * x**3 + 1.5 * x + 0.5
            r = np.array(
                [
                    np.prod(
                        [
                            v if bit == "1" else 1 - v
                            for v, bit in zip(smooth, np.binary_repr(i, bits), strict=True)
                        ]
                    )
                    for i in range(num_experts)
                ]
            )
            wanted += share[s] * r
            entropy -= (r * np.log(r + 1e-6)).sum()
            outside += 1 / r.sum()
        np.testing.assert_allclose(table(choice)[task, 0], wanted, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(losses["router_entropy"][task], 0.5 * entropy, rtol=1e-4)
        assert ("router_reachable" in losses) == (num_experts == 6)
        if num_experts == 6:
            np.testing.assert_allclose(losses["router_reachable"][task], outside, rtol=1e-4)


def test_saturated_dselect_k_uses_k_experts():
    router = routers.DSelectK(2)
    module = make(router)
    module.router_weights.task_z[...] = jnp.array([[0.7, -0.5, -0.9, 0.5]] * T)  # experts 2 and 1
    x_GND, mask_GN, task_ids_GN, _ = batch()
    choice, _ = module(x_GND, mask_GN, Context(task_ids=task_ids_GN))
    used = np.sort(np.asarray(choice.experts_GNK[mask_GN]), -1)
    np.testing.assert_array_equal(used, np.broadcast_to([1, 2, E, E], used.shape))
    np.testing.assert_allclose(choice.weights_GNK[mask_GN].sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: make(routers.TopK(5)), "num_selected=5 is more than num_experts=4"),
        (lambda: routers.TopK(1, random_second=True), "random_second needs num_selected=2"),
        (lambda: routers.TopK(jitter=1.0), r"jitter must be in \[0, 1\), got 1.0"),
        (lambda: routers.ExpertsChoose(0.0), "capacity_factor must be above 0"),
        (lambda: routers.Soft(0), "slots_per_expert must be at least 1"),
        (lambda: routers.TaskLevel("gumble"), "'gumble'. Did you mean 'gumbel'"),
        (lambda: routers.TaskLevel(temperature=0.0), "temperature must be above 0"),
        (lambda: make(routers.DSelectK(), 1), "needs two experts at least"),
        (lambda: routers.TaskLevel().make(D, E, key=jax.random.key(0)), "TaskLevel has a row for every task"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
