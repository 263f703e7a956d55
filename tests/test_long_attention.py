"""LongT5's encoder: transformers' own outputs, a dense reference, isolation of packed segments, memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mtjax import decode, losses, tree
from mtjax.convert import huggingface
from mtjax.models import attention, functional, long_attention, t5
from mtjax.types import Context

GOLDEN = pathlib.Path(__file__).parent / "golden" / "huggingface"
NAMES = ("longt5_local", "longt5_tglobal")
CONFIG = t5.T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=1,
    local_radius=3,
    global_block_size=3,
)
KINDS = ("local", "transient_global")


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def build(kind):
    config = dataclasses.replace(CONFIG, encoder_attention=kind)
    model = t5.t5(config)
    leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    noisy = [x + 0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return model, jax.tree.unflatten(structure, noisy)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_outputs(name):
    weights = huggingface.read(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert weights.config.encoder_attention == KINDS[NAMES.index(name)]
    assert weights.config.logits_via_embedding == (name == "longt5_local")
    model = t5.t5(weights.config)
    params = jax.tree.map(jnp.asarray, tree.unflatten(weights.leaves))
    batch = {
        "encoder_input_tokens": jnp.asarray(expected["input_ids"], jnp.int32),
        "decoder_input_tokens": jnp.asarray(expected["decoder_input_ids"], jnp.int32),
        "decoder_target_tokens": jnp.asarray(expected["labels"], jnp.int32),
    }
    encoded_BSD = (
        jax.jit(model.encode)(params, batch)["encoded"] * (batch["encoder_input_tokens"] > 0)[..., None]
    )
    np.testing.assert_allclose(encoded_BSD, expected["encoded"], atol=1e-4)
    logits_BLV = jax.jit(model.apply)(params, batch).logits_BLV
    np.testing.assert_allclose(logits_BLV, expected["logits"], atol=1e-4)
    loss_BL, _ = losses.token_losses(logits_BLV, batch["decoder_target_tokens"])
    np.testing.assert_allclose(loss_BL.mean(), expected["loss"], rtol=1e-5)
    greedy = decode.greedy(model, params, batch, max_length=8)
    np.testing.assert_array_equal(greedy.tokens, expected["greedy_sequences"][:, 1:])


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_comes_back_bit_for_bit(name, tmp_path):
    huggingface.write(huggingface.read(GOLDEN / name), tmp_path)
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / name)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / name))
    decided = {"tie_word_embeddings"}  # by the tensors; 5.23 always writes True
    assert {k: ours[k] for k in theirs if k not in decided} == {
        k: x for k, x in theirs.items() if k not in decided
    }


def test_a_config_of_ours_names_its_kind(tmp_path):
    weights = huggingface.read(GOLDEN / "longt5_tglobal")._replace(origin={})
    huggingface.write(weights, tmp_path)
    assert huggingface.read(tmp_path).config == weights.config
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"transient-global"', '"global"'))
    with pytest.raises(ValueError, match=r"encoder_attention_type .*'global'.*'transient-global'"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize("length", [3, 13])
def test_local_attention_is_full_attention_in_a_band(length):
    rng = jax.random.split(jax.random.key(0), 4)
    query, key, value = (jax.random.normal(k, (2, 2, length, 8)) for k in rng[:3])
    table = attention.RelativePositionBias(2, num_buckets=8, max_distance=6, bidirectional=True, key=rng[3])
    owner = type("Owner", (), {"relpos_bias": table})
    keys_BS = (jnp.arange(length) < jnp.array([[length], [max(1, length - 5)]])).astype(jnp.int32)
    segments_BS = (1 + (jnp.arange(length) >= 5))[None].repeat(2, 0)
    dense = attention.Bias(
        attention.attention_mask(keys_BS=keys_BS, query_segments_BL=segments_BS, key_segments_BS=segments_BS)
        & (abs(jnp.arange(length) - jnp.arange(length)[:, None]) <= 3)
    )
    blocks = long_attention.block_bias(keys_BS, segments_BS, radius=3)
    mix = jax.jit(lambda bias: bias.with_tables_of(owner, length).mix(query, key, value))
    wanted, got = mix(dense), mix(blocks)
    real = np.asarray(keys_BS, bool)
    np.testing.assert_allclose(
        np.moveaxis(got, 1, 2)[real], np.moveaxis(wanted, 1, 2)[real], rtol=1e-5, atol=1e-6
    )


def naive_globals(segments, size):
    """Return {token: its global token} and {global token: its segment}, counting as the paper says."""
    slots, owners = {}, {}
    for segment in [s for s in dict.fromkeys(segments) if s]:
        tokens = [i for i, s in enumerate(segments) if s == segment]
        blocks = len(tokens) // size
        first = len(owners)
        for place, token in enumerate(tokens):
            slots[token] = first + min(place // size, blocks - 1) if blocks else -1
        owners |= {first + i: segment for i in range(blocks)}
    return slots, owners


@pytest.mark.parametrize("size", [2, 5])
def test_global_tokens_are_whole_blocks_of_a_segment(size):
    rows = [[1] * 7 + [2] * 2 + [3] * 6, [1] * 2 + [2] * 9 + [0] * 4, [1] * 15, [0] * 15]
    segments_BS = jnp.array(rows)
    lay_out = functools.partial(long_attention.global_tokens, block_size=size)
    found = jax.jit(lay_out)(segments_BS > 0, segments_BS)
    for row, segments in enumerate(rows):
        slots, owners = naive_globals(segments, size)
        assert [int(x) for x in found.slots_BS[row]] == [slots.get(i, -1) for i in range(15)]
        for token, segment in enumerate(segments):
            visible = [owners.get(g) == segment and segment > 0 for g in range(15 // size)]
            np.testing.assert_array_equal(found.visible_BSG[row, token], visible)
    context = Context(task_ids=segments_BS * 10)
    x_BSD = jax.random.normal(jax.random.key(0), (4, 15, 3))
    joined, of_joined = found.add(x_BSD, lambda x: x, context)
    for row, segments in enumerate(rows):
        slots, owners = naive_globals(segments, size)
        for g, segment in owners.items():
            members = [token for token, slot in slots.items() if slot == g]
            np.testing.assert_allclose(joined[row, 15 + g], x_BSD[row, jnp.array(members)].sum(0), rtol=1e-5)
            assert of_joined.task_ids[row, 15 + g] == 10 * segment


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_separate_rows(kind):
    model, params = build(kind)
    segments = np.array([1] * 5 + [2] * 2 + [3] * 7 + [0] * 3)
    tokens = np.where(segments > 0, np.random.default_rng(0).integers(3, 40, 17), 0)
    packed = jax.jit(model.encode)(
        params,
        {
            "encoder_input_tokens": jnp.asarray(tokens[None], jnp.int32),
            "encoder_segment_ids": jnp.asarray(segments[None], jnp.int32),
        },
    )["encoded"]
    for segment in (1, 2, 3):
        alone = jnp.asarray(tokens[None, segments == segment], jnp.int32)
        encoded = jax.jit(model.encode)(params, {"encoder_input_tokens": alone})["encoded"]
        np.testing.assert_allclose(packed[:, segments == segment], encoded, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("kind", "reach"), [("local", 2 * 3), ("transient_global", 17)])
def test_what_a_token_sees(kind, reach):
    """Two layers of radius 3 reach 6 tokens; one block of globals reaches all of a segment and no other."""
    model, params = build(kind)
    segments_S = jnp.where(jnp.arange(17) < 13, 1, 2)

    def output(table):
        batch = {"encoder_input_tokens": 1 + jnp.arange(17)[None], "encoder_segment_ids": segments_S[None]}
        changed = params | {"token_embedder": {"embedding": table}}
        return (model.encode(changed, batch)["encoded"][0, 1] * jnp.arange(16)).sum()

    gradient = jax.jit(jax.grad(output))(params["token_embedder"]["embedding"])
    seen = np.linalg.norm(gradient[1:18], axis=-1) > 0
    distance = abs(np.arange(17) - 1)
    np.testing.assert_array_equal(seen, (distance <= reach) & (segments_S == 1))


def test_scan_and_remat_change_nothing():
    model, params = build("transient_global")
    scanned = t5.t5(dataclasses.replace(model.config, scan_layers=True, remat_policy="full"))
    batch = {"encoder_input_tokens": jnp.arange(1, 12)[None]}
    loss = lambda model, params: model.encode(params, batch)["encoded"].std()  # noqa: E731
    one = jax.jit(jax.grad(lambda p: loss(model, p)))(params)["encoder"]
    other = jax.jit(jax.grad(lambda p: loss(scanned, functional.stack_layers(p))))(params)["encoder"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one))


def test_memory_of_local_attention_is_linear_in_length():
    model, params = build("local")

    def largest(length):
        step = jax.grad(lambda p, b: model.encode(p, b)["encoded"].sum())
        jaxpr = jax.make_jaxpr(step)(params, {"encoder_input_tokens": jnp.ones((1, length), jnp.int32)})
        shapes = re.findall(r"\b(?:f32|i32|bool)\[([\d,]+)\]", str(jaxpr))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(4096) == 2 * largest(2048)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match=r"encoder_attention 'globl'.*transient_global"):
        build("globl")
