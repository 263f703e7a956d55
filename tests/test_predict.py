import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mtjax import decode, predict, sharding
from mtjax.models.decoder_only import DecoderOnlyConfig, decoder_only
from mtjax.models.t5 import T5Config, t5
from mtjax.predict import DecodeConfig, Example

LENGTHS = {"inputs": 80, "targets": 40}
SIZES = {"vocab_size": 50, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
MODELS = {
    "encoder_decoder": t5(T5Config(**SIZES, num_encoder_layers=1, num_decoder_layers=1)),
    "decoder_only": decoder_only(DecoderOnlyConfig(**SIZES, num_layers=1)),
}


def parameters(model):
    """Return random parameters, scaled so that predictions differ between inputs."""
    return jax.tree.map(lambda x: x * 1.5, model.init(jax.random.key(0)))


def make_examples(count, *, seed=0, longest=(60, 20)):
    rng = np.random.default_rng(seed)

    def ids(longest):
        return np.append(rng.integers(3, 50, rng.integers(1, longest)), 1).astype(np.int32)

    return [Example(ids(longest[0]), ids(longest[1]), i % 3) for i in range(count)]


@functools.cache
def predictor(architecture="encoder_decoder", *, mode="greedy", batch_size=4, **options):
    return predict.predictor(
        MODELS[architecture],
        DecodeConfig(mode=mode, **options),
        lengths=LENGTHS,
        batch_size=batch_size,
        mesh=sharding.make_mesh({"data": -1}),
        architecture=architecture,
    )


@functools.cache
def compiled(architecture):
    return jax.jit(lambda params, batch: MODELS[architecture].apply(params, batch).logits_BLV)


def naive_logits(architecture, params, inputs, targets):
    """Return float64 logits [len(targets) + 1, V] behind each beginning of `targets`, one example at a time."""
    prefix = [] if architecture == "encoder_decoder" else list(inputs)
    tokens = [*prefix, *targets]
    row = np.zeros((4, 1, 120), np.int32)
    row[0, 0, : len(inputs)] = inputs
    row[1, 0, 1 : 1 + len(tokens)] = tokens
    row[2, 0, : 1 + len(tokens)] = 1
    row[3, 0, : 1 + len(prefix)] = 1
    names = (
        "encoder_input_tokens",
        "decoder_input_tokens",
        "decoder_target_tokens",  # only tells where tokens are
        "decoder_causal_attention",
    )
    logits = compiled(architecture)(params, dict(zip(names, row, strict=True)))
    return np.asarray(logits[0, len(prefix) : 1 + len(tokens)], np.float64)


def naive_sums(architecture, params, example):
    """Score one example, token by token: (log-probability, correct, tokens)."""
    logits = naive_logits(architecture, params, example.inputs, example.targets)
    logprob = correct = 0
    for row, target in zip(logits, example.targets, strict=False):
        shifted = row - row.max()
        logprob += shifted[target] - np.log(np.exp(shifted).sum())
        correct += row.argmax() == target
    return logprob, correct, len(example.targets)


@pytest.mark.parametrize("architecture", MODELS)
def test_score_equals_naive_sums_and_keeps_the_order(architecture):
    params, examples = parameters(MODELS[architecture]), make_examples(5)
    sums = predictor(architecture, batch_size=2).score(params, examples)
    naive = np.array([naive_sums(architecture, params, example) for example in examples]).T
    np.testing.assert_allclose(sums.logprob, naive[0], rtol=2e-5)
    np.testing.assert_array_equal(sums.correct, naive[1])
    np.testing.assert_array_equal(sums.tokens, naive[2])


def test_results_do_not_depend_on_the_batch_size():
    params = parameters(MODELS["encoder_decoder"])
    examples = make_examples(5, longest=(79, 20))  # two buckets of inputs
    four, three = predictor(), predictor(batch_size=3)
    assert three.decode(params, examples) == four.decode(params, examples)
    a, b = three.score(params, examples), four.score(params, examples)
    np.testing.assert_allclose(a.logprob, b.logprob, rtol=1e-5)


@pytest.mark.parametrize("architecture", MODELS)
def test_greedy_takes_the_likeliest_next_token(architecture):
    params, example = parameters(MODELS[architecture]), make_examples(1)[0]
    (found,) = predictor(architecture, max_length=6).decode(params, [example])
    tokens = []
    while len(tokens) < 6 and 1 not in tokens:
        logits = naive_logits(architecture, params, example.inputs, tokens)
        tokens.append(int(logits[-1].argmax()))
    assert found == predict.before_eos(tokens, 1)


def test_beam_returns_the_best_hypothesis():
    model, params = MODELS["encoder_decoder"], parameters(MODELS["encoder_decoder"])
    examples = make_examples(3)
    batch = predict.pad_batch(examples, shape=(80, 40), num_rows=3, architecture="encoder_decoder")
    search = jax.jit(lambda p, b: decode.beam_search(model, p, b, max_length=10, num_beams=4))
    found = search(params, batch)
    expected = [predict.before_eos(tokens, 1) for tokens in found.tokens[:, 0]]
    assert predictor(mode="beam", max_length=10).decode(params, examples) == expected


def test_samples_follow_the_seed():
    params, examples = parameters(MODELS["encoder_decoder"]), make_examples(4)
    first = predictor(mode="sample", seed=1, max_length=8)
    drawn = first.decode(params, examples)
    assert first.decode(params, examples) == drawn
    assert first.decode(params, examples, seed=1) != drawn
    assert predictor(mode="sample", seed=2, max_length=8).decode(params, examples) != drawn


@pytest.mark.parametrize("length_normalized", [False, True])
def test_rank_equals_brute_force(length_normalized):
    params, examples = parameters(MODELS["encoder_decoder"]), make_examples(6)
    rng = np.random.default_rng(1)
    options = [
        [[*rng.integers(3, 50, rng.integers(1, 5)).tolist(), 1] for _ in range(rng.integers(1, 5))]
        for _ in examples
    ]
    found = predict.rank(
        predictor(mode="rank", batch_size=5, length_normalized=length_normalized), params, examples, options
    )
    for example, listed, best, scores in zip(examples, options, *found, strict=True):
        pairs = [example._replace(targets=np.array(option)) for option in listed]
        brute = [naive_sums("encoder_decoder", params, pair)[0] for pair in pairs]
        if length_normalized:
            brute = [score / len(option) for score, option in zip(brute, listed, strict=True)]
        np.testing.assert_allclose(scores, brute, rtol=2e-5)
        assert best == int(np.argmax(brute))


def test_rank_without_options_is_an_error():
    params, examples = parameters(MODELS["encoder_decoder"]), make_examples(2)
    with pytest.raises(ValueError, match="1 examples have no options to rank, the first one at index 1"):
        predict.rank(predictor(mode="rank"), params, examples, [[[3, 1]], []])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([5, 1, 7, 0], [5]), ([5, 0, 7, 1], [5]), ([5, 7], [5, 7]), ([1], []), ([], [])],
)
def test_a_prediction_ends_before_eos_or_padding(tokens, expected):
    assert predict.before_eos(tokens, 1) == expected


def test_compiles_once_a_shape():
    params, examples = parameters(MODELS["encoder_decoder"]), make_examples(9, longest=(79, 39))
    fresh = predictor.__wrapped__(batch_size=4)
    fresh.score(params, examples)
    shapes = {shape for _, shape in predict.plan(examples, batch_size=4, lengths=LENGTHS)}
    assert fresh.num_compilations() == len(shapes) <= 4  # inputs 64 or 80, targets 32 or 40
    fresh.score(jax.tree.map(lambda x: x + 1, params), examples[::-1])
    assert fresh.num_compilations() == len(shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "gredy"}, "Did you mean 'greedy'"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_decoding_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)


SEVERAL_DEVICES = """
import jax, numpy as np, test_predict
from mtjax import sharding
assert jax.device_count() == 4
model = test_predict.MODELS["encoder_decoder"]
params = test_predict.parameters(model)
mesh = sharding.make_mesh({"data": 2, "model": 2})
params = jax.device_put(params, sharding.parameter_shardings(mesh, sharding.PARAMETER_RULES, params))
predictor = test_predict.predict.predictor(model, lengths=test_predict.LENGTHS, batch_size=4, mesh=mesh)
examples = test_predict.make_examples(6)
sums = predictor.score(params, examples)
print(" ".join(map(repr, sums.logprob.tolist())))
print(predictor.decode(params, examples))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_devices_equal_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.path.dirname(__file__),
    }
    run = subprocess.run(
        [sys.executable, "-c", SEVERAL_DEVICES], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    logprobs, tokens = run.stdout.splitlines()
    params, examples = parameters(MODELS["encoder_decoder"]), make_examples(6)
    one = predictor()
    np.testing.assert_allclose(
        [float(x) for x in logprobs.split()], one.score(params, examples).logprob, rtol=1e-5
    )
    assert tokens == str(one.decode(params, examples))
