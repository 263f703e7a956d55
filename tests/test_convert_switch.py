"""Switch Transformers of Hugging Face: transformers' outputs, also where tokens are dropped, and the way back."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mtjax import convert, decode, losses, tree
from mtjax.convert import huggingface
from mtjax.models import routers, t5

FOLDER = pathlib.Path(__file__).parent / "golden" / "huggingface" / "switch"


@pytest.fixture(scope="module")
def weights():
    return huggingface.read(FOLDER)


def batch_of(expected):
    batch = {
        "encoder_input_tokens": expected["input_ids"],
        "decoder_input_tokens": expected["decoder_input_ids"],
        "decoder_target_tokens": expected["labels"],
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def logits(weights, batch, **moe):
    config = dataclasses.replace(weights.config, moe=dataclasses.replace(weights.config.moe, **moe))
    model, params = t5.t5(config), tree.unflatten({k: jnp.asarray(x) for k, x in weights.leaves.items()})
    with jax.default_matmul_precision("highest"):
        return model, params, jax.jit(model.apply)(params, batch).logits_BLV


def test_it_gives_transformers_logits_loss_and_greedy_tokens(weights):
    expected = dict(np.load(FOLDER / "expected.npz"))
    batch = batch_of(expected)
    model, params, logits_BLV = logits(weights, batch)
    np.testing.assert_allclose(logits_BLV, expected["logits"], atol=1e-4)
    scores_B = losses.sequence_logprobs(
        logits_BLV, batch["decoder_target_tokens"], jnp.ones(logits_BLV.shape[:2])
    )
    np.testing.assert_allclose(-scores_B.sum() / expected["labels"].size, expected["loss"], rtol=1e-5)
    greedy = decode.greedy(model, params, batch, max_length=8)
    np.testing.assert_array_equal(greedy.tokens, expected["greedy_sequences"][:, 1:])


def test_what_is_over_capacity_is_dropped_as_transformers_does(weights):
    expected = dict(np.load(FOLDER / "expected.npz"))
    capacity, length = int(expected["small_capacity"]), expected["labels"].shape[1]
    factor = capacity * weights.config.moe.num_experts / length
    batch = batch_of(expected)
    dropping = logits(weights, batch, dispatch="capacity", eval_capacity_factor=factor)[2]
    # Padding adds no slots here, and does in transformers: the same in rows without it.
    rows = np.asarray((batch["encoder_input_tokens"] > 0).all(-1))
    assert rows.any() and not rows.all()
    np.testing.assert_allclose(dropping[rows], expected["dropping_logits"][rows], atol=1e-4)
    assert np.abs(dropping - expected["logits"])[rows].max() > 0.1


@pytest.mark.parametrize("through", ["folder", "model directory", "stacked layers", "shards"])
def test_a_folder_comes_back_bit_for_bit(weights, through, tmp_path):
    if through in ("model directory", "stacked layers"):
        config = dataclasses.replace(weights.config, scan_layers=through == "stacked layers")
        convert.write_model_directory(weights._replace(config=config), tmp_path / "ours")
        weights = convert.read_model_directory(tmp_path / "ours")
        assert weights.config == config
    out = tmp_path / "out"
    out.mkdir()
    huggingface.write(weights, out, max_shard_bytes=100_000 if through == "shards" else 10**9)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (through == "shards")
    found = {k: x for file in out.glob("*.safetensors") for k, x in safetensors.numpy.load_file(file).items()}
    wanted = safetensors.numpy.load_file(FOLDER / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].tobytes() == tensor.tobytes(), name
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, out))
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_bias": True}, "router_bias"),
        ({"dense_act_fn": "gelu"}, r"dense_act_fn in .*'gelu'. Did you mean"),
        (
            {"num_sparse_encoder_layers": 1},
            r"the layers \[1\] of 4 are sparse; only every layer, or the second",
        ),
        ({"num_sparse_decoder_layers": 2}, "other distances between sparse layers"),
        ({"num_experts": 5}, r"missing .*expert_4.*\(\d+\), surplus \[\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "switch")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        huggingface.read(folder)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"decoder_router": routers.TopK()}, r"Switch routers in encoder and decoder.*got TopK"),
        ({"decoder_router": None}, r"Switch routers in encoder and decoder.*got None"),
        ({"encoder_router": routers.Switch(gate=routers.TaskMatrix())}, "with linear gates"),
        ({"extra_mlp": True}, "no extra_mlp"),
    ],
)
def test_what_transformers_does_not_have_is_refused(weights, moe, message, tmp_path):
    config = dataclasses.replace(weights.config, moe=dataclasses.replace(weights.config.moe, **moe))
    with pytest.raises(ValueError, match=message):
        huggingface.write(weights._replace(config=config), tmp_path)
