"""From the same parameters, T5X's outputs: logits, losses, scores, greedy and beam tokens, gradients."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import decode, losses, tree
from mtjax.models import decoder_only, functional, t5
from mtjax.types import Model, Params

GOLDEN = pathlib.Path(__file__).parent / "golden" / "t5x"
ENCODER_DECODERS = ("t5_1_1", "t5_1_0_tied", "t5_1_1_bf16", "t5_1_1_factored")
DECODER_ONLY_CASES = ("causal_lm", "prefix_lm", "prefix_features_causal_attention", "prefix_lm_packed")
NETWORKS = [*((name, False) for name in ENCODER_DECODERS), ("t5_1_1", True)]
CASES = [
    (name, case, False)
    for name in ("decoder_only_tied", "decoder_only_untied")
    for case in DECODER_ONLY_CASES
]
CASES.append(("decoder_only_tied", "prefix_lm", True))


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def load(name: str) -> tuple[dict, Params, dict[str, np.ndarray]]:
    """Return a golden folder's (config, parameters, expected arrays)."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    config["mlp_activations"] = tuple(config["mlp_activations"])
    with np.load(GOLDEN / name / "params.npz") as leaves:
        params = tree.unflatten({path: jnp.asarray(leaves[path]) for path in leaves})
    with np.load(GOLDEN / name / "expected.npz") as expected:
        return config, params, {key: expected[key] for key in expected}


def inputs(expected: dict[str, np.ndarray], prefix: str) -> dict[str, jax.Array]:
    return {k.removeprefix(prefix): jnp.asarray(v) for k, v in expected.items() if k.startswith(prefix)}


def encoder_decoder(name: str, *, scan: bool) -> tuple[Model, Params, dict[str, np.ndarray]]:
    config, params, expected = load(name)
    model = t5.t5(t5.T5Config(**config, scan_layers=scan))
    return model, functional.stack_layers(params) if scan else params, expected


def sums(model: Model, params: Params, batch: dict[str, jax.Array]) -> losses.TaskSums:
    hidden_BLD = model.features(params, batch).hidden_BLD
    logits_of = functools.partial(model.logits, params)
    return losses.task_sums(logits_of, hidden_BLD, batch, num_tasks=1, config=losses.LossConfig())[1]


@pytest.mark.parametrize(("name", "scan"), NETWORKS)
def test_encoder_decoder_computes_t5x_outputs(name: str, scan: bool) -> None:
    model, params, expected = encoder_decoder(name, scan=scan)
    assert not tree.difference(jax.eval_shape(model.init, jax.random.key(0)), params)
    batch = inputs(expected, "in/")
    is_target = np.asarray(batch["decoder_target_tokens"]) > 0
    is_input = np.asarray(batch["encoder_input_tokens"]) > 0

    @jax.jit
    def outputs(params: Params, batch: dict) -> tuple:
        logits_BLV = model.apply(params, batch).logits_BLV
        encoded_BSD = model.encode(params, batch)["encoded"]
        return logits_BLV, encoded_BSD, sums(model, params, batch), decode.score(model, params, batch)

    logits_BLV, encoded_BSD, totals, score_B = outputs(params, batch)
    np.testing.assert_allclose(logits_BLV[is_target], expected["logits"][is_target], atol=1e-4)
    np.testing.assert_allclose(encoded_BSD[is_input], expected["encoded"][is_input], atol=1e-4)
    np.testing.assert_allclose(totals.loss_T, expected["loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(totals.z_loss_T, expected["z_loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(score_B, expected["score_batch"], rtol=1e-5)
    assert totals.tokens_T == is_target.sum()

    packed = inputs(expected, "packed_in/")
    is_target = np.asarray(packed["decoder_target_tokens"]) > 0
    logits_BLV = jax.jit(model.apply)(params, packed).logits_BLV
    np.testing.assert_allclose(logits_BLV[is_target], expected["packed_logits"][is_target], atol=1e-4)


@pytest.mark.parametrize(("name", "scan"), NETWORKS)
def test_encoder_decoder_decodes_t5x_tokens(name: str, scan: bool) -> None:
    model, params, expected = encoder_decoder(name, scan=scan)
    batch = inputs(expected, "in/")
    greedy = jax.jit(functools.partial(decode.greedy, model, max_length=12))(params, batch)
    np.testing.assert_array_equal(greedy.tokens, expected["greedy_tokens"])
    beams = jax.jit(functools.partial(decode.beam_search, model, max_length=12, num_beams=4))(params, batch)
    np.testing.assert_array_equal(beams.tokens, expected["beam4_tokens"][:, ::-1])  # T5X: best beam last
    np.testing.assert_allclose(beams.scores, expected["beam4_scores"][:, ::-1], rtol=1e-5)


@pytest.mark.parametrize(("name", "case", "scan"), CASES)
def test_decoder_only_computes_t5x_outputs_and_gradients(name: str, case: str, scan: bool) -> None:
    config, params, expected = load(name)
    model = decoder_only.decoder_only(
        decoder_only.DecoderOnlyConfig(
            **config,
            scan_layers=scan,
            inputs_bidirectional_attention=case != "prefix_features_causal_attention",
        )
    )
    params = functional.stack_layers(params) if scan else params
    assert not tree.difference(jax.eval_shape(model.init, jax.random.key(0)), params)
    batch = inputs(expected, f"{case}/in/")
    is_target = np.asarray(batch["decoder_target_tokens"]) > 0

    def loss(params: Params) -> tuple[jax.Array, tuple]:
        logits_BLV = model.apply(params, batch).logits_BLV
        config = losses.LossConfig()
        _, totals = losses.task_sums(lambda logits: logits, logits_BLV, batch, num_tasks=1, config=config)
        return totals.loss_T, (totals, logits_BLV)

    gradient, (totals, logits_BLV) = jax.jit(jax.grad(loss, has_aux=True))(params)
    score_B = losses.sequence_logprobs(
        logits_BLV, batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    )
    np.testing.assert_allclose(logits_BLV[is_target], expected[f"{case}/logits"][is_target], atol=1e-4)
    np.testing.assert_allclose(totals.loss_T, expected[f"{case}/loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(totals.z_loss_T, expected[f"{case}/z_loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(score_B, expected[f"{case}/score_batch"], rtol=1e-5)
    leaves = tree.flatten(functional.unstack_layers(gradient))
    rms = [np.sqrt(np.mean(np.square(leaves[path]))) for path in expected["gradient_leaf_order"]]
    np.testing.assert_allclose(rms, expected[f"{case}/gradient_rms"], rtol=1e-5)

    if f"{case}/greedy_tokens" in expected:
        greedy = jax.jit(functools.partial(decode.greedy, model, max_length=40))(params, batch)
        wanted_BL = expected[f"{case}/greedy_tokens"]
        for row, prefix in enumerate(np.asarray(batch["decoder_causal_attention"]).sum(1) - 1):
            room = wanted_BL.shape[1] - prefix  # T5X's rows end at prefix + output = 40 tokens
            np.testing.assert_array_equal(greedy.tokens[row, :room], wanted_BL[row, :room])
