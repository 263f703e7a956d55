"""Losses against naive formulas; sums per task against a loop."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import losses

B, L, D, V, T = 3, 7, 6, 11, 4


def naive_token_losses(logits_V, target, *, z_loss, label_smoothing):
    """Return (loss with z-loss, z-loss) of one token in float64, term by term."""
    logits_V = np.asarray(logits_V, np.float64)
    log_z = np.log(np.exp(logits_V - logits_V.max()).sum()) + logits_V.max()
    wanted_V = np.full(V, label_smoothing / (V - 1))
    wanted_V[target] = 1 - label_smoothing
    entropy = -sum(p * math.log(p) for p in wanted_V if p > 0)
    z = z_loss * log_z**2
    return -(wanted_V * (logits_V - log_z)).sum() - entropy + z, z


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    weights_BL = (rng.random((B, L)) < 0.8).astype(np.float32)
    weights_BL[0, 0] = 0.5  # weights need not be 0 or 1
    return {
        "decoder_target_tokens": jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32),
        "decoder_loss_weights": jnp.asarray(weights_BL),
        "decoder_task_ids": jnp.asarray(
            rng.integers(-1, T - 1, (B, L)), jnp.int32
        ),  # the last task is absent
    }


@pytest.fixture
def hidden_BLD():
    return 2 * jax.random.normal(jax.random.key(0), (B, L, D))


@pytest.fixture
def logits_of():
    kernel_DV = jax.random.normal(jax.random.key(1), (D, V))
    return lambda hidden_BLD: hidden_BLD @ kernel_DV


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.2)])
def test_token_losses_are_the_formula(z_loss, label_smoothing):
    logits_BLV = 3 * jax.random.normal(jax.random.key(0), (B, L, V))
    targets_BL = jax.random.randint(jax.random.key(1), (B, L), 0, V)
    arguments = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    loss_BL, z_loss_BL = losses.token_losses(logits_BLV, targets_BL, **arguments)
    for b in range(B):
        for i in range(L):
            wanted = naive_token_losses(logits_BLV[b, i], int(targets_BL[b, i]), **arguments)
            np.testing.assert_allclose((loss_BL[b, i], z_loss_BL[b, i]), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.2)])
def test_gradient_is_right_for_any_cotangent(z_loss, label_smoothing):
    """Gradient-balancing methods pull back one group of tokens at a time, and z-loss alone."""
    logits_BLV = 3 * jax.random.normal(jax.random.key(0), (B, L, V))
    targets_BL = jax.random.randint(jax.random.key(1), (B, L), 0, V)
    cotangents = tuple(jax.random.normal(key, (B, L)) for key in jax.random.split(jax.random.key(2)))

    def plain(logits_BLV):
        log_p_BLV = jax.nn.log_softmax(logits_BLV)
        wanted_BLV = jax.nn.one_hot(targets_BL, V)
        wanted_BLV = jnp.where(wanted_BLV > 0, 1 - label_smoothing, label_smoothing / (V - 1))
        z_BL = z_loss * jax.nn.logsumexp(logits_BLV, -1) ** 2
        return -(wanted_BLV * log_p_BLV).sum(-1) + z_BL, z_BL

    ours = functools.partial(
        losses.token_losses, targets_BL=targets_BL, z_loss=z_loss, label_smoothing=label_smoothing
    )
    expected = jax.vjp(plain, logits_BLV)[1](cotangents)[0]
    found = jax.vjp(ours, logits_BLV)[1](cotangents)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_losses_stay_finite_for_extreme_logits():
    logits_BLV = jnp.asarray([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    targets_BL = jnp.zeros((2, 1), jnp.int32)
    loss_BL, gradient = jax.value_and_grad(lambda x: losses.token_losses(x, targets_BL)[0].sum())(logits_BLV)
    assert loss_BL == pytest.approx(2e4)
    assert jnp.isfinite(gradient).all()


def test_sums_per_task_equal_a_loop_and_add_up(batch, hidden_BLD, logits_of):
    config = losses.LossConfig(z_loss=1e-2, label_smoothing=0.1)
    sums, totals = losses.task_sums(logits_of, hidden_BLD, batch, num_tasks=T, config=config)
    logits_BLV = logits_of(hidden_BLD)
    expected = np.zeros((4, T + 1))  # the last column is the task never seen, id -1
    for b in range(B):
        for i in range(L):
            target = int(batch["decoder_target_tokens"][b, i])
            loss, z = naive_token_losses(logits_BLV[b, i], target, z_loss=1e-2, label_smoothing=0.1)
            right = float(np.argmax(logits_BLV[b, i]) == target)
            column = np.asarray([loss, z, right, 1.0]) * float(batch["decoder_loss_weights"][b, i])
            expected[:, batch["decoder_task_ids"][b, i]] += column
    np.testing.assert_allclose(np.stack(sums), expected[:, :T], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.stack(totals), expected.sum(1), rtol=1e-5)
    assert sums.tokens_T[T - 1] == 0 and sums.loss_T[T - 1] == 0

    known = dict(batch, decoder_task_ids=jnp.maximum(batch["decoder_task_ids"], 0))
    sums, totals = losses.task_sums(logits_of, hidden_BLD, known, num_tasks=T, config=config)
    np.testing.assert_allclose(np.stack(sums).sum(1), np.stack(totals), rtol=1e-5)


def test_token_counts_need_data_alone(batch, hidden_BLD, logits_of):
    tokens_T, total = losses.token_counts(batch, num_tasks=T)
    sums, totals = losses.task_sums(logits_of, hidden_BLD, batch, num_tasks=T, config=losses.LossConfig())
    np.testing.assert_array_equal(tokens_T, sums.tokens_T)
    np.testing.assert_allclose(total, totals.tokens_T, rtol=1e-6)


def test_a_batch_without_task_ids_is_one_task(batch, hidden_BLD, logits_of):
    del batch["decoder_task_ids"]
    sums, totals = losses.task_sums(logits_of, hidden_BLD, batch, num_tasks=T, config=losses.LossConfig())
    np.testing.assert_allclose([column[0] for column in sums], totals, rtol=1e-5)
    assert all((column[1:] == 0).all() for column in sums)


def test_gradient_of_one_task_touches_its_tokens_alone(batch, hidden_BLD, logits_of):
    def loss(hidden_BLD, task):
        sums, _ = losses.task_sums(logits_of, hidden_BLD, batch, num_tasks=T, config=losses.LossConfig())
        return sums.loss_T[task]

    for task in range(T):
        gradient_BLD = jax.grad(loss)(hidden_BLD, task)
        touched_BL = np.abs(gradient_BLD).sum(-1) > 0
        own_BL = (np.asarray(batch["decoder_task_ids"]) == task) & (batch["decoder_loss_weights"] > 0)
        np.testing.assert_array_equal(touched_BL, own_BL)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 100])
def test_chunked_equals_unchunked(batch, hidden_BLD, logits_of, chunk):
    def sums(hidden_BLD, logits_chunk):
        config = losses.LossConfig(z_loss=1e-2, logits_chunk=logits_chunk)
        by_task, totals = losses.task_sums(logits_of, hidden_BLD, batch, num_tasks=T, config=config)
        return (by_task.loss_T * jnp.arange(1.0, T + 1)).sum() + 0.3 * totals.z_loss_T, (by_task, totals)

    expected_gradient, expected = jax.grad(sums, has_aux=True)(hidden_BLD, None)
    gradient, found = jax.grad(sums, has_aux=True)(hidden_BLD, chunk)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_a_chunk_bounds_the_logits_that_exist():
    vocab_size, length = 4096, 64
    kernel = jax.ShapeDtypeStruct((8, vocab_size), jnp.float32)
    hidden = jax.ShapeDtypeStruct((2, length, 8), jnp.float32)
    batch = {
        "decoder_target_tokens": jnp.ones((2, length), jnp.int32),
        "decoder_loss_weights": jnp.ones((2, length)),
    }

    def temporary_bytes(chunk):
        config = losses.LossConfig(logits_chunk=chunk)

        def loss(hidden, kernel):
            logits_of = lambda h: h @ kernel  # noqa: E731
            return losses.task_sums(logits_of, hidden, batch, num_tasks=1, config=config)[1].loss_T

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 0.5 * temporary_bytes(None)


def test_sequence_logprobs_sum_the_targets():
    logits_BLV = jax.random.normal(jax.random.key(0), (B, L, V))
    targets_BL = jax.random.randint(jax.random.key(1), (B, L), 0, V)
    weights_BL = jnp.ones((B, L)).at[1, 3:].set(0)
    expected = [
        sum(
            float(jax.nn.log_softmax(logits_BLV[b, i])[targets_BL[b, i]]) * weights_BL[b, i] for i in range(L)
        )
        for b in range(B)
    ]
    np.testing.assert_allclose(
        losses.sequence_logprobs(logits_BLV, targets_BL, weights_BL), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"normalizing_factor": "token"},
        {"normalizing_factor": 0.0},
        {"label_smoothing": 1.0},
        {"z_loss": -1.0},
        {"logits_chunk": 0},
    ],
)
def test_wrong_configs_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        losses.LossConfig(**wrong)
