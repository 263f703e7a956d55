"""Several decoders over one encoder: each task's tokens are those of a model that has its decoder alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import decode, optim, program
from mtjax.models import t5

ONE = t5.T5Config(
    vocab_size=24,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
TASKS = np.array([[0] * 4 + [2] * 3 + [-1] * 2, [1] * 5 + [0] * 4])
SEGMENTS = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 5 + [2] * 4])
DECODER_OF_TASK = (1, 0, 2)


@functools.cache
def build(tied):
    config = dataclasses.replace(ONE, decoder_of_task=DECODER_OF_TASK, logits_via_embedding=tied)
    model = t5.t5(config)
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    noisy = [x + 0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return model, jax.tree.unflatten(structure, noisy)


def alone(params, i):
    """Return the parameters of the model with decoder i alone."""
    name = "decoder" if i == 0 else f"decoder_{i}"
    return {"token_embedder": params["token_embedder"], "encoder": params["encoder"], "decoder": params[name]}


def packed_batch():
    rng = np.random.default_rng(1)
    targets = np.where(SEGMENTS > 0, rng.integers(3, 24, SEGMENTS.shape), 0)
    batch = {
        "encoder_input_tokens": np.where(SEGMENTS > 0, rng.integers(3, 24, SEGMENTS.shape), 0),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    for side in ("encoder", "decoder"):
        batch |= {f"{side}_segment_ids": SEGMENTS, f"{side}_task_ids": TASKS}
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    return batch | {"decoder_loss_weights": (batch["decoder_segment_ids"] > 0).astype(jnp.float32)}


@pytest.mark.parametrize("tied", [False, True])
def test_packed_rows_equal_separate_models(tied):
    model, params = build(tied)
    separate = t5.t5(dataclasses.replace(ONE, logits_via_embedding=tied))
    batch = packed_batch()
    logits_BLV = jax.jit(model.apply)(params, batch).logits_BLV
    apply = jax.jit(separate.apply)
    each = [apply(alone(params, i), batch).logits_BLV for i in range(3)]
    for task, i in ((0, 1), (1, 0), (2, 2), (-1, 0)):  # a task never seen has decoder 0
        where = task == TASKS
        np.testing.assert_allclose(logits_BLV[where], each[i][where], rtol=1e-5, atol=1e-5)
    assert not np.allclose(each[0], each[1], atol=0.1)


def test_a_decoder_learns_from_its_own_tasks_alone():
    model, params = build(False)
    batch = packed_batch()

    def loss(params, task):
        logits_BLV = model.apply(params, batch).logits_BLV
        return (logits_BLV.std(-1) * (batch["decoder_task_ids"] == task)).sum()

    gradient = jax.jit(jax.grad(loss))(params, 0)  # of decoder 1
    moved = {
        name: any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(part)) for name, part in gradient.items()
    }
    assert moved == {
        "token_embedder": True,
        "encoder": True,
        "decoder": False,
        "decoder_1": True,
        "decoder_2": False,
    }


def test_each_row_is_decoded_by_its_tasks_decoder():
    model, params = build(False)
    separate = t5.t5(ONE)
    inputs = jnp.asarray(np.random.default_rng(2).integers(3, 24, (3, 6)), jnp.int32)
    batch = {"encoder_input_tokens": inputs, "encoder_task_ids": jnp.arange(3)[:, None].repeat(6, 1)}
    beams = functools.partial(decode.beam_search, num_beams=2, max_length=4)
    found = jax.jit(functools.partial(beams, model))(params, batch)
    search = jax.jit(functools.partial(beams, separate))
    for row, i in enumerate(DECODER_OF_TASK):
        wanted = search(alone(params, i), batch)
        np.testing.assert_array_equal(found.tokens[row], wanted.tokens[row])
        np.testing.assert_allclose(found.scores[row], wanted.scores[row], rtol=1e-5)


def test_what_does_not_fit_is_an_error():
    model, params = build(False)
    batch = packed_batch()
    del batch["decoder_task_ids"]
    with pytest.raises(ValueError, match="Several decoders need the batch's task ids"):
        jax.eval_shape(model.apply, params, batch)
    with pytest.raises(ValueError, match=r"decoder_of_task=\(0, 2\) must name"):
        dataclasses.replace(ONE, decoder_of_task=(0, 2))
    run = program.program(
        model=model,
        optimizer=optim.adafactor(1e-3),
        tasks=program.TaskTable(("a", "b"), ("f", "f")),
        batch_size=8,
    )
    rows = {name: jnp.concatenate([x] * 4) for name, x in packed_batch().items()}
    with pytest.raises(ValueError, match="names the decoders of 3 tasks, the run has 2"):
        run.step.lower(run.abstract, rows)
