"""python_docs: splits that do not leak, the same in every process, targets among the options, under plain SeqIO."""

import collections
import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import seqio

from mtjax import metrics
from mtjax.tasks import python_docs, python_library
from mtjax.tasks.info import info

NAMES = list(python_docs.TASKS)
LENGTHS = {"inputs": 256, "targets": 64}
DIGEST = """
import hashlib
from mtjax.tasks import python_docs
for name in ("unicode_script", "error_class"):
    print(name, hashlib.sha256(repr(python_docs.examples(name)).encode()).hexdigest())
"""


def normal(text):
    return " ".join(text.casefold().split())


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_example_and_no_subject(name):
    splits = python_docs.examples(name)
    rows = [example for examples in splits.values() for example in examples]
    texts = [normal(example.inputs or example.targets) for example in rows]
    assert len(set(texts)) == len(texts)
    split_of = {}
    for split, examples in splits.items():
        for example in examples:
            assert split_of.setdefault(normal(example.key), split) == split


@pytest.mark.parametrize("name", NAMES)
def test_every_task_can_be_learned_and_measured(name):
    splits, task = python_docs.examples(name), info(f"python_docs_{name}")
    assert len(splits["train"]) >= 500 and len(splits["test"]) >= 100 and len(splits["validation"]) >= 50
    assert all(example.targets.strip() for examples in splits.values() for example in examples)
    if task.options:
        assert {example.targets for example in splits["train"]} == set(task.options)
        assert {example.targets for example in splits["test"]} <= set(task.options)


def test_families_and_options():
    families = collections.Counter(info(f"python_docs_{name}").family for name in NAMES)
    assert len(families) >= 5
    without_options = {name for name in NAMES if not info(f"python_docs_{name}").options}
    assert without_options == {"span_corruption", "doc_name", "code_doc"}  # the latter two are the hard ones
    for name in NAMES:
        for metric in info(f"python_docs_{name}").metrics:
            metrics.lookup(metric)


def test_yes_no_tasks_are_balanced():
    for name in ("code_returns", "code_loops"):
        counts = collections.Counter(example.targets for example in python_docs.examples(name)["train"])
        assert abs(counts["yes"] - counts["no"]) < 0.1 * counts.total()


def test_the_most_frequent_of_equal_inputs_wins():
    rows = [python_docs.Example("a  B", target, "k") for target in ("x", "y", "y")]
    (kept,) = python_docs._distinct([*rows, python_docs.Example("A b", "x", "k")])
    assert kept.targets == "x"  # two each: the alphabetically first
    (kept,) = python_docs._distinct(rows)
    assert kept.targets == "y"


def test_shares_of_the_splits():
    counts = collections.Counter(python_docs.split_of(f"subject {i}") for i in range(5000))
    for split, percent in python_docs.SPLITS.items():
        assert counts[split] / 50 == pytest.approx(percent, abs=2)
    assert python_docs.split_of("Some  text") == python_docs.split_of("some text")


@pytest.mark.parametrize(
    ("name", "inputs", "targets"),
    [
        ("unicode_category", "greek small letter alpha", "small letter"),
        ("entity_kind", "&Alpha;", "capital letter"),
        ("code_parameters", None, None),
        ("name_kind", "OrderedDict", "class"),
        ("name_kind", "HTTPError", "exception"),
        ("unicode_script", "0 0 4 1 6", "cyrillic"),
    ],
)
def test_known_facts(name, inputs, targets):
    built = {example.inputs: example.targets for example in python_docs.TASKS[name].build()}
    if inputs is not None:
        assert built[inputs] == targets
    else:
        for signature, number in list(built.items())[:500]:
            function = signature.replace("def ", "").split("(", 1)[0]
            scope = {}
            try:
                exec(re.sub(r"=[^,)]*", "=0", re.sub(r": [^,)=]*", "", signature)) + ": pass", scope)
            except SyntaxError:
                continue  # a default with commas or brackets, too much for the regular expressions
            code = scope[function].__code__
            flags = bool(code.co_flags & 4) + bool(code.co_flags & 8)
            assert code.co_argcount + code.co_kwonlyargcount + flags == int(number)


def test_code_has_no_docstring_and_chunks_are_whole():
    definition = next(
        d for d in python_library.definitions() if d.module == "textwrap" and d.name == "dedent"
    )
    assert definition.kind == "function" and definition.code.startswith("def dedent(text):\n")
    assert definition.docstring.startswith("Remove any common leading whitespace")
    assert "common leading whitespace" not in definition.code.split("\n")[1]
    document = "first\n\n" + "\n".join(f"line {i} of a long paragraph" for i in range(100)) + "\n\nlast"
    chunks = list(python_docs._chunks(document))
    assert len(chunks) > 1 and all(len(chunk) <= python_docs.MAX_CHUNK for chunk in chunks)
    assert normal(" ".join(chunks)) == normal(document)


def test_a_library_without_source_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(python_library.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"only 0 standard library modules.*\.py files"):
        python_library.modules.__wrapped__()


@pytest.mark.slow
def test_another_process_builds_the_same_examples():
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    found = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == "".join(
        f"{name} {hashlib.sha256(repr(python_docs.examples(name)).encode()).hexdigest()}\n"
        for name in ("unicode_script", "error_class")
    )


# Under plain SeqIO.


def test_seqio_feeds_a_task():
    task = seqio.TaskRegistry.get("python_docs_error_class")
    (example,) = task.get_dataset(LENGTHS, "test", shuffle=False, seed=0).take(1).as_numpy_iterator()
    first = python_docs.examples("error_class")["test"][0]
    vocabulary = task.output_features["inputs"].vocabulary
    assert vocabulary.decode(example["inputs"].tolist()) == f"exception of message: {first.inputs}"
    assert vocabulary.decode(example["targets"].tolist()) == first.targets
    assert example["targets"][-1] == 1


def test_seqio_corrupts_spans_and_loses_nothing():
    task = seqio.TaskRegistry.get("python_docs_span_corruption")
    lengths = {"inputs": 1600, "targets": 600}
    dataset = task.get_dataset(lengths, "test", shuffle=False, seed=0)
    texts = [example.targets for example in python_docs.examples("span_corruption")["test"][:5]]
    for example, text in zip(dataset.take(5).as_numpy_iterator(), texts, strict=True):
        spans = {}
        for token in example["targets"][:-1]:
            if token >= 259:
                span = spans[token] = []
            else:
                span.append(token)
        whole = [i for token in example["inputs"][:-1] for i in (spans[token] if token >= 259 else [token])]
        assert bytes(i - 3 for i in whole).decode() == text
        assert sum(map(len, spans.values())) == round(0.15 * len(text.encode()))
        assert len(spans) == pytest.approx(0.05 * len(text.encode()), abs=1)


def test_span_corruption_differs_between_seeds_only():
    task = seqio.TaskRegistry.get("python_docs_span_corruption")

    def inputs(seed):
        dataset = task.get_dataset(LENGTHS, "test", shuffle=False, seed=seed).take(3)
        return [example["inputs"].tolist() for example in dataset.as_numpy_iterator()]

    assert inputs(1) == inputs(1)
    assert inputs(1) != inputs(2)


def test_seqio_evaluates_with_our_metrics():
    evaluator = seqio.Evaluator(
        "python_docs_error_class",
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        sequence_length=LENGTHS,
        num_examples=20,
    )
    examples = python_docs.examples("error_class")["validation"][:20]
    vocabulary = seqio.TaskRegistry.get("python_docs_error_class").output_features["targets"].vocabulary

    def predict(dataset, *args, **kwargs):
        texts = [example.targets if i % 4 else "Nothing" for i, example in enumerate(examples)]
        ids = [vocabulary.encode(text) for text in texts]
        return [(i, row + [0] * (30 - len(row))) for i, row in enumerate(ids)]

    found, _ = evaluator.evaluate(
        compute_metrics=True, step=0, predict_fn=predict, score_fn=lambda *a, **k: []
    )
    assert found.result()["python_docs_error_class"]["accuracy"] == pytest.approx(75)


def test_register_over_another_vocabulary():
    vocabulary = seqio.ByteVocabulary(extra_ids=7)
    mixture = python_docs.register(vocabulary, suffix="_seven")
    assert len(mixture.tasks) == len(NAMES)
    assert all(task.name.endswith("_seven") for task in mixture.tasks)
    assert mixture.output_features["targets"].vocabulary.vocab_size == 266
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates["python_docs_doc_name_seven"] < rates["python_docs_code_kind_seven"]
    assert np.isclose(sum(rates.values()), sum(d.rate for d in python_docs.TASKS.values()))
