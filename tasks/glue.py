"""GLUE (Wang et al. 2019) in T5's text-to-text format: '<task> <field>: <text> ...' → name of the class.

Formats: Raffel et al. 2020, section 2.4 and appendix D. WNLI is left out, as there. The test splits have no
labels; MNLI's mismatched validation examples are its split `validation_mismatched`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import seqio
import tensorflow as tf

from mtjax.tasks import preprocessors
from mtjax.tasks.registration import add_task

VERSION = "2.0.0"
CITATION = (
    "Wang et al. 2019, GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding"
)
MAXIMUM = 300_000
SPLITS = {"train": "train", "validation": "validation"}
MNLI_SPLITS = {
    "train": "train",
    "validation": "validation_matched",
    "validation_mismatched": "validation_mismatched",
}
SENTENCES = {"sentence1": "sentence1", "sentence2": "sentence2"}


class Definition(NamedTuple):
    """`fields` maps the words of the prompt to fields of the example; `labels` are by class number."""

    family: str
    fields: Mapping[str, str]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    citation: str
    splits: Mapping[str, str] = SPLITS


TASKS = {
    "cola": Definition(
        "acceptability",
        {"sentence": "sentence"},
        ("unacceptable", "acceptable"),
        ("matthews_corrcoef", "accuracy"),
        "Warstadt et al. 2019",
    ),
    "sst2": Definition(
        "sentiment", {"sentence": "sentence"}, ("negative", "positive"), ("accuracy",), "Socher et al. 2013"
    ),
    "mrpc": Definition(
        "paraphrase",
        SENTENCES,
        ("not_equivalent", "equivalent"),
        ("f1:equivalent", "accuracy"),
        "Dolan and Brockett 2005",
    ),
    "qqp": Definition(
        "paraphrase",
        {"question1": "question1", "question2": "question2"},
        ("not_duplicate", "duplicate"),
        ("f1:duplicate", "accuracy"),
        "Iyer et al. 2017",
    ),
    "mnli": Definition(
        "nli",
        {"hypothesis": "hypothesis", "premise": "premise"},
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        "Williams et al. 2018",
        MNLI_SPLITS,
    ),
    "qnli": Definition(
        "nli",
        {"question": "question", "sentence": "sentence"},
        ("entailment", "not_entailment"),
        ("accuracy",),
        "Rajpurkar et al. 2016",
    ),
    "rte": Definition("nli", SENTENCES, ("entailment", "not_entailment"), ("accuracy",), "Dagan et al. 2005"),
}
SCORES = tuple(f"{fifths / 5:.1f}" for fifths in range(26))


def similarity(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Format STS-B: the score from 0 to 5, rounded to fifths, is spelled out (T5, section 2.4)."""
    return {
        "inputs": preprocessors.join("stsb", *preprocessors.labelled(SENTENCES, example)),
        "targets": tf.strings.as_string(tf.round(example["label"] * 5) / 5, precision=1),
    }


def _add(
    name: str,
    preprocess: Callable[[tf.data.Dataset], tf.data.Dataset],
    *,
    splits: Mapping[str, str],
    metrics: tuple[str, ...],
    family: str,
    options: tuple[str, ...],
    citation: str,
) -> None:
    add_task(
        f"glue_{name}",
        source=seqio.TfdsDataSource(f"glue/{name}:{VERSION}", splits=splits),
        preprocessors=[preprocess],
        metrics=metrics,
        family=family,
        licence="as the component data sets; research use",
        citation=f"{citation}; {CITATION}",
        options=options,
        origin=f"tfds:glue/{name}",
    )


for _name, _task in TASKS.items():
    _add(
        _name,
        preprocessors.classification(_name, _task.fields, _task.labels),
        splits=_task.splits,
        metrics=_task.metrics,
        family=_task.family,
        options=_task.labels,
        citation=_task.citation,
    )
_add(
    "stsb",
    preprocessors.map_examples(similarity),
    splits=SPLITS,
    metrics=("pearson_corrcoef", "spearman_corrcoef"),
    family="paraphrase",
    options=SCORES,
    citation="Cer et al. 2017",
)
seqio.MixtureRegistry.add(
    "glue",
    [f"glue_{name}" for name in (*TASKS, "stsb")],
    default_rate=functools.partial(seqio.mixing_rate_num_examples, maximum=MAXIMUM),
)
