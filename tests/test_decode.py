"""Decoding with a cache equals the full forward pass; searches equal exhaustive ones on small models."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import decode
from mtjax.models import decoder_only, functional, t5

SIZES = {"vocab_size": 12, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
T5 = t5.T5Config(**SIZES, num_encoder_layers=1, num_decoder_layers=2)
DECODER_ONLY = decoder_only.DecoderOnlyConfig(**SIZES, num_layers=2)
B, S, L = 3, 6, 5


@functools.cache
def build(config, scale=0.4):
    """Return a model and noisy parameters, so that distributions are far from uniform."""
    model = (t5.t5 if isinstance(config, t5.T5Config) else decoder_only.decoder_only)(config)
    params = model.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(structure, [a + b for a, b in zip(leaves, noise, strict=True)])


@pytest.fixture(scope="module")
def batch():
    """Inputs of different lengths, and targets for the same rows."""
    rng = np.random.default_rng(0)
    inputs_BS = rng.integers(3, 12, (B, S)).astype(np.int32)
    inputs_BS[1, 4:] = 0
    targets_BL = rng.integers(3, 12, (B, L)).astype(np.int32)
    return {
        "encoder_input_tokens": jnp.asarray(inputs_BS),
        "decoder_target_tokens": jnp.asarray(targets_BL),
        "decoder_input_tokens": jnp.asarray(np.pad(targets_BL, ((0, 0), (1, 0)))[:, :-1]),
        "decoder_loss_weights": jnp.ones((B, L)),
    }


@pytest.fixture(scope="module")
def prefix_batch():
    """Rows of a decoder-only model: prefixes of 0, 2 and 4 tokens, then targets."""
    rng = np.random.default_rng(1)
    length, prefixes = 9, np.asarray([0, 2, 4])
    targets_BL = rng.integers(3, 12, (B, length)).astype(np.int32)
    return {
        "decoder_target_tokens": jnp.asarray(targets_BL),
        "decoder_input_tokens": jnp.asarray(np.pad(targets_BL, ((0, 0), (1, 0)))[:, :-1]),
        "decoder_causal_attention": jnp.asarray(np.arange(length) <= prefixes[:, None]).astype(jnp.int32),
        "decoder_loss_weights": jnp.ones((B, length)),
    }, prefixes


@functools.cache
def step_of(config):
    return jax.jit(build(config)[0].decode)


@pytest.mark.parametrize("scan", [False, True])
def test_one_token_at_a_time_equals_all_at_once(batch, scan):
    config = dataclasses.replace(T5, scan_layers=scan)
    model, params = build(config)
    logits_BLV = jax.jit(model.apply)(params, batch).logits_BLV
    cache = model.start(params, model.encode(params, batch), max_length=L)
    np.testing.assert_array_equal(cache["first_B"], 0)
    for i in range(L):
        logits_BV, cache = step_of(config)(params, cache, batch["decoder_input_tokens"][:, i])
        np.testing.assert_allclose(logits_BV, logits_BLV[:, i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_decoding_after_a_prefix_equals_all_at_once(prefix_batch, scan, bidirectional):
    batch, prefixes = prefix_batch
    config = dataclasses.replace(DECODER_ONLY, scan_layers=scan, inputs_bidirectional_attention=bidirectional)
    model, params = build(config)
    logits_BLV = jax.jit(model.apply)(params, batch).logits_BLV
    cache = model.start(params, jax.jit(model.encode)(params, batch), max_length=5)
    rows = np.arange(B)
    for i in range(5):
        fed_B = batch["decoder_input_tokens"][rows, prefixes + i]
        if i == 0:
            np.testing.assert_array_equal(cache["first_B"], fed_B)
        logits_BV, cache = step_of(config)(params, cache, fed_B)
        np.testing.assert_allclose(logits_BV, logits_BLV[rows, prefixes + i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [T5, DECODER_ONLY], ids=["t5", "decoder_only"])
def test_beams_share_their_source(config, batch, prefix_batch):
    """A cache of B * N rows gives each row what a cache of its own would; reordering moves own entries only."""
    model, params = build(config)
    batch = batch if config is T5 else prefix_batch[0]
    encoding = model.encode(params, batch)
    beams = model.start(params, encoding, max_length=4, num_beams=2)
    tokens = jnp.asarray([3, 4, 5, 6, 7, 8])
    _, beams = step_of(config)(params, beams, tokens)
    picked = jnp.asarray([1, 1, 2, 3, 5, 4])
    beams = model.reorder(beams, picked)
    shared = [own["source"] for own in beams["decoders"]] if config is T5 else beams["prefix"]
    assert shared and all(leaf.shape[0] == B for leaf in jax.tree.leaves(shared))
    logits, _ = step_of(config)(params, beams, tokens)
    for beam in (0, 1):
        rows = jnp.arange(B) * 2 + beam
        single = model.start(params, encoding, max_length=4)
        _, single = step_of(config)(params, single, tokens[picked[rows]])
        alone, _ = step_of(config)(params, single, tokens[rows])
        np.testing.assert_allclose(logits[rows], alone, rtol=1e-4, atol=1e-5)


def best_sequences(model, params, batch, *, length, alpha):
    """Score every finished sequence of up to `length` tokens of row 0, and every unfinished one of that length."""
    row = {name: array[:1] for name, array in batch.items()}
    vocabulary = range(model.config.vocab_size)
    finished = []
    for n in range(1, length + 1):
        others = [token for token in vocabulary if token != 1]
        finished += [(*stem, 1) + (0,) * (length - n) for stem in itertools.product(others, repeat=n - 1)]
    targets_BL = np.asarray(finished, np.int32)
    many = {
        "encoder_input_tokens": jnp.tile(row["encoder_input_tokens"], (len(targets_BL), 1)),
        "decoder_target_tokens": jnp.asarray(np.maximum(targets_BL, 2)),  # 0 is padding in a mask: keep all
        "decoder_input_tokens": jnp.asarray(np.pad(targets_BL, ((0, 0), (1, 0)))[:, :-1]),
    }
    logprobs = jax.nn.log_softmax(jax.jit(model.apply)(params, many).logits_BLV)
    weights_BL = np.cumsum(np.pad(targets_BL, ((0, 0), (1, 0)))[:, :-1] == 1, axis=1) == 0
    picked = np.take_along_axis(np.asarray(logprobs), targets_BL[..., None], -1)[..., 0]
    scores = (picked * weights_BL).sum(1) / ((5 + weights_BL.sum(1)) / 6) ** alpha
    order = np.argsort(-scores)
    return targets_BL[order], scores[order]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_sequences(batch, alpha):
    model, params = build(T5)
    length, num_beams = 3, 144
    expected_tokens, expected_scores = best_sequences(model, params, batch, length=length, alpha=alpha)
    search = functools.partial(
        decode.beam_search, model, max_length=length, num_beams=num_beams, normaliser=decode.t5x_length(alpha)
    )
    found = jax.jit(search)(params, batch)
    np.testing.assert_array_equal(found.tokens[0, :5], expected_tokens[:5])
    np.testing.assert_allclose(found.scores[0, :5], expected_scores[:5], rtol=1e-4)
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_one_beam_is_greedy(batch):
    model, params = build(T5)
    greedy = jax.jit(functools.partial(decode.greedy, model, max_length=L))(params, batch)
    beam = jax.jit(
        functools.partial(
            decode.beam_search, model, max_length=L, num_beams=1, normaliser=decode.t5x_length(0.0)
        )
    )(params, batch)
    ended = np.asarray((greedy.tokens == 1).any(1))
    tokens, scores = np.asarray(beam.tokens[:, 0]), np.asarray(beam.scores[:, 0])
    np.testing.assert_array_equal(
        tokens[~ended], greedy.tokens[~ended]
    )  # a finished beam may be a shorter one
    np.testing.assert_allclose(scores[~ended], greedy.scores[~ended], rtol=1e-5)
    assert (scores >= greedy.scores - 1e-5).all()


@pytest.mark.parametrize("config", [T5, DECODER_ONLY], ids=["t5", "decoder_only"])
def test_greedy_takes_the_likeliest_tokens_and_scores_them(config, batch, prefix_batch):
    model, params = build(config)
    batch, prefixes = (batch, np.zeros(B, int)) if config is T5 else prefix_batch
    found = jax.jit(functools.partial(decode.greedy, model, max_length=L))(params, batch)
    # The full forward pass over what was decoded must agree with every choice.
    rows, width = np.arange(B)[:, None], int(prefixes.max()) + L
    targets = np.full((B, width), 2, np.int32)
    if config is not T5:
        targets[:, : batch["decoder_target_tokens"].shape[1]] = batch["decoder_target_tokens"][:, :width]
    columns = prefixes[:, None] + np.arange(L)
    targets[rows, columns] = found.tokens
    full = dict(batch, decoder_target_tokens=jnp.asarray(np.maximum(targets, 2)))
    full["decoder_input_tokens"] = jnp.asarray(np.pad(targets, ((0, 0), (1, 0)))[:, :-1])
    if config is not T5:
        full["decoder_causal_attention"] = jnp.asarray(np.arange(width) <= prefixes[:, None]).astype(
            jnp.int32
        )
    logprobs = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)(params, full).logits_BLV))[rows, columns]
    alive = np.cumsum(np.pad(np.asarray(found.tokens) == 1, ((0, 0), (1, 0)))[:, :-1], axis=1) == 0
    np.testing.assert_array_equal(found.tokens, np.where(alive, logprobs.argmax(-1), 0))
    np.testing.assert_allclose(found.scores, (logprobs.max(-1) * alive).sum(1), rtol=1e-4)


def test_nothing_follows_the_end(batch):
    model, params = build(T5)
    ending = int(jax.jit(functools.partial(decode.greedy, model, max_length=1))(params, batch).tokens[0, 0])
    found = jax.jit(functools.partial(decode.greedy, model, max_length=L, eos_id=ending))(params, batch)
    np.testing.assert_array_equal(found.tokens[0], [ending] + [0] * (L - 1))


def test_sampling_follows_the_distribution_and_the_key(batch):
    model, params = build(T5)
    row = {name: jnp.tile(array[:1], (4000, 1)) for name, array in batch.items()}
    sample = jax.jit(functools.partial(decode.sample, model, max_length=1))
    first = sample(params, row, key=jax.random.key(0))
    logits_V = model.apply(params, {name: array[:1] for name, array in batch.items()}).logits_BLV[0, 0]
    expected_V = np.asarray(jax.nn.softmax(logits_V))
    frequency_V = np.bincount(np.asarray(first.tokens[:, 0]), minlength=12) / 4000
    assert np.abs(frequency_V - expected_V).max() < 4 * np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(first.scores, np.log(expected_V)[np.asarray(first.tokens[:, 0])], rtol=1e-4)
    np.testing.assert_array_equal(first.tokens, sample(params, row, key=jax.random.key(0)).tokens)
    assert (first.tokens != sample(params, row, key=jax.random.key(1)).tokens).any()


def test_a_rows_sample_depends_on_its_place_alone(batch):
    model, params = build(T5)
    sample = functools.partial(decode.sample, model, max_length=L, key=jax.random.key(3))
    all_rows = jax.jit(sample)(params, batch)
    fewer = jax.jit(sample)(params, {name: array[:2] for name, array in batch.items()})
    np.testing.assert_array_equal(all_rows.tokens[:2], fewer.tokens)


def test_cold_or_narrow_sampling_is_greedy(batch):
    model, params = build(T5)
    greedy = jax.jit(functools.partial(decode.greedy, model, max_length=L))(params, batch)
    for narrow in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        sample = functools.partial(decode.sample, model, max_length=L, key=jax.random.key(0), **narrow)
        np.testing.assert_array_equal(jax.jit(sample)(params, batch).tokens, greedy.tokens)


def test_cuts_keep_the_right_tokens():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    keep = lambda **cuts: np.isfinite(decode.cut(logits, **cuts))[0].tolist()  # noqa: E731
    assert keep(top_k=2) == [False, True, False, True]
    assert keep(top_p=0.39) == [False, True, False, False]
    assert keep(top_p=0.41) == [False, True, False, True]
    assert keep(top_p=0.95) == [True, True, True, True]
    assert keep(top_k=2, top_p=0.5) == [False, True, False, False]  # 0.4 of the 0.7 left
    assert keep() == keep(top_k=4) == keep(top_p=1.0) == [True] * 4


def test_score_is_the_sum_of_target_log_probabilities(batch):
    model, params = build(T5)
    logprobs = jax.nn.log_softmax(jax.jit(model.apply)(params, batch).logits_BLV)
    expected = np.take_along_axis(logprobs, batch["decoder_target_tokens"][..., None], -1)[..., 0].sum(1)
    np.testing.assert_allclose(
        jax.jit(functools.partial(decode.score, model))(params, batch), expected, rtol=1e-5
    )


def test_task_ids_reach_the_decoded_positions(batch):
    model, params = build(T5)
    task_ids_BS = jnp.where(batch["encoder_input_tokens"] > 0, jnp.asarray([[4], [5], [6]]), -1)
    encoding = model.encode(params, dict(batch, encoder_task_ids=task_ids_BS))
    cache = model.start(params, encoding, max_length=2, num_beams=2)
    np.testing.assert_array_equal(cache["task_ids"], [[4], [5], [6]])
    assert step_of(T5)(params, cache, jnp.zeros(6, jnp.int32))[0].shape == (6, 12)


@pytest.mark.parametrize("vocab_size", [1100, 1024])
def test_the_likeliest_of_blocks_are_the_likeliest_of_all(vocab_size):
    logits_BV = np.random.default_rng(0).integers(0, 30, (5, vocab_size)).astype(np.float32)  # many equals
    logits_BV[0] = -np.inf
    logits_BV[0, 7] = -1e9
    for found, wanted in zip(
        decode.likeliest(logits_BV, 8, block=16), jax.lax.top_k(logits_BV, 8), strict=True
    ):
        np.testing.assert_array_equal(found[1:], wanted[1:])
    assert decode.likeliest(logits_BV, 1, block=16)[1][0, 0] == 7


def test_wrong_arguments_are_errors(batch):
    model, params = build(T5)
    for wrong in ({"temperature": 0.0}, {"top_k": -1}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            decode.sample(model, params, batch, key=jax.random.key(0), max_length=2, **wrong)
    with pytest.raises(ValueError, match="num_beams"):
        decode.beam_search(model, params, batch, max_length=2, num_beams=0)
    model, params = build(DECODER_ONLY)
    with pytest.raises(ValueError, match="decoder_causal_attention"):
        decode.greedy(model, params, batch, max_length=2)


def test_scanned_layers_decode_alike(batch):
    model, params = build(T5)
    scanned = t5.t5(dataclasses.replace(T5, scan_layers=True))
    search = lambda model: jax.jit(functools.partial(decode.beam_search, model, max_length=L, num_beams=3))  # noqa: E731
    found, expected = search(scanned)(functional.stack_layers(params), batch), search(model)(params, batch)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
