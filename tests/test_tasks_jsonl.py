"""A folder of JSON lines becomes tasks and mixtures; what is wrong in it is said with file and line."""

import json
import os
import time

import pytest
import seqio

from mtjax import metrics
from mtjax.tasks import evaluation, jsonl, vocabularies
from mtjax.tasks.info import TaskInfo, describe, info

LENGTHS = {"inputs": 64, "targets": 16}
ROWS = [{"inputs": "one", "targets": "1"}, {"inputs": "two", "targets": "2", "references": ["2", "II"]}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_task(root, name, *, family="math", rows=ROWS, **description):
    folder = root / "tasks" / family / name
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", rows)
    (folder / "task.json").write_text(json.dumps({"metrics": ["accuracy"], **description}))
    return folder


@pytest.fixture
def registry(monkeypatch):
    """Registries of this test's own."""
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", {})
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})


def examples(task, split="test"):
    return list(seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False).as_numpy_iterator())


def test_tasks_mixtures_and_facts(tmp_path, registry):
    make_task(tmp_path, "numerals", instruction="Say the digit.", licence="CC0", labels=["1", "2"])
    make_task(tmp_path, "words", family="odd-family", metrics=["sari", "bleu"])
    write(tmp_path / "corpus" / "a.jsonl", [{"text": "Some text."}, {"text": "More."}])
    write(tmp_path / "corpus" / "validation.jsonl", [{"text": "Held out."}])
    tasks = jsonl.register(tmp_path)
    assert [task.name for task in tasks] == ["numerals", "words", "corpus"]
    assert info("numerals") == TaskInfo(
        family="math", licence="CC0", options=("1", "2"), metrics=("accuracy",), source="", citation=""
    )
    mixtures = {
        name: {t.name for t in seqio.MixtureRegistry.get(name).tasks}
        for name in seqio.MixtureRegistry.names()
    }
    assert mixtures == {
        "jsonl": {"numerals", "words"},
        "jsonl_math": {"numerals"},
        "jsonl_odd_family": {"words"},
        "jsonl_and_corpus": {"numerals", "words", "corpus"},
    }
    first, second = examples("numerals")
    assert first["inputs"] == b"Say the digit. one"
    assert first["references"].tolist() == [b"1"]  # its target, where a line has no references
    assert second["references"].tolist() == [b"2", b"II"]
    assert examples("words")[0]["source"] == b"one"  # for sari, without instruction
    assert [row["text"] for row in examples("corpus", "train")] == [b"Some text.", b"More."]
    assert seqio.TaskRegistry.get("corpus").splits == ("train", "validation")


def test_rates_are_sizes_and_the_corpus_comes_at_a_ratio(tmp_path, registry):
    make_task(tmp_path, "small")
    make_task(tmp_path, "large", num_examples={"train": 400_000, "test": 2})
    write(tmp_path / "corpus" / "a.jsonl", [{"text": "t"}])
    jsonl.register(tmp_path)
    mixture = seqio.MixtureRegistry.get("jsonl_and_corpus")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {"small": 2, "large": 300_000, "corpus": 2 * 300_002}


def test_references_and_choices_reach_seqio_s_metrics(tmp_path, registry):
    rows = [{"inputs": "q", "targets": "a", "references": ["a", "b"]}, {"inputs": "p", "targets": "c"}]
    make_task(tmp_path, "answers", rows=rows, metrics=["exact_match_any"])
    jsonl.register(tmp_path)
    task = seqio.TaskRegistry.get("answers")
    found = list(task.get_dataset(LENGTHS, "test", shuffle=False).as_numpy_iterator())
    targets = [
        task.postprocess_fn(row["targets_pretokenized"].decode(), example=row, is_target=True)
        for row in found
    ]
    (metric,) = task.metric_fns
    assert metric.__name__ == "exact_match_any"
    assert metric(targets, ["B", "x"]) == {"exact_match_any": 50}


def test_score_metrics_take_seqio_s_scores():
    (bits,) = evaluation.metric_fn("bits_per_byte")(["ab"], [-4.0]).values()
    assert bits == pytest.approx(metrics.lookup("bits_per_byte")(["ab"], [-4.0])["bits_per_byte"])
    assert evaluation.metric_fn("bits_per_byte")(["ab"], ([-4.0], {})) == {"bits_per_byte": bits}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"inputs": "x", "targets": ', r"train\.jsonl:3: not a line of JSON"),
        ('{"inputs": "x", "tar', r"train\.jsonl:3: not a line of JSON.*truncated"),
        ("[1]", r"train\.jsonl:3: expected an object"),
        ('{"inputs": "x"}', r"train\.jsonl:3: expected a string 'targets', got only \['inputs'\]"),
        ('{"inputs": "x", "targets": 3}', r"train\.jsonl:3: expected a string 'targets', got int"),
        ('{"inputs": "x", "targets": " "}', r"train\.jsonl:3: 'targets' is empty"),
        (
            '{"inputs": "x", "targets": "y", "choices": "y"}',
            r"train\.jsonl:3: expected 'choices' to be a list",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, registry, line, message):
    folder = make_task(tmp_path, "numerals")
    with open(folder / "train.jsonl", "a") as file:
        file.write(line)
    jsonl.register(tmp_path)
    with pytest.raises(ValueError, match=message):
        examples("numerals", "train")


def test_bytes_that_are_no_text_are_named(tmp_path, registry):
    folder = make_task(tmp_path, "numerals")
    with open(folder / "train.jsonl", "ab") as file:
        file.write(b'{"inputs": "\xff", "targets": "y"}\n')
    jsonl.register(tmp_path)
    with pytest.raises(ValueError, match=r"train\.jsonl:3: not a line of JSON"):
        examples("numerals", "train")


def test_a_file_without_examples_is_named(tmp_path, registry):
    folder = make_task(tmp_path, "numerals")
    (folder / "test.jsonl").write_text("\n")
    jsonl.register(tmp_path)
    with pytest.raises(ValueError, match=r"test\.jsonl has no examples"):
        examples("numerals")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "not JSON"),
        ('{"name": "n"}', "lists `metrics`"),
        ('{"metrics": ["acuracy"]}', r"task\.json: Unknown metric 'acuracy'. Did you mean 'accuracy'"),
        ('{"metrics": ["accuracy"], "name": "a b"}', "'a b' is no task name"),
    ],
)
def test_a_wrong_description_is_named(tmp_path, registry, description, message):
    (make_task(tmp_path, "numerals") / "task.json").write_text(description)
    with pytest.raises(ValueError, match=message):
        jsonl.register(tmp_path)


def test_a_folder_without_tasks_or_training_examples_is_an_error(tmp_path, registry):
    with pytest.raises(ValueError, match="No tasks/<family>/<task>/task"):
        jsonl.register(tmp_path)
    (make_task(tmp_path, "numerals") / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no train\.jsonl; it holds \['task.json', 'test.jsonl'\]"):
        jsonl.register(tmp_path)


# Info and vocabularies.


def test_info_of_a_task_never_described_is_the_default():
    assert info("nobody described this") == TaskInfo()
    with pytest.raises(ValueError, match="repeats an option"):
        describe("task", family="f", options=["a", "a"])
    with pytest.raises(ValueError, match="empty family"):
        describe("task", family="")


def test_vocabulary_specifications(tmp_path, monkeypatch):
    assert vocabularies.vocabulary("byte").vocab_size == 3 + 256 + 100
    assert vocabularies.vocabulary("byte:0").vocab_size == 259
    assert vocabularies.vocabulary("byte") is vocabularies.vocabulary("byte")
    with pytest.raises(ValueError, match=r"No SentencePiece model at .*missing\.model"):
        vocabularies.vocabulary(str(tmp_path / "missing.model:100"))
    monkeypatch.setattr(vocabularies, "_used", set())
    monkeypatch.setenv("MTJAX_VOCABULARY", "byte:5")
    assert vocabularies.default_vocabulary().vocab_size == 264
    with pytest.raises(ValueError, match="already registered with the vocabulary 'byte:5'"):
        vocabularies.set_default("byte")
    vocabularies.set_default("byte:5")


# Real data.

needs_data = pytest.mark.skipif(not os.environ.get("MTJAX_DATA"), reason="MTJAX_DATA is not set")


@needs_data
def test_all_real_tasks_register_in_seconds(registry):
    started = time.monotonic()
    tasks = jsonl.register(os.environ["MTJAX_DATA"])
    assert time.monotonic() - started < 5
    assert len(tasks) == 208 and len({info(task.name).family for task in tasks}) == 25
    assert len(seqio.MixtureRegistry.get("jsonl").tasks) == 207


@needs_data
@pytest.mark.slow
def test_right_predictions_score_full_marks_on_every_real_task(registry):
    for task in jsonl.register(os.environ["MTJAX_DATA"])[:-1]:
        rows = list(task.source.get_dataset("test", shuffle=False).take(20).as_numpy_iterator())
        targets = [
            evaluation.keep_references(
                "", example={**r, "targets_pretokenized": r["targets"]}, is_target=True
            )
            for r in rows
        ]
        right = [row["targets"].decode() for row in rows]
        for metric in task.metric_fns:
            for name, value in metric(targets, right).items():
                full = name not in ("sari", "rouge2", "bleu", "chrf", "final_number_accuracy")
                assert value == pytest.approx(100) or (not full and value > 0), (task.name, name, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("instruction", None), ("num_examples", None), ("metrics", "accuracy"), ("labels", "yes")],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path, registry, field, value):
    make_task(tmp_path, "numerals", **{field: value})
    with pytest.raises(ValueError, match=rf"task\.json: '{field}' must be a"):
        jsonl.register(tmp_path)


def test_half_a_surrogate_pair_is_named_with_its_line(tmp_path, registry):
    make_task(tmp_path, "numerals", rows=[*ROWS, {"inputs": "a\ud800", "targets": "1"}])
    jsonl.register(tmp_path)
    with pytest.raises(ValueError, match=r"test\.jsonl:3: 'inputs' has half of a surrogate pair"):
        examples("numerals")
