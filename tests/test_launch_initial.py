"""A run takes architecture, vocabulary and parameters from the checkpoint that it starts from."""

import pathlib

import jax
import numpy as np
import pytest

from mtjax import checkpoint, train, tree
from mtjax.convert import huggingface
from mtjax.launch import convert, main, prepare
from mtjax.launch import train as launch_train

HUGGINGFACE = pathlib.Path(__file__).parent / "golden" / "huggingface" / "umt5"


def configured(tmp_path, start, *flags):
    args = main.parse(
        [
            "train",
            "--gin_file=runs/finetune.gin",
            f"--gin.INITIAL_CHECKPOINT_PATH={start}",
            "--gin.MIXTURE_OR_TASK_NAME=any",
            "--gin.TRAIN_STEPS=5",
            f"--gin.MODEL_DIR={tmp_path / 'run'}",
            f"--cache_dir={tmp_path / 'cache'}",
            *flags,
        ]
    )
    return launch_train.configure(args)


def test_one_command_finetunes_a_hugging_face_folder(tmp_path):
    config = configured(tmp_path, f"hf:{HUGGINGFACE}", "--vocabulary=byte:100")
    arguments = config.arguments(train.fit, only=["model", "initial_checkpoint"])
    original = huggingface.read(HUGGINGFACE)
    model = arguments["model"].config
    assert (model.relative_bias_per_layer, model.vocab_size) == (True, original.config.vocab_size)
    assert (model.dtype, model.dropout_rate) == ("float32", 0.1)  # T5's dropout of finetuning
    shapes = jax.eval_shape(arguments["model"].init, jax.random.key(0))
    found = tree.flatten(checkpoint.restore_parameters(arguments["initial_checkpoint"], shapes))
    for path, leaf in original.leaves.items():
        np.testing.assert_array_equal(found[path], np.asarray(leaf))
    schedule = "optim.learning_rate.factors = 'constant'"
    assert schedule in config.text and "LEARNING_RATE = 0.001" in config.text

    again = configured(tmp_path, f"hf:{HUGGINGFACE}", "--vocabulary=byte:100")  # converted once
    assert again.text == config.text
    assert len(list((tmp_path / "cache" / "converted").iterdir())) == 1

    # From our own folder, without --vocabulary: the checkpoint's.
    ours = configured(tmp_path, arguments["initial_checkpoint"])
    assert ours.arguments(prepare.mixture)["vocabulary"] == "byte:100"
    assert ours.arguments(train.fit, only=["model"])["model"].config == model


def test_what_the_user_names_wins(tmp_path):
    config = configured(
        tmp_path, f"hf:{HUGGINGFACE}", "--vocabulary=byte:100", "--gin_file=models/t5_1_1_mini.gin"
    )
    found = config.arguments(train.fit, only=["model"])["model"].config
    assert (found.emb_dim, found.relative_bias_per_layer) == (
        256,
        False,
    )  # all of it: nothing of the checkpoint's


def test_a_place_far_away_is_no_format():
    assert convert.parse_place("gs://bucket/t5")[0] == "mtjax"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere.*INITIAL_CHECKPOINT_PATH=hf:"):
        configured(tmp_path, f"hf:{tmp_path / 'nowhere'}")
