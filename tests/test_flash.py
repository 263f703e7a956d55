"""The tiled attention kernels and cuDNN's call, against the reference; and which of them runs where."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import sharding
from mtjax.models import attention, fast_attention, flash
from mtjax.models.decoder_only import DecoderOnlyConfig, decoder_only
from mtjax.models.t5 import T5Config

# Interpreted kernels are long programs: compiling them takes longer than running them.
fast_compile = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

KINDS = ("bidirectional", "causal", "prefix", "cross")


def _inputs(
    seed, *, rows=2, heads=2, queries=24, keys=24, kind="bidirectional", packed=False, dtype="float32"
):
    """Make (query, key, value, by_distance, cotangent), the bias without them, and which queries see a key."""
    draw = np.random.default_rng(seed)
    if kind != "cross":
        keys = queries
    shapes = [(rows, heads, length, 64) for length in (queries, keys, keys, queries)]
    query, key, value, cotangent = (jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes)
    by_distance = None
    if kind != "cross":
        by_distance = jnp.asarray(draw.normal(size=(heads, queries + keys)), jnp.float32)
    segments = {}
    if packed:
        query_segments = np.sort(draw.integers(1, 4, size=(rows, queries)))
        key_segments = np.sort(draw.integers(1, 4, size=(rows, keys))) if kind == "cross" else query_segments
        segments = {
            "query_segments_BL": jnp.asarray(query_segments),
            "key_segments_BS": jnp.asarray(key_segments),
        }
    bias = attention.attention_bias(
        keys_BS=jnp.arange(keys) < draw.integers(1, keys + 1, size=(rows, 1)),
        causal=kind in ("causal", "prefix"),
        prefix_BS=jnp.asarray(draw.integers(0, 2, size=(rows, keys))) if kind == "prefix" else None,
        **segments,
    )
    sees = np.broadcast_to(bias.visible, (rows, 1, queries, keys)).any(-1)[..., None]
    return (query, key, value, by_distance, cotangent), bias, sees


def _with_gradients(mix, inputs, sees):
    """Return mix's values and the gradients of all its inputs, where queries see a key."""
    *arguments, cotangent = inputs

    def masked(*arguments):
        return jnp.where(sees, mix(*arguments), 0)

    mixed, pullback = jax.vjp(masked, *arguments)
    return mixed, pullback(cotangent)


def _reference(bias):
    def mix(query, key, value, by_distance):
        relative = None
        if by_distance is not None:
            relative = attention._skew(by_distance, query.shape[2])[None]
        return attention.mix_values(query, key, value, attention.Bias(bias.visible, relative))

    return mix


def _tiled(bias, **options):
    def mix(query, key, value, by_distance):
        token_bias = dataclasses.replace(bias.by_token, by_distance_HX=by_distance)
        return flash.flash_attention(query, key, value, token_bias, interpret=True, **options)

    return mix


def _assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(np.float32(a) / scale, np.float32(b) / scale, rtol=0, atol=tolerance)


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    kind=st.sampled_from(KINDS),
    packed=st.booleans(),
    heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    block=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 1000),
)
def test_the_kernels_are_the_reference_in_values_and_gradients(
    kind, packed, heads, queries, keys, block, seed
):
    inputs, bias, sees = _inputs(seed, heads=heads, queries=queries, keys=keys, kind=kind, packed=packed)
    expected = fast_compile(lambda: _with_gradients(_reference(bias), inputs, sees))()
    got = fast_compile(lambda: _with_gradients(_tiled(bias, block=block), inputs, sees))()
    _assert_close(got, expected, 1e-5)


def test_bfloat16_stays_near_float32():
    inputs, bias, sees = _inputs(0, kind="causal", dtype="bfloat16")
    got = fast_compile(lambda: _with_gradients(_tiled(bias, block=16), inputs, sees))()
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    expected = fast_compile(lambda: _with_gradients(_reference(bias), exact, sees))()
    assert got[0].dtype == jnp.bfloat16
    _assert_close(got, expected, 2e-2)


def test_a_query_that_sees_nothing_gets_zero_and_changes_no_gradient():
    inputs, bias, _ = _inputs(3, queries=16, packed=True)
    blind = dataclasses.replace(bias.by_token, keys_BS=jnp.full((2, 16), flash.PADDING))
    mixed, gradients = _with_gradients(_tiled(bias._replace(by_token=blind), block=8), inputs, True)
    for leaf in jax.tree.leaves((mixed, gradients)):
        np.testing.assert_array_equal(leaf, 0)


def _gradient_of_loss(config, batch):
    model = decoder_only(config)
    params = model.init(jax.random.key(0))

    def loss(params):
        logits = model.apply(params, batch, key=jax.random.key(1)).logits_BLV
        weights = batch["decoder_target_tokens"] > 0
        return (jax.nn.logsumexp(logits, -1) * weights).sum() / weights.sum()

    return fast_compile(jax.value_and_grad(loss))(params)


def test_a_model_with_dropout_has_one_loss_and_gradient(monkeypatch):
    # Each by its own code: the kernels interpreted, cuDNN's call handed to the same function's XLA body.
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 30, (2, 16)))
    batch = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": tokens.at[:, 12:].set(0),
        "decoder_segment_ids": jnp.asarray([[1] * 7 + [2] * 9, [1] * 10 + [2] * 6]),
        "decoder_causal_attention": jnp.asarray([[1] * 4 + [0] * 3 + [1] * 4 + [0] * 5] * 2),
    }
    config = DecoderOnlyConfig(32, 16, 4, 8, 32, 1, decoder_kv_heads=2, dropout_rate=0.2, attention="xla")
    expected = _gradient_of_loss(config, batch)
    assert np.any(expected[1]["decoder"]["relpos_bias"]["rel_embedding"])
    without = _gradient_of_loss(dataclasses.replace(config, dropout_rate=0.0), batch)
    assert abs(without[0] - expected[0]) > 1e-4
    monkeypatch.setattr(fast_attention, "choose", lambda name, *_, **__: name)
    tiled, called = fast_attention.pallas, fast_attention.cudnn
    monkeypatch.setattr(fast_attention, "pallas", functools.partial(tiled, interpret=True))
    monkeypatch.setattr(fast_attention, "cudnn", functools.partial(called, implementation="xla"))
    for name in ("pallas", "cudnn"):
        got = _gradient_of_loss(dataclasses.replace(config, attention=name), batch)
        _assert_close(got, expected, 1e-5)


def test_rows_and_heads_are_cut_over_a_mesh(eight_devices):
    eight_devices("""
import functools, jax, jax.numpy as jnp, numpy as np
from mtjax import sharding
from mtjax.models import fast_attention, flash
mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
draw = np.random.default_rng(0)
q, k, v, g = (jnp.asarray(draw.normal(size=(4, 4, 8, 64)), "float32") for _ in range(4))
keys = jnp.where(jnp.arange(8) < jnp.asarray([[8], [3], [5], [8]]), 0, flash.PADDING)
table = jnp.asarray(draw.normal(size=(4, 16)), "float32")
def run(q, k, v, table):
    def mix(q, k, v, table):
        bias = flash.TokenBias(keys, None, table, causal=False)
        return fast_attention.pallas(q, k, v, bias, interpret=True)
    mixed, pullback = jax.vjp(mix, q, k, v, table)
    return mixed, pullback(g)
fast_compile = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
expected = fast_compile(run)(q, k, v, table)
got = fast_compile(sharding.on_mesh(run, mesh))(q, k, v, table)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))
assert "model" in str(got[0].sharding.spec), got[0].sharding
""")


@pytest.mark.slow
def test_the_kernels_compile_for_tpus(eight_devices):
    pytest.importorskip("libtpu")
    eight_devices("""
import os
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
import jax, jax.numpy as jnp
from jax.experimental import topologies
from mtjax.models import flash
for topology, causal, biased in (("v5e:2x2", False, True), ("v5p:2x2x1", True, True), ("v4:2x2x1", False, False)):
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((1, 2, 2000, 64), jnp.bfloat16, sharding=where)
    codes = jax.ShapeDtypeStruct((1, 2000), jnp.int32, sharding=where)
    table = jax.ShapeDtypeStruct((2, 4000), jnp.float32, sharding=where)
    def run(query, key, value, codes, table, cotangent):
        def mix(*inputs):
            bias = flash.TokenBias(codes, codes, inputs[3] if biased else None, causal)
            return flash.flash_attention(*inputs[:3], bias)
        return jax.vjp(mix, query, key, value, table)[1](cotangent)
    compiled = jax.jit(run).lower(x, x, x, codes, table, x).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < 2000 * 2000 * 2, (topology, memory)  # one head's weights in bfloat16
""")


# --- Which one runs ---------------------------------------------------------------------------------------


def _query(length=1024, *, rows=2, heads=4, head_dim=64, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((rows, heads, length, head_dim), dtype)


@pytest.mark.parametrize(
    ("platform", "length", "has_relative_bias", "chosen"),
    [
        ("cpu", 1024, True, "xla"),
        ("tpu", 1024, True, "pallas"),
        ("tpu", 64, True, "xla"),
        ("tpu", 1 << 17, True, "xla"),
        ("gpu", 1024, False, "cudnn"),
        ("gpu", 1024, True, "xla"),
    ],
)
def test_auto_takes_the_fast_one_where_it_can_and_pays(
    monkeypatch, platform, length, has_relative_bias, chosen
):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(fast_attention, "capability", lambda: "9.0")
    query = _query(length)
    assert fast_attention.choose("auto", query, query, has_relative_bias=has_relative_bias) == chosen


@pytest.mark.parametrize(
    ("name", "platform", "query", "reason"),
    [
        ("pallas", "cpu", {}, "needs a TPU, this computation is for 'cpu'"),
        ("cudnn", "tpu", {}, "needs a GPU"),
        ("pallas", "tpu", {"head_dim": 48}, "do not fill blocks of 128 lanes"),
        ("pallas", "tpu", {"heads": 3}, "do not fill blocks of 128 lanes"),
        ("pallas", "tpu", {"length": 8320}, "8320 queries are more than the 8192"),
        ("cudnn", "gpu", {"dtype": "float32"}, "needs bfloat16"),
        ("cudnn", "gpu", {"length": 1023}, "even lengths, got 1023"),
        ("cudnn", "gpu", {"head_dim": 132}, "head_dim"),
    ],
)
def test_an_impossible_choice_says_why(monkeypatch, name, platform, query, reason):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(fast_attention, "capability", lambda: "9.0")
    query = _query(**query)
    with pytest.raises(ValueError, match=reason):
        fast_attention.choose(name, query, query, has_relative_bias=True)
    assert fast_attention.choose("auto", query, query, has_relative_bias=False) != name


def test_an_unknown_implementation_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'pallas'"):
        T5Config(32, 16, 2, 8, 32, 1, 1, attention="palas")


def test_cudnn_is_called_for_cuda(monkeypatch):
    # Its lowering runs without a GPU where jax is told a version of cuDNN.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    class Versions:
        cudnn_get_version = staticmethod(lambda: 91100)

    monkeypatch.setattr(fused, "cuda_versions", Versions)
    query = _query(256)
    visible, relative = (
        jax.ShapeDtypeStruct((2, 1, 1, 256), bool),
        jax.ShapeDtypeStruct((1, 4, 256, 256), "float32"),
    )

    def run(query, key, value, visible, relative):
        def mix(*inputs):
            mixed = fast_attention.cudnn(*inputs[:3], visible=visible, relative=inputs[3])
            return mixed.astype(jnp.float32).sum()

        return jax.grad(mix, argnums=(0, 1, 2, 3))(query, key, value, relative)

    traced = jax.jit(run).trace(query, query, query, visible, relative)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert '__cudnn$fmhaScaleBiasSoftmax"' in text or "@__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    of_relative = traced.out_info[3]
    assert (of_relative.shape, of_relative.dtype) == ((1, 4, 256, 256), jnp.float32)
