"""Multi-token prediction: losses and gradients of a naive reference, no leak across segments, decoding, memory."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import losses
from mtjax.models import decoder_only, functional, t5

SIZES = {"vocab_size": 24, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
T5 = t5.T5Config(**SIZES, num_encoder_layers=1, num_decoder_layers=2, num_predicted_tokens=3)
DECODER_ONLY = decoder_only.DecoderOnlyConfig(**SIZES, num_layers=2, num_predicted_tokens=3, scan_layers=True)
CONFIGS = {"t5": T5, "decoder_only": DECODER_ONLY}
L = 9
SEGMENTS = np.array([[1] * 4 + [2] * 3 + [3] + [0], [1] * 7 + [2] * 2])
TOLERANCE = {"rtol": 2e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def build(config):
    model = (t5.t5 if isinstance(config, t5.T5Config) else decoder_only.decoder_only)(config)
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    noisy = [x + 0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return model, jax.tree.unflatten(structure, noisy)


def packed_batch():
    rng = np.random.default_rng(1)
    targets = np.where(SEGMENTS > 0, rng.integers(3, 24, (2, L)), 0)
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    inputs[:, 1:][SEGMENTS[:, 1:] != SEGMENTS[:, :-1]] = 0
    weights = (SEGMENTS > 0).astype(np.float32)
    weights[1, :2] = 0.0  # as a prefix: neither predicted nor predicting
    batch = {
        "encoder_input_tokens": rng.integers(3, 24, (2, L)) * (SEGMENTS > 0),
        "encoder_segment_ids": SEGMENTS,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": inputs,
        "decoder_segment_ids": SEGMENTS,
        "decoder_loss_weights": weights,
    }
    return {name: jnp.asarray(x, x.dtype if x.dtype == np.float32 else np.int32) for name, x in batch.items()}


def with_head(config, params, i):
    """Return the parameters of a plain model of `config` whose last layer is head i, counted from 1."""
    decoder = dict(params["decoder"])
    first, others = decoder.pop("first_head"), decoder.pop("future_heads")
    head = first if i == 1 else functional.unstack_layers(others)[f"layers_{i - 2}"]
    decoder = functional.unstack_layers(decoder)
    decoder["layers_1"] = head
    return {**params, "decoder": functional.stack_layers(decoder) if config.scan_layers else decoder}


def naive_losses(config, params, batch):
    """Return each head's mean loss over the batch's target tokens, heads one by one, tokens one by one."""
    plain, _ = build(dataclasses.replace(config, num_predicted_tokens=1))
    weights, targets = (np.asarray(batch[f"decoder_{what}"]) for what in ("loss_weights", "target_tokens"))
    found = []
    for i in range(1, config.num_predicted_tokens + 1):
        logprobs_BLV = jax.nn.log_softmax(plain.apply(with_head(config, params, i), batch).logits_BLV)
        wanted_BLV = np.zeros(logprobs_BLV.shape, np.float32)
        for row in range(2):
            for t in range(L):
                ahead = t + i - 1
                if ahead >= L or SEGMENTS[row, t] != SEGMENTS[row, ahead]:
                    continue
                if weights[row, t] and weights[row, ahead]:
                    wanted_BLV[row, t, targets[row, ahead]] = 1
        found.append(-(logprobs_BLV * wanted_BLV).sum() / weights.sum())
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_heads_run_one_by_one(name):
    config, batch = CONFIGS[name], packed_batch()
    model, params = build(config)

    def ours(params):
        features = model.features(params, batch)
        loss_BL, _ = losses.token_losses(
            model.logits(params, features.hidden_BLD), batch["decoder_target_tokens"]
        )
        first = (loss_BL * batch["decoder_loss_weights"]).sum() / batch["decoder_loss_weights"].sum()
        return first + sum(features.aux.values()), (first, features.aux)

    def naive(params):
        found = naive_losses(config, params, batch)
        return sum(found), found

    got, (first, aux) = jax.jit(jax.grad(ours, has_aux=True))(params)
    wanted, each = jax.jit(jax.grad(naive, has_aux=True))(params)
    assert sorted(aux) == ["future_loss/2", "future_loss/3"]
    np.testing.assert_allclose([first, aux["future_loss/2"], aux["future_loss/3"]], each, **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, wanted)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got["decoder"]["future_heads"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_uses_head_one(name):
    config, batch = CONFIGS[name], packed_batch()
    model, params = build(config)
    plain, _ = build(dataclasses.replace(config, num_predicted_tokens=1))
    tokens = jnp.array([[0, 5, 7], [0, 9, 4]])
    if name == "t5":
        source = {"encoder_input_tokens": batch["encoder_input_tokens"]}
    else:
        source = {
            "decoder_input_tokens": batch["decoder_input_tokens"],
            "decoder_target_tokens": batch["decoder_target_tokens"],
            "decoder_causal_attention": (jnp.arange(L) < 4).astype(jnp.int32)[None].repeat(2, 0),
        }

    def decoded(model, params):
        cache = model.start(params, model.encode(params, source), max_length=3)
        cache = model.reorder(cache, jnp.array([0, 1]))
        logits = []
        for step in range(3):
            fed_B = cache["first_B"] if step == 0 else tokens[:, step]
            logits_BV, cache = model.decode(params, cache, fed_B)
            logits.append(logits_BV)
        return jnp.stack(logits)

    got = jax.jit(functools.partial(decoded, model))(params)
    wanted = jax.jit(functools.partial(decoded, plain))(with_head(config, params, 1))
    np.testing.assert_allclose(got, wanted, **TOLERANCE)


def test_memory_holds_one_heads_logits():
    def temporary(heads):
        config = dataclasses.replace(
            DECODER_ONLY, vocab_size=8192, num_predicted_tokens=heads, scan_layers=False
        )
        model = decoder_only.decoder_only(config)
        batch = {
            "decoder_input_tokens": jnp.ones((2, 32), jnp.int32),
            "decoder_target_tokens": jnp.ones((2, 32), jnp.int32),
            "decoder_loss_weights": jnp.ones((2, 32)),
        }
        step = jax.grad(lambda params: sum(model.features(params, batch).aux.values()))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return jax.jit(step).lower(params).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 32 * 8192 * 4
    assert temporary(2) > logits
    assert temporary(6) - temporary(2) < 0.5 * logits


def test_a_decoder_of_one_layer_has_no_trunk():
    with pytest.raises(ValueError, match="num_predicted_tokens=3 needs a trunk"):
        dataclasses.replace(T5, num_decoder_layers=1)
