"""Conversion: outputs of the original, round trips bit for bit, and errors that name the tensor and the file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mtjax import checkpoint, convert, decode, losses, optim, train, tree
from mtjax.convert import huggingface
from mtjax.data import pipeline, vocabulary
from mtjax.launch import main
from mtjax.models import t5
from tests import small_cache

GOLDEN = pathlib.Path(__file__).parent / "golden"
HUGGINGFACE = GOLDEN / "huggingface"
NAMES = ("t5_v1_0", "t5_v1_1", "mt5", "umt5", "byt5_like")


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def run_model(weights, batch):
    """Return the model and its parameters, float32, and the logits of a batch."""
    model = t5.t5(weights.config)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), tree.unflatten(weights.leaves))
    return model, params, jax.jit(model.apply)(params, batch).logits_BLV


def expected_of(name):
    """Return transformers' outputs, and its batch under our names; decoder padding is visible there."""
    expected = dict(np.load(HUGGINGFACE / name / "expected.npz"))
    batch = {
        "encoder_input_tokens": expected["input_ids"] * expected["attention_mask"],
        "decoder_input_tokens": expected["decoder_input_ids"],
        "decoder_target_tokens": np.maximum(expected["labels"], 1),
    }
    return expected, {feature: jnp.asarray(x, jnp.int32) for feature, x in batch.items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.shape == b[name].shape, name
        assert np.asarray(x).tobytes() == np.asarray(b[name]).tobytes(), name


# --- Hugging Face -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_hugging_face_model_gives_its_logits_loss_and_greedy_tokens(name):
    expected, batch = expected_of(name)
    model, params, logits_BLV = run_model(huggingface.read(HUGGINGFACE / name), batch)
    np.testing.assert_allclose(logits_BLV, expected["logits"], atol=1e-4)
    weights_BL = jnp.asarray(expected["labels"] >= 0, jnp.float32)
    scores_B = losses.sequence_logprobs(logits_BLV, batch["decoder_target_tokens"], weights_BL)
    np.testing.assert_allclose(scores_B, expected["target_logprob_sum"], rtol=1e-5)
    np.testing.assert_allclose(-scores_B.sum() / weights_BL.sum(), expected["loss"], rtol=1e-5)
    greedy = decode.greedy(model, params, batch, max_length=16)
    np.testing.assert_array_equal(greedy.tokens, expected["greedy_sequences"][:, 1:])


@pytest.mark.parametrize("name", NAMES)
def test_a_hugging_face_model_searches_beams_as_there(name):
    expected, batch = expected_of(name)
    weights = huggingface.read(HUGGINGFACE / name)
    assert weights.decoding == {"normaliser": "huggingface", "stopping": "huggingface", "alpha": 1.0}
    model = t5.t5(weights.config)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree.unflatten(weights.leaves))

    @jax.jit
    def search(alpha):
        normaliser, stopping = decode.huggingface_length(alpha), decode.huggingface_stopping()
        return decode.beam_search(
            model, params, batch, max_length=16, normaliser=normaliser, stopping=stopping
        )

    for case, alpha in [("beam4", 1.0), ("beam4_lp06", 0.6)]:
        found, wanted = search(alpha), expected[f"{case}_sequences"][..., 1:]
        has_ended = np.cumsum(wanted == 1, axis=-1) - (wanted == 1) > 0
        wanted = np.where(has_ended, 0, wanted)  # transformers fills up with EOS where padding is 0
        np.testing.assert_array_equal(found.tokens[..., : wanted.shape[-1]], wanted)
        np.testing.assert_allclose(found.scores, expected[f"{case}_scores"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through", ["folder", "model directory", "shards", "stacked layers"])
def test_a_hugging_face_folder_comes_back_bit_for_bit(name, through, tmp_path):
    weights = huggingface.read(HUGGINGFACE / name)
    if through in ("model directory", "stacked layers"):
        config = dataclasses.replace(weights.config, scan_layers=through == "stacked layers")
        convert.write_model_directory(weights._replace(config=config), tmp_path / "ours")
        weights = convert.read_model_directory(tmp_path / "ours")
        assert weights.config == config
    out = tmp_path / "out"
    out.mkdir()
    huggingface.write(weights, out, max_shard_bytes=200_000 if through == "shards" else 10**9)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (through == "shards")
    tensors = {k: x for file in files for k, x in safetensors.numpy.load_file(file).items()}
    same_bits(tensors, safetensors.numpy.load_file(HUGGINGFACE / name / "model.safetensors"))
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (HUGGINGFACE / name, out))
    assert {key: ours[key] for key in theirs} == theirs
    same_bits(dict(huggingface.read(out).leaves), dict(huggingface.read(HUGGINGFACE / name).leaves))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_decide_whether_logits_are_tied(name, tmp_path):
    folder = shutil.copytree(HUGGINGFACE / name, tmp_path / name)
    shutil.move(folder / "config_transformers_5.json", folder / "config.json")  # calls untied models tied
    assert huggingface.read(folder).config == huggingface.read(HUGGINGFACE / name).config


def rewritten(tmp_path, name, change_tensors=lambda tensors: None, **config):
    """Copy a folder with changed tensors and configuration."""
    folder = tmp_path / name
    folder.mkdir()
    tensors = safetensors.numpy.load_file(HUGGINGFACE / name / "model.safetensors")
    change_tensors(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    theirs = json.loads((HUGGINGFACE / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(theirs | config))
    return folder


HEAD = "lm_head.weight"
BAD = [
    (
        lambda t: t.pop("decoder.block.1.layer.2.DenseReluDense.wo.weight"),
        {},
        r"missing.*block\.1.*wo\.weight",
    ),
    (lambda t: t.update(extra=np.zeros(2, np.float32)), {}, "surplus.*extra"),
    (
        lambda t: t.update({HEAD: t[HEAD][:, :8].copy()}),
        {},
        r"logits_dense/kernel expected \(64, 384\), found \(8,",
    ),
    (lambda t: None, {"d_ff": 95}, r"mlp/wi_0/kernel expected \(64, 95\), found \(64, 96\)"),
    (lambda t: None, {"vocab_size": 400}, r"vocab_size 400.*shared\.weight.*\(384, 64\)"),
    (lambda t: None, {"model_type": "mt6"}, "model_type.*mt6.*Did you mean.*mt5"),
    (lambda t: None, {"model_type": "bart"}, r"bart.*Known: .*mt5, .*t5, umt5"),
    (lambda t: None, {"feed_forward_proj": "gelu"}, "feed_forward_proj.*gelu"),
    (lambda t: None, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon"),
]


@pytest.mark.parametrize(("change", "config", "message"), BAD)
def test_what_does_not_fit_is_named(change, config, message, tmp_path):
    folder = rewritten(tmp_path, "t5_v1_1", change, **config)
    with pytest.raises(ValueError, match=message) as error:
        huggingface.read(folder)
    assert str(folder) in str(error.value)


def test_a_lost_output_matrix_is_not_taken_for_a_tied_one(tmp_path):
    folder = rewritten(tmp_path, "t5_v1_1", lambda t: t.pop(HEAD))
    with pytest.raises(ValueError, match=r"missing \['lm_head\.weight'\]"):
        huggingface.read(folder)


def test_a_lost_shard_is_named(tmp_path):
    huggingface.write(huggingface.read(HUGGINGFACE / "t5_v1_1"), tmp_path, max_shard_bytes=300_000)
    lost = sorted(tmp_path.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name}.*is missing"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize("flag", ["--average=0", "--kv_heads=0", "--activation=relu", "--scan_layers=true"])
def test_flags_without_use_are_refused(flag, tmp_path, capsys):
    formats = ["--to=t5x:" if "scan" in flag else "--to=", f"--from=hf:{HUGGINGFACE / 't5_v1_1'}"]
    assert main.main(["convert", formats[1], f"{formats[0]}{tmp_path / 'out'}", flag]) == 2
    assert flag.partition("=")[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_named_and_the_target_left_alone(tmp_path, capsys):
    folder = shutil.copytree(HUGGINGFACE / "t5_v1_0", tmp_path / "source")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert main.main(["convert", f"--from=hf:{folder}", f"--to={tmp_path / 'target'}"]) == 2
    assert str(file) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_target_is_refused(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert main.main(["convert", f"--from=hf:{HUGGINGFACE / 'umt5'}", f"--to={tmp_path}"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


# --- On the way -------------------------------------------------------------------------------------------


def test_a_padded_vocabulary_leaves_the_other_logits_alone():
    expected, batch = expected_of("t5_v1_1")
    weights = convert.pad_vocabulary(huggingface.read(HUGGINGFACE / "t5_v1_1"), 256)
    assert weights.config.vocab_size == 512
    logits_BLV = np.asarray(run_model(weights, batch)[2])
    np.testing.assert_allclose(logits_BLV[..., :384], expected["logits"], atol=1e-4)
    padding_BLV = np.repeat(logits_BLV[..., :1], 128, axis=-1)  # a zero row would beat negative logits
    np.testing.assert_allclose(logits_BLV[..., 384:], padding_BLV, atol=1e-5)


def test_average_is_the_mean_and_cast_rounds():
    first = huggingface.read(HUGGINGFACE / "t5_v1_0")
    second = first._replace(leaves={path: 3 * np.asarray(x) for path, x in first.leaves.items()}, step=7)
    mean = convert.average([first, second])
    path = "encoder/layers_1/mlp/wi/kernel"
    np.testing.assert_allclose(mean.leaves[path], 2 * np.asarray(first.leaves[path]), rtol=1e-6)
    assert mean.step == 7
    assert convert.cast(first, "bfloat16").leaves[path].dtype.name == "bfloat16"
    with pytest.raises(ValueError, match="configurations differ"):
        convert.average([first, huggingface.read(HUGGINGFACE / "t5_v1_1")])


def test_grouped_queries_of_equal_keys_and_values_lose_nothing(tmp_path):
    batch = expected_of("t5_v1_1")[1]
    weights = huggingface.read(HUGGINGFACE / "t5_v1_1")
    same_bits(
        {path: np.ascontiguousarray(x) for path, x in convert.group_heads(weights, 6).leaves.items()},
        {path: np.ascontiguousarray(x) for path, x in weights.leaves.items()},
    )
    grouped = convert.group_heads(weights, 2)
    kernel = np.asarray(weights.leaves["decoder/layers_0/self_attention/key/kernel"]).reshape(64, 6, 8)
    wanted = np.stack([kernel[:, :3].mean(1), kernel[:, 3:].mean(1)], 1).reshape(64, 16)
    np.testing.assert_allclose(
        grouped.leaves["decoder/layers_0/self_attention/key/kernel"], wanted, atol=1e-6
    )
    assert grouped.leaves["encoder/layers_0/attention/key/kernel"].shape == (64, 48)

    # The same model with every head's keys and values written out: same outputs, also decoding.
    leaves = {
        path: np.repeat(np.asarray(x).reshape(64, 2, 8), 3, axis=1).reshape(64, 48)
        if x.shape == (64, 16)
        else x
        for path, x in grouped.leaves.items()
    }
    model, params, logits_BLV = run_model(grouped, batch)
    whole_model, whole_params, whole_BLV = run_model(weights._replace(leaves=leaves), batch)
    np.testing.assert_allclose(logits_BLV, whole_BLV, atol=1e-4)
    tokens = [
        decode.beam_search(m, p, batch, max_length=8, num_beams=2).tokens
        for m, p in ((model, params), (whole_model, whole_params))
    ]
    np.testing.assert_array_equal(*tokens)
    cache = model.start(params, model.encode(params, batch), max_length=8)
    (of_decoder,) = cache["decoders"]
    assert {leaf.shape[1] for leaf in jax.tree.leaves((of_decoder["own"], of_decoder["source"]))} == {2}
    with pytest.raises(ValueError, match="no grouped queries"):
        huggingface.write(grouped, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"kv_heads=4 does not divide 6 heads; use one of \[1, 2, 3, 6\]"):
        convert.group_heads(weights, 4)


def test_a_converted_model_predicts_and_starts_a_finetuning(tmp_path, capsys):
    ours = tmp_path / "ours"
    source = f"hf:{HUGGINGFACE / 't5_v1_1'}"
    assert main.main(["convert", f"--from={source}", f"--to={ours}", "--vocabulary=byte:100"]) == 0
    assert main.main(["inspect", str(ours)]) == 0
    assert "converted from huggingface, t5_v1_1" in capsys.readouterr().out

    (tmp_path / "in.jsonl").write_text('{"inputs": "hello"}\n')
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    assert main.main(["infer", f"--model_dir={ours}", *files]) == 0
    assert "prediction" in json.loads((tmp_path / "out.jsonl").read_text())

    small_cache.write_task(tmp_path / "cache", "words", {"train": [([5, 6], [7, 8]), ([9], [10])]})
    weights = huggingface.read(HUGGINGFACE / "t5_v1_1")
    started = tmp_path / "run"
    train.fit(
        model_dir=str(started),
        model=t5.t5(weights.config),
        data=pipeline.TrainData("words", {"inputs": 8, "targets": 8}, 2, (str(tmp_path / "cache"),)),
        optimizer=optim.transformation("sgd", 0.0),
        train_steps=1,
        initial_checkpoint=str(ours),
    )
    shapes = tree.unflatten(checkpoint.parameter_shapes(started))
    trained = tree.flatten(jax.tree.map(np.asarray, checkpoint.restore_parameters(started, shapes)))
    same_bits(trained, {path: np.ascontiguousarray(x) for path, x in weights.leaves.items()})
    assert vocabulary.read(ours / vocabulary.FOLDER)["targets"][0].kind == "byte"
