"""An encoder with a head a task: what it pools, what its heads mean, and a run that learns to classify."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import evaluate, losses, optim, program, sharding, train
from mtjax.data import online, pipeline, vocabulary
from mtjax.models import encoder_only
from tests import small_cache

CONFIG = encoder_only.EncoderOnlyConfig(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_layers=1,
    num_classes=(2, 3),
)
BYTES = vocabulary.byte(extra_ids=100)
OPTIONS = {"has_x": ["no", "yes"], "letter": ["a", "b", "c"]}
LENGTHS = {"inputs": 24, "targets": 4}


def texts(task, count, seed):
    """Return (inputs, targets) as ids."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        label = int(rng.integers(len(OPTIONS[task])))
        if task == "has_x":
            text = "x" * 2 * label + "y" * int(rng.integers(1, 3))
        else:
            text = "abc"[label] * int(rng.integers(1, 4))
        examples.append([list(BYTES.encode(text)), list(BYTES.encode(OPTIONS[task][label]))])
    return examples


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    for task, listed in OPTIONS.items():
        splits = {"train": texts(task, 200, 0), "validation": texts(task, 24, 1)}
        small_cache.write_task(directory, task, splits, options=listed)
    small_cache.write_task(directory, "free", {"train": texts("letter", 4, 0)})
    small_cache.write_task(directory, "other", {"train": texts("letter", 4, 0)}, options=["d", "e"])
    small_cache.write_mixture(directory, "both", dict.fromkeys(OPTIONS, 1.0))
    return directory


def data_of(cache_dir, mixture="both"):
    return pipeline.TrainData(
        mixture=mixture,
        lengths=LENGTHS,
        batch_size=8,
        cache_dirs=cache_dir,
        architecture="encoder_only",
        prefetch=1,
        window=1,
    )


def test_a_packed_segment_is_classified_as_if_alone():
    model = encoder_only.encoder_only(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, 90, 9)
    segments = np.array([1] * 4 + [2] * 3 + [0] * 2)
    packed = {
        "encoder_input_tokens": ids * (segments > 0),
        "encoder_segment_ids": segments,
        "decoder_target_tokens": np.array([2, 1, 0]),
        "decoder_segment_ids": np.array([1, 2, 0]),
        "decoder_task_ids": np.array([1, 0, -1]),
        "decoder_input_tokens": np.zeros(3),
    }
    packed = {name: jnp.asarray(x[None], jnp.int32) for name, x in packed.items()}
    apply = jax.jit(model.apply)
    logits_LC = apply(params, packed).logits_BLV[0]
    assert logits_LC.shape == (3, 3)
    for place, (segment, task) in enumerate(((1, 1), (2, 0))):
        alone = {
            "encoder_input_tokens": jnp.asarray(ids[None, segments == segment], jnp.int32),
            "decoder_target_tokens": jnp.zeros((1, 1), jnp.int32),
            "decoder_input_tokens": jnp.zeros((1, 1), jnp.int32),
            "decoder_task_ids": jnp.full((1, 1), task),
        }
        found = apply(params, alone).logits_BLV[0, 0]
        np.testing.assert_allclose(logits_LC[place], found, rtol=1e-5, atol=1e-5)
        pooled_D = model.encode(params, alone)["pooled"][0]
        head_DC = params["task_heads"]["task_kernel"][task][:, : CONFIG.num_classes[task]]
        np.testing.assert_allclose(pooled_D @ head_DC, found[: head_DC.shape[1]], rtol=1e-4, atol=1e-5)
    probabilities = jax.nn.softmax(logits_LC)
    assert probabilities[1, 2] == 0  # task 0 has two classes
    np.testing.assert_array_equal(logits_LC[2], 0)  # a task never seen: all classes alike


def test_a_run_learns_two_tasks(cache_dir, tmp_path):
    model, data = encoder_only.encoder_only(CONFIG), data_of(cache_dir)
    scalars = train.fit(
        model_dir=str(tmp_path),
        model=model,
        data=data,
        optimizer=optim.adamw(0.01),
        loss=losses.LossConfig(z_loss=0.0),
        train_steps=60,
        log_every=20,
        mesh={"data": -1},
        evaluation=train.Evaluation(every=60, examples=24, decode=24),
        saving=train.Saving(every=0, asynchronous=False),
    )
    for task in OPTIONS:
        assert scalars[f"validation/task/{task}/accuracy"] > 90  # by the task's metric, of the options' texts
        assert scalars[f"task/{task}/loss"] < 0.3


def test_evaluation_of_a_task_without_a_head_is_chance(cache_dir):
    model, data = encoder_only.encoder_only(CONFIG), data_of(cache_dir)
    tasks = pipeline.open_stream(data).tasks
    results = evaluate.evaluate_mixture(
        model,
        jax.jit(model.init)(jax.random.key(0)),
        tasks[1:],
        split="validation",
        lengths=LENGTHS,
        batch_size=8,
        mesh=sharding.make_mesh(),
        architecture="encoder_only",
        task_ids={},
    )
    assert results[0].error is None and results[0].decode == "rank"
    assert results[0].loss == pytest.approx(np.log(3), rel=1e-4)


def test_what_cannot_be_classified_is_named(cache_dir):
    open_task = lambda name: pipeline.cache.open_task(cache_dir, name)  # noqa: E731
    with pytest.raises(ValueError, match="Task 'free' cannot train an encoder alone"):
        online.online(open_task("free"), LENGTHS, architecture="encoder_only")
    steps = online.online(open_task("other"), LENGTHS, architecture="encoder_only")
    with pytest.raises(ValueError, match="none of the task's 2 options"):
        steps(open_task("other").source("train").read(0), 0)
    model = encoder_only.encoder_only(CONFIG)
    with pytest.raises(ValueError, match=r"num_classes are \[2, 3\].*'letter': 3"):
        train.prepare(model=model, data=data_of(cache_dir, "letter"), optimizer=optim.adamw(0.01))
    run = lambda config: program.program(  # noqa: E731
        model=encoder_only.encoder_only(config),
        optimizer=optim.adamw(0.01),
        tasks=program.TaskTable(("a",), ("f",)),
        batch_size=8,
    )
    with pytest.raises(ValueError, match="heads for 2 tasks, the run has 1"):
        one = run(CONFIG)
        one.step.lower(one.abstract, pipeline.empty_batch(data_of(cache_dir)))
