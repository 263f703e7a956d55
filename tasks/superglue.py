"""SuperGLUE (Wang et al. 2019) in T5's text-to-text format. Formats: Raffel et al. 2020, 2.4 and appendix D.

* ReCoRD: an entity is the target; each accepted answer makes a training example, evaluation has one example a
  query with all answers as references.
* MultiRC: each answer candidate is an example; `group` is its question, for group_exact_match.
* WSC: the pronoun is marked, its referent is the target. Only pairs that do corefer train (their other half has
  no right answer); in evaluation a prediction is compared with the candidate and `label` says if that is it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import seqio
import tensorflow as tf

from mtjax.tasks import preprocessors, sources
from mtjax.tasks.preprocessors import join, labelled
from mtjax.tasks.registration import add_task

VERSION = "1.0.2"
CITATION = (
    "Wang et al. 2019, SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems"
)
MAXIMUM = 300_000
SPLITS = {"train": "train", "validation": "validation"}
TRUTH = ("False", "True")
NUM_RECORD = {"train": 138_854, "validation": 10_000}  # one for each answer; one for each query
NUM_WSC = {"train": 259, "validation": 104}  # those that corefer; all

CLASSIFICATION = {
    # name: (family, fields of the prompt in order, labels by class number, metrics, citation)
    "boolq": ("reading_comprehension", ("question", "passage"), TRUTH, ("accuracy",), "Clark et al. 2019"),
    "cb": (
        "nli",
        ("hypothesis", "premise"),
        ("entailment", "contradiction", "neutral"),
        ("macro_f1", "accuracy"),
        "De Marneffe et al. 2019",
    ),
    "copa": (
        "commonsense",
        ("choice1", "choice2", "premise", "question"),
        ("choice1", "choice2"),
        ("accuracy",),
        "Roemmele et al. 2011",
    ),
    "rte": (
        "nli",
        ("hypothesis", "premise"),
        ("entailment", "not_entailment"),
        ("accuracy",),
        "Dagan et al. 2005",
    ),
    "wic": (
        "word_sense",
        ("sentence1", "sentence2", "word"),
        TRUTH,
        ("accuracy",),
        "Pilehvar and Camacho-Collados 2019",
    ),
}


def multirc(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Format an answer candidate of MultiRC, mark-up dropped."""
    text = tf.strings.regex_replace(example["paragraph"], "<br>", " ")
    fields = {name: name for name in ("question", "answer", "paragraph")}
    plain = {**example, "paragraph": tf.strings.regex_replace(text, "</?b>", "")}
    index = example["idx"]
    group = [tf.strings.as_string(index[name]) for name in ("paragraph", "question")]
    return {
        "inputs": join("multirc", *labelled(fields, plain)),
        "targets": preprocessors.label_text(example["label"], TRUTH),
        "group": tf.strings.join(group, separator="-"),
    }


def record_text(passage: tf.Tensor) -> tf.Tensor:
    """Join the highlights below a news passage to its text, each ended by a full stop unless it has an end."""
    text = tf.strings.regex_replace(passage, r"([.?!\"'])\n@highlight\n", r"\1 ")
    return tf.strings.regex_replace(text, r"\n@highlight\n", ". ")


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Format ReCoRD: an example for each answer in training, one in evaluation."""

    def expand(example: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        entities = tf.strings.reduce_join(example["entities"], separator=", ")
        text = join(
            "record query:",
            example["query"],
            "entities:",
            entities,
            "passage:",
            record_text(example["passage"]),
        )
        answers = example["answers"]
        used = tf.where(example["split"] == "train", tf.size(answers), 1)
        return tf.data.Dataset.from_tensor_slices(answers[:used]).map(
            lambda answer: {
                "inputs": text,
                "targets": answer,
                "references": answers,
                "choices": example["entities"],
            }
        )

    return dataset.flat_map(expand)


def wsc(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Format WSC: the pronoun between asterisks → the noun it may refer to."""

    def mark(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        words, pronoun = tf.strings.split(example["text"]), example["span2_text"]
        marked = tf.strings.regex_replace(words, pronoun, "*" + pronoun + "*", replace_global=False)
        words = tf.where(tf.range(tf.size(words)) == example["span2_index"], marked, words)
        return {
            "inputs": join("wsc:", tf.strings.reduce_join(words, separator=" ")),
            "targets": example["span1_text"],
            "label": preprocessors.label_text(example["label"], TRUTH),
        }

    def trains(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
        return (example["split"] != "train") | (example["label"] == 1)

    return dataset.filter(trains).map(mark, num_parallel_calls=tf.data.AUTOTUNE)


def _add(name: str, config: str, source: seqio.DataSource, preprocess, **facts) -> None:
    citation = facts.pop("citation")
    add_task(
        f"superglue_{name}",
        source=source,
        preprocessors=[preprocess],
        licence="as the component data sets; research use",
        citation=f"{citation}; {CITATION}",
        origin=f"tfds:super_glue/{config}",
        **facts,
    )


for _name, (_family, _fields, _labels, _metrics, _citation) in CLASSIFICATION.items():
    _add(
        _name,
        _name,
        seqio.TfdsDataSource(f"super_glue/{_name}:{VERSION}", splits=SPLITS),
        preprocessors.classification(_name, {field: field for field in _fields}, _labels),
        family=_family,
        options=_labels,
        metrics=_metrics,
        citation=_citation,
    )
_add(
    "multirc",
    "multirc",
    seqio.TfdsDataSource(f"super_glue/multirc:{VERSION}", splits=SPLITS),
    preprocessors.map_examples(multirc),
    family="reading_comprehension",
    options=TRUTH,
    metrics=("f1:True", "group_exact_match"),
    citation="Khashabi et al. 2018",
)
_add(
    "record",
    "record",
    sources.tfds_with_split(f"super_glue/record:{VERSION}", SPLITS, NUM_RECORD),
    record,
    family="reading_comprehension",
    metrics=("squad_em", "squad_f1"),
    citation="Zhang et al. 2018",
)
_add(
    "wsc",
    "wsc.fixed",
    sources.tfds_with_split(f"super_glue/wsc.fixed:{VERSION}", SPLITS, NUM_WSC),
    wsc,
    family="coreference",
    metrics=("referent_accuracy",),
    citation="Levesque et al. 2012",
)
seqio.MixtureRegistry.add(
    "superglue",
    [f"superglue_{name}" for name in (*CLASSIFICATION, "multirc", "record", "wsc")],
    default_rate=functools.partial(seqio.mixing_rate_num_examples, maximum=MAXIMUM),
)
