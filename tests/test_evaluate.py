import argparse
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import evaluate, metrics, predict, sharding
from mtjax.data import cache
from mtjax.models.t5 import T5Config, t5

LENGTHS = {"inputs": 48, "targets": 24}
COLOURS = ("red", "green", "blue")
FRUITS = (("cherry", "red"), ("lime", "green"), ("plum", "blue"), ("apple", "red"))


def examples(split):
    """Return the texts of a little task: fruit → colour; `choices` vary."""
    count = {"train": 40, "validation": 5, "test": 13}[split]
    rows = []
    for i in range(count):
        fruit, colour = FRUITS[i % len(FRUITS)]
        text = f"colour of {fruit} {split} {i}:" + " very" * (i % 7)
        rows.append({"inputs": text, "targets": colour, "choices": list(COLOURS[i % 2 :])})
    return rows


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """Cache real SeqIO tasks: options listed per example, for the whole task, and span corruption."""
    seqio = pytest.importorskip("seqio")
    import tensorflow as tf

    from mtjax.data import seqio_cache
    from mtjax.tasks import info, preprocessors, registration

    vocabulary = seqio.ByteVocabulary(extra_ids=20)

    def source(fields):
        def dataset(split, shuffle_files, seed=None):
            del shuffle_files, seed
            rows = [{name: row[name] for name in fields} for row in examples(split)]
            signature = {
                name: tf.TensorSpec([None] if name == "choices" else [], tf.string) for name in fields
            }
            return tf.data.Dataset.from_generator(lambda: rows, output_signature=signature)

        return seqio.FunctionDataSource(dataset, splits=["train", "validation", "test"])

    registration.add_task(
        "eval_choices",
        source=source(["inputs", "targets", "choices"]),
        metrics=["accuracy"],
        family="colours",
        vocabulary=vocabulary,
    )
    registration.add_task(
        "eval_options",
        source=source(["inputs", "targets"]),
        metrics=["accuracy", "macro_f1"],
        family="colours",
        options=COLOURS,
        vocabulary=vocabulary,
    )
    registration.add_task(
        "eval_spans",
        source=source(["inputs", "targets"]),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "inputs"})
        ],
        online=[preprocessors.span_corruption],
        metrics=["bits_per_byte"],
        family="text",
        vocabulary=vocabulary,
    )
    directory = tmp_path_factory.mktemp("cache")
    seqio_cache.cache_tasks(["eval_choices", "eval_options", "eval_spans"], directory, info=info.info)
    return directory


@pytest.fixture(scope="module")
def tasks(cache_dir):
    return [cache.open_task([cache_dir], f"eval_{name}") for name in ("choices", "options", "spans")]


MODEL = t5(
    T5Config(
        vocab_size=279,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 1.5, MODEL.init(jax.random.key(0)))


@functools.cache
def predictor(mode="greedy"):
    """Compile once for all tests."""
    return predict.predictor(
        MODEL,
        predict.DecodeConfig(mode, max_length=6),
        lengths=LENGTHS,
        batch_size=4,
        mesh=sharding.make_mesh({"data": -1}),
    )


def run(params, tasks, *, split="test", mode="greedy", **options):
    return evaluate.evaluate_mixture(
        MODEL,
        params,
        tasks,
        split=split,
        lengths=LENGTHS,
        batch_size=4,
        mesh=sharding.make_mesh({"data": -1}),
        predictor=predictor(mode),
        **options,
    )


@pytest.fixture(scope="module")
def results(params, tasks, tmp_path_factory):
    """Evaluate all tasks once, greedily, with baselines; returns the results and the folder of predictions."""
    folder = tmp_path_factory.mktemp("predictions")
    return run(params, tasks, predictions_dir=folder, with_baselines=True), folder


@functools.cache
def _logits():
    return jax.jit(lambda params, batch: MODEL.apply(params, batch).logits_BLV)


def naive_logprobs(params, inputs, targets):
    """Return each target token's log-probability and whether it is the likeliest, float64."""
    batch = {
        "encoder_input_tokens": np.zeros((1, 60), np.int32),
        "decoder_input_tokens": np.zeros((1, 60), np.int32),
        "decoder_target_tokens": np.zeros((1, 60), np.int32),
    }
    batch["encoder_input_tokens"][0, : len(inputs)] = inputs
    batch["decoder_input_tokens"][0, 1 : len(targets)] = targets[:-1]
    batch["decoder_target_tokens"][0, : len(targets)] = targets
    logits = np.asarray(_logits()(params, batch)[0, : len(targets)], np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs[np.arange(len(targets)), targets], logits.argmax(-1) == targets


def byte_ids(text, length):
    """Encode as bytes shifted by three, cut so that EOS fits: what the tests' tasks do."""
    return [*(b + 3 for b in text.encode()[: length - 1]), 1]


def lines_of(folder, task):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text("utf-8").split("\n")[:-1]]


def test_loss_accuracy_and_bits_equal_a_naive_loop(results, params):
    result = results[0][0]
    logprobs, hits = [], []
    for row in examples("test"):
        values, right = naive_logprobs(
            params, byte_ids(row["inputs"], LENGTHS["inputs"]), byte_ids(row["targets"], LENGTHS["targets"])
        )
        logprobs += values.tolist()
        hits += right.tolist()
    num_bytes = sum(len(row["targets"].encode()) for row in examples("test"))
    assert (result.num_examples, result.num_tokens) == (13, len(logprobs))
    assert result.loss == pytest.approx(-np.mean(logprobs), rel=1e-5)
    assert result.accuracy == pytest.approx(np.mean(hits))
    assert result.bits_per_byte == pytest.approx(-sum(logprobs) / math.log(2) / num_bytes, rel=1e-5)


def test_predictions_keep_order_inputs_and_correctness(results):
    (result, *_), folder = results
    lines = lines_of(folder, "eval_choices")
    assert [line["input"] for line in lines] == [row["inputs"] for row in examples("test")]
    assert [line["target"] for line in lines] == [row["targets"] for row in examples("test")]
    assert all(line["correct"] == (line["prediction"] == line["target"]) for line in lines)
    assert result.scores["accuracy"] == pytest.approx(100 * np.mean([line["correct"] for line in lines]))
    tokens = sum(line["tokens"] for line in lines)
    assert result.loss == pytest.approx(-sum(line["logprob"] for line in lines) / tokens)


def test_scores_come_from_the_metrics_by_name(results):
    (_, result, _), folder = results
    lines = lines_of(folder, "eval_options")
    targets, predictions = [line["target"] for line in lines], [line["prediction"] for line in lines]
    expected = metrics.METRICS["accuracy"](targets, predictions)
    expected |= metrics.METRICS["macro_f1"](targets, predictions)
    assert result.scores == pytest.approx(expected)
    assert (result.task, result.family, result.decode) == ("eval_options", "colours", "greedy")


def test_trivial_baselines_are_majority_or_copy(results):
    (first, second, spans), _ = results
    share = 100 * np.mean([row["targets"] == "red" for row in examples("test")])
    for result in (first, second):
        baseline = result.baselines["accuracy"]
        assert (baseline.name, baseline.score) == ("majority", pytest.approx(share))
        assert baseline.low < baseline.score < baseline.high
        assert result.beats_baseline("accuracy") == (result.scores["accuracy"] > baseline.high)
    assert spans.baselines.keys() == {"bits_per_byte"}
    assert spans.baselines["bits_per_byte"].name == "unigram"


def test_span_corruption_is_measured_in_bits_against_a_unigram_model(results, tasks):
    (*_, result), folder = results
    lines = lines_of(folder, "eval_spans")
    num_bytes = sum(len(line["scored"].encode()) for line in lines)
    bits = -sum(line["logprob"] for line in lines) / math.log(2)
    assert result.scores == {"bits_per_byte": pytest.approx(bits / num_bytes)}
    assert "prediction" not in lines[0] and 0 < num_bytes < sum(len(line["input"]) for line in lines)

    def targets(split):
        step = evaluate.online(tasks[2], LENGTHS)
        source = tasks[2].source(split)
        return [step(source.read(i), i)[1] for i in range(len(source))]

    counts = np.ones(279) + np.bincount(np.concatenate(targets("train")), minlength=279)
    unigram = -sum(np.log2(counts[ids] / counts.sum()).sum() for ids in targets("test"))
    assert result.baselines["bits_per_byte"].score == pytest.approx(unigram / num_bytes)


def test_beating_a_baseline_means_outside_its_interval():
    result = evaluate.TaskResult(
        "t",
        "f",
        scores={"accuracy": 60.0, "bits_per_byte": 2.0, "rouge1": 1.0},
        baselines={
            "accuracy": evaluate.Baseline("majority", 50.0, 40.0, 60.0),
            "bits_per_byte": evaluate.Baseline("unigram", 3.0, 2.1, 4.0, lower_is_better=True),
        },
    )
    assert result.beats_baseline("accuracy") is False
    assert result.beats_baseline("bits_per_byte") is True
    result.scores["bits_per_byte"] = 2.5
    assert result.beats_baseline("bits_per_byte") is False
    assert result.beats_baseline("rouge1") is None


def test_rank_equals_brute_force_over_the_options(params, tasks, tmp_path):
    found = run(params, tasks, mode="rank", predictions_dir=tmp_path)
    assert [result.decode for result in found] == ["rank", "rank", ""]
    for name, options in (("eval_choices", None), ("eval_options", list(COLOURS))):
        for row, line in zip(examples("test"), lines_of(tmp_path, name), strict=True):
            listed = options or row["choices"]
            inputs = byte_ids(row["inputs"], LENGTHS["inputs"])
            scores = [naive_logprobs(params, inputs, byte_ids(option, 99))[0].sum() for option in listed]
            assert line["prediction"] == listed[int(np.argmax(scores))]


def test_fewer_examples_are_spread_over_the_split(params, tasks, tmp_path, results):
    (result,) = run(params, tasks[:1], max_examples=3, predictions_dir=tmp_path)
    assert result.num_examples == 3
    whole = [lines_of(results[1], "eval_choices")[i] for i in (0, 4, 8)]
    for line, expected in zip(lines_of(tmp_path, "eval_choices"), whole, strict=True):
        assert line | {"logprob": 0} == expected | {"logprob": 0}
        assert line["logprob"] == pytest.approx(expected["logprob"], rel=1e-5)


def test_a_failed_task_names_itself_and_the_others_run(params, tasks, results):
    class Broken(type(tasks[0])):
        def examples(self, split):
            raise OSError(f"cannot read {split}")

    broken = Broken(tasks[0].name, tasks[0].directory, tasks[0].metadata)
    failed, fine = run(params, [broken, tasks[1]])
    assert failed.error == "OSError: cannot read test" and failed.loss is None
    assert fine.error is None and fine.loss == pytest.approx(results[0][1].loss)


def test_diverged_parameters_fail_the_task(params, tasks):
    (result,) = run(jax.tree.map(lambda x: x * jnp.nan, params), tasks[:1])
    assert "not finite" in result.error


def test_unknown_split_and_metric_are_errors_before_anything_runs(params, tasks):
    with pytest.raises(ValueError, match="Did you mean 'test'"):
        run(params, tasks, split="tst")
    odd = type(tasks[0])(tasks[0].name, tasks[0].directory, tasks[0].metadata | {"metrics": ["acuracy"]})
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        run(params, [tasks[1], odd])


def test_progress_ends_at_the_number_of_examples(params, tasks):
    seen = []
    run(params, tasks[:2], progress=lambda *update: seen.append(update))
    assert seen[-1] == (26, 26, "eval_options")
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)


def test_another_checkpoint_compiles_nothing(params, tasks):
    run(params, tasks[:1])
    compiled = predictor().num_compilations()
    run(jax.tree.map(lambda x: x * 2, params), tasks[:1])
    assert predictor().num_compilations() == compiled


def test_evaluating_a_step_again_replaces_its_lines(tmp_path):
    path = evaluate.results_path(tmp_path, "mix")

    def write(step, loss, *, split="test", tasks=("a", "b")):
        rows = [evaluate.TaskResult(task, "f", {"accuracy": loss}, loss) for task in tasks]
        evaluate.write_results(path, rows, step=step, split=split, decode="greedy")

    write(200, 1.0)
    write(100, 2.0)
    write(200, 3.0)
    write(200, 4.0, tasks=("a",))
    write(200, 5.0, split="validation", tasks=("a",))
    found = [(x["step"], x["task"], x["split"], x["loss"]) for x in evaluate.read_results(path)]
    assert found == [
        (100, "a", "test", 2.0),
        (100, "b", "test", 2.0),
        (200, "b", "test", 3.0),
        (200, "a", "test", 4.0),
        (200, "a", "validation", 5.0),
    ]


def test_results_survive_any_text_and_name_a_damaged_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = [{"input": "line\u2028separator \x85 next\nline"}, {"input": "ü"}]
    evaluate.write_lines(path, rows)
    assert evaluate.read_results(path) == rows
    path.write_text('{"a": 1}\n{"b": ', "utf-8")
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: not JSON"):
        evaluate.read_results(path)
    assert not list(tmp_path.glob(".*"))  # nothing unfinished is left


def test_series_of_checkpoints_is_plotted(tmp_path):
    from mtjax.launch import plots

    path = evaluate.results_path(tmp_path, "mix")
    for step in (100, 200, 300):
        rows = [
            evaluate.TaskResult(task, family, {"accuracy": step / 10 + i}, 3 - step / 200)
            for i, (task, family) in enumerate([("a", "f"), ("b", "f"), ("c", "g")])
        ]
        if step == 200:
            rows[0] = evaluate.TaskResult("a", "f", error="ValueError: broken")
        rows.append(evaluate.TaskResult("d", "h", {"bits_per_byte": 3.0}, 2.0))
        evaluate.write_results(path, rows, step=step, split="test", decode="greedy")
    lines = evaluate.read_results(path)
    # At step 200 a task of f failed: a mean of the other alone would not compare.
    assert plots.family_means(lines) == {"f": {100: 10.5, 300: 30.5}, "g": {100: 12, 200: 22, 300: 32}}
    plots.series(tmp_path / "mix.png", lines, title="mix")
    image = (tmp_path / "mix.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000


def test_a_training_split_is_read_off_its_ids(params, tasks):
    (result,) = run(params, tasks[1:2], split="train", max_examples=4, with_baselines=True)
    assert (result.error, result.num_examples) == (None, 4)
    assert result.baselines["accuracy"].name == "majority"


# The command's choice of checkpoints.


def opened(folder, *, metric="validation/loss", mode="min", train_steps=30):
    """Open a run whose directory holds checkpoints but no configuration."""
    from mtjax import train
    from mtjax.launch import model_dir

    evaluation = train.Evaluation(every=10, metric=metric, mode=mode)
    return model_dir.Run(folder, {"evaluation": evaluation, "train_steps": train_steps}, [], None, None)


def save(folder, *losses):
    """Save a real checkpoint at steps 10, 20, ... with these validation losses (None: not evaluated)."""
    from mtjax import checkpoint

    saver = checkpoint.Checkpointer(
        folder, keep_last=9, best_metric="validation/loss", best_mode="min", asynchronous=False
    )
    for step, loss in zip(range(10, 99, 10), losses, strict=False):
        values = None if loss is None else {"validation/loss": loss, "validation/accuracy": -loss}
        saver.save(step, {"params": {"w": jnp.ones(2)}}, host={}, meta={}, metrics=values)
    saver.close()


def test_checkpoints_are_chosen_by_name_or_step(tmp_path):
    from mtjax.launch import model_dir

    save(tmp_path, 3.0, 1.0, 2.0)
    run_ = opened(tmp_path)
    choices = {
        "all": [10, 20, 30],
        "latest": [30],
        "best": [20],
        "30,10": [10, 30],
        "10,latest,best,10": [10, 20, 30],
    }
    for text, steps in choices.items():
        assert model_dir.chosen_steps(run_, text) == steps
    highest = opened(tmp_path, metric="validation/accuracy", mode="max")
    assert model_dir.chosen_steps(highest, "best") == [20]
    lowest = opened(tmp_path, metric="validation/accuracy", mode="min")
    assert model_dir.chosen_steps(lowest, "best") == [10]
    with pytest.raises(ValueError, match=r"No checkpoint of step 21 .* the nearest: \[20, 30, 10\]"):
        model_dir.chosen_steps(run_, "10,21")
    with pytest.raises(ValueError, match="Did you mean 'latest'"):
        model_dir.chosen_steps(run_, "lastest")


def test_no_checkpoint_and_no_best_are_errors(tmp_path):
    from mtjax.launch import model_dir

    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        model_dir.chosen_steps(opened(tmp_path), "latest")
    save(tmp_path, None)
    with pytest.raises(ValueError, match=r"none is best. Choose of \[10\]"):
        model_dir.chosen_steps(opened(tmp_path), "best")


def test_watching_yields_new_checkpoints_until_the_last_step(tmp_path):
    from mtjax.launch import eval as command

    args = argparse.Namespace(watch=True, checkpoints="latest", timeout=30.0)
    save(tmp_path, 3.0, 1.0)
    steps = command._steps(opened(tmp_path), args)
    assert next(steps) == 20
    save(tmp_path, 3.0, 1.0, 2.0)  # 10 and 20 are there already
    assert list(steps) == [30]


def test_watching_gives_up_after_the_timeout(tmp_path, capsys):
    from mtjax.launch import eval as command

    args = argparse.Namespace(watch=True, checkpoints="all", timeout=0.05)
    save(tmp_path, 3.0)
    assert list(command._steps(opened(tmp_path), args)) == [10]
    assert "No new checkpoint for 0.05 s; the last step would be 30" in capsys.readouterr().out


def test_another_vocabulary_than_the_checkpoints_is_an_error(tmp_path, tasks):
    from mtjax.launch import model_dir

    fingerprint = tasks[0].vocabulary("targets").fingerprint
    model_dir.check_vocabulary(opened(tmp_path), {"vocabulary": {"trained": fingerprint}}, tasks)
    with pytest.raises(ValueError, match=r"task 'eval_choices' .* is not the one that .*\(other\)"):
        model_dir.check_vocabulary(opened(tmp_path), {"vocabulary": {"trained": "other"}}, tasks)


def test_the_table_shows_failures_and_baselines():
    from mtjax.launch import eval as command

    results = [
        evaluate.TaskResult("broken", "f", error="OSError: gone"),
        evaluate.TaskResult(
            "fine",
            "f",
            {"accuracy": 70.0},
            baselines={"accuracy": evaluate.Baseline("majority", 50.0, 40.0, 60.0)},
        ),
    ]
    table = command.results_table(results, "title")
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["metric"] == ["FAILED", "accuracy"]
    assert cells["trivial baseline"] == ["", "50 majority"]
    assert cells["clearly better"] == ["", "yes"]
    assert command._verdict(results).startswith("1 of 1 tasks are better")
