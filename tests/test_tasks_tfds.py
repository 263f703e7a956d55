"""T5's text-to-text formats, from hand-made examples and from mock data with the real feature specs."""

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from mtjax import metrics
from mtjax.tasks import c4, cnn_dailymail, glue, squad, superglue, wmt  # noqa: F401
from mtjax.tasks.info import info

TOUCHED_BY_IMPORT = set(seqio.LazyTfdsLoader._MEMOIZED_BUILDERS)
LENGTHS = {"inputs": 256, "targets": 64}
GLUE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
TASKS = [
    *(f"glue_{name}" for name in GLUE),
    *(f"superglue_{name}" for name in SUPERGLUE),
    *(
        "squad",
        "cnn_dailymail",
        "wmt14_en_de",
        "wmt14_en_fr",
        "wmt16_en_ro",
        "c4_span_corruption",
        "c4_prefix_lm",
    ),
]


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Split sizes come with a download; mock_data has none."""
    monkeypatch.setattr(seqio.LazyTfdsLoader, "size", lambda self, split: 4)


def formatted(task, *examples, split="train"):
    """Run hand-made examples through a task; returns its texts and the fields its metrics read."""
    tensors = [tf.nest.map_structure(lambda value: tf.constant(value), example) for example in examples]

    def as_dataset(self, *args, **kwargs):
        del self, args, kwargs
        dataset = tf.data.Dataset.from_tensors(tensors[0])
        for tensor in tensors[1:]:
            dataset = dataset.concatenate(tf.data.Dataset.from_tensors(tensor))
        return dataset

    with tfds.testing.mock_data(as_dataset_fn=as_dataset, policy=tfds.testing.MockPolicy.USE_CODE):
        dataset = seqio.TaskRegistry.get(task).get_dataset(LENGTHS, split, shuffle=False)
        rows = list(dataset.as_numpy_iterator())

    def text(value):
        return value.decode() if isinstance(value, bytes) else [part.decode() for part in value]

    names = {"inputs_pretokenized": "inputs", "targets_pretokenized": "targets"}
    kept = [*names, *metrics.FIELDS]
    return [{names.get(k, k): text(row[k]) for k in kept if k in row} for row in rows]


def pair(inputs, targets, **fields):
    return [{"inputs": inputs, "targets": targets, **fields}]


def test_glue_formats():
    sentences = {"sentence1": "A b.", "sentence2": "C d.", "idx": 0}
    assert formatted("glue_cola", {"sentence": "Him go.", "label": 0, "idx": 0}) == pair(
        "cola sentence: Him go.", "unacceptable"
    )
    assert formatted("glue_sst2", {"sentence": "a joy ", "label": 1, "idx": 0}) == pair(
        "sst2 sentence: a joy ", "positive"
    )
    assert formatted("glue_mrpc", {**sentences, "label": 1}) == pair(
        "mrpc sentence1: A b. sentence2: C d.", "equivalent"
    )
    assert formatted("glue_qqp", {"question1": "Why?", "question2": "How?", "label": 0, "idx": 0}) == pair(
        "qqp question1: Why? question2: How?", "not_duplicate"
    )
    assert formatted("glue_mnli", {"premise": "P.", "hypothesis": "H.", "label": 2, "idx": 0}) == pair(
        "mnli hypothesis: H. premise: P.", "contradiction"
    )
    assert formatted("glue_qnli", {"question": "Q?", "sentence": "S.", "label": 0, "idx": 0}) == pair(
        "qnli question: Q? sentence: S.", "entailment"
    )
    assert formatted("glue_rte", {**sentences, "label": 1}) == pair(
        "rte sentence1: A b. sentence2: C d.", "not_entailment"
    )


@pytest.mark.parametrize(("score", "text"), [(1.75, "1.8"), (0.0, "0.0"), (5.0, "5.0"), (3.29, "3.2")])
def test_stsb_spells_the_score_in_fifths(score, text):
    example = {"sentence1": "A.", "sentence2": "B.", "label": np.float32(score), "idx": 0}
    assert formatted("glue_stsb", example) == pair("stsb sentence1: A. sentence2: B.", text)
    assert text in info("glue_stsb").options


def test_an_unlabelled_example_has_the_unknown_label():
    assert formatted("glue_cola", {"sentence": "Go.", "label": -1, "idx": 0})[0]["targets"] == "<unk>"


def test_superglue_formats():
    assert formatted(
        "superglue_boolq", {"question": "is it", "passage": "It is.", "label": 1, "idx": 0}
    ) == pair("boolq question: is it passage: It is.", "True")
    assert formatted("superglue_cb", {"premise": "P", "hypothesis": "H", "label": 1, "idx": 0}) == pair(
        "cb hypothesis: H premise: P", "contradiction"
    )
    copa = {"premise": "P.", "choice1": "A.", "choice2": "B.", "question": "effect", "label": 1, "idx": 0}
    assert formatted("superglue_copa", copa) == pair(
        "copa choice1: A. choice2: B. premise: P. question: effect", "choice2"
    )
    assert formatted("superglue_rte", {"premise": "P", "hypothesis": "H", "label": 0, "idx": 0}) == pair(
        "rte hypothesis: H premise: P", "entailment"
    )
    wic = {"sentence1": "Go up.", "sentence2": "Up, up.", "word": "up", "label": 0, "idx": 0}
    assert formatted("superglue_wic", wic | dict.fromkeys(("start1", "end1", "start2", "end2"), 0)) == pair(
        "wic sentence1: Go up. sentence2: Up, up. word: up", "False"
    )


def test_multirc_drops_markup_and_groups_by_question():
    example = {
        "paragraph": "<b>Sent 1: </b>A squirrel.<br><b>Sent 2: </b>It ate.",
        "question": "Who?",
        "answer": "A dog",
        "label": 0,
        "idx": {"paragraph": 5, "question": 1, "answer": 3},
    }
    assert formatted("superglue_multirc", example) == pair(
        "multirc question: Who? answer: A dog paragraph: Sent 1: A squirrel. Sent 2: It ate.",
        "False",
        group="5-1",
    )


def test_record_trains_on_every_answer_and_evaluates_each_query_once():
    example = {
        "passage": "It rained.\n@highlight\nA won\n@highlight\nB lost",
        "query": "@placeholder won.",
        "entities": ["A", "B", "The A"],
        "answers": ["A", "The A"],
        "idx": {"passage": 0, "query": 0},
    }
    inputs = "record query: @placeholder won. entities: A, B, The A passage: It rained. A won. B lost"
    fields = {"references": ["A", "The A"], "choices": ["A", "B", "The A"]}
    assert formatted("superglue_record", example, split="train") == [
        *pair(inputs, "A", **fields),
        *pair(inputs, "The A", **fields),
    ]
    assert formatted("superglue_record", example, split="validation") == pair(inputs, "A", **fields)


def test_wsc_marks_the_pronoun_and_trains_on_true_pairs_only():
    text = "The album lay there; she sat without opening it."
    false = {
        "text": text,
        "span1_text": "she",
        "span1_index": 4,
        "span2_text": "it",
        "span2_index": 8,
        "idx": 0,
    }
    examples = [{**false, "label": 0}, {**false, "span1_text": "The album", "span1_index": 0, "label": 1}]
    inputs = "wsc: The album lay there; she sat without opening *it*."
    assert formatted("superglue_wsc", *examples, split="train") == pair(inputs, "The album", label="True")
    assert formatted("superglue_wsc", *examples, split="validation") == [
        *pair(inputs, "she", label="False"),
        *pair(inputs, "The album", label="True"),
    ]


def test_squad_format():
    example = {
        "id": "0",
        "title": "T",
        "context": "It's (very)  old.",
        "question": "How old?",
        "answers": {"text": ["very", "(very) old"], "answer_start": [6, 5]},
    }
    assert formatted("squad", example) == pair(
        "question: How old ? context: It ' s ( very ) old .", "very", references=["very", "( very ) old"]
    )


def test_summary_and_translation_formats():
    article = {"article": "Long text.", "highlights": "Short.\nEnd.", "id": "0", "publisher": "cnn"}
    assert formatted("cnn_dailymail", article) == pair("summarize: Long text.", "Short.\nEnd.")
    for name, code, language in [
        ("14_en_de", "de", "German"),
        ("14_en_fr", "fr", "French"),
        ("16_en_ro", "ro", "Romanian"),
    ]:
        assert formatted(f"wmt{name}", {"en": "That is good.", code: "X."}) == pair(
            f"translate English to {language}: That is good.", "X."
        )


def test_c4_text_is_corrupted():
    fields = dict.fromkeys(("content-length", "content-type", "timestamp", "url"), "")
    text = "Thank you for inviting me to your party last week."
    with tfds.testing.mock_data(
        as_dataset_fn=lambda self, *args, **kwargs: tf.data.Dataset.from_tensors({"text": text, **fields}),
        policy=tfds.testing.MockPolicy.USE_CODE,
    ):
        dataset = seqio.TaskRegistry.get("c4_span_corruption").get_dataset(
            LENGTHS, "train", shuffle=False, seed=1
        )
        (example,) = dataset.as_numpy_iterator()
    sentinels = [token for token in example["inputs"] if token >= 259]
    assert sentinels == [358 - i for i in range(len(sentinels))]
    assert sentinels == [token for token in example["targets"] if token >= 259]
    spans = {}
    for token in example["targets"][:-1]:
        if token >= 259:
            span = spans[token] = []
        else:
            span.append(token)
    whole = [id for token in example["inputs"][:-1] for id in (spans[token] if token >= 259 else [token])]
    assert bytes(id - 3 for id in whole).decode() == text
    assert example["inputs"][-1] == example["targets"][-1] == 1


@pytest.mark.parametrize("name", TASKS)
def test_mock_data_runs_through_every_task(name):
    task = seqio.TaskRegistry.get(name)
    with tfds.testing.mock_data(num_examples=4, policy=tfds.testing.MockPolicy.USE_CODE):
        examples = list(task.get_dataset(LENGTHS, "validation", shuffle=False, seed=0).as_numpy_iterator())
    assert examples
    for example in examples:
        assert 0 < len(example["inputs"]) <= LENGTHS["inputs"]
        options = info(name).options
        assert options is None or example["targets_pretokenized"].decode() in (*options, "<unk>")
    assert info(name).family != "default" and info(name).licence and info(name).citation
    for metric in info(name).metrics:
        metrics.lookup(metric)


def test_mixtures_hold_the_benchmarks():
    assert len(seqio.MixtureRegistry.get("glue").tasks) == 8
    assert len(seqio.MixtureRegistry.get("superglue").tasks) == 8
    assert len(seqio.MixtureRegistry.get("wmt").tasks) == 3


def test_importing_the_tasks_touches_no_dataset():
    assert not TOUCHED_BY_IMPORT
