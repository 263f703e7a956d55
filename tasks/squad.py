"""SQuAD 1.1 (Rajpurkar et al. 2016) as T5 reads it: 'question: <q> context: <c>' → the first answer.

Punctuation is set apart by spaces, as in T5's training data; the metrics drop it anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from mtjax.tasks.preprocessors import join, map_examples, pad_punctuation
from mtjax.tasks.registration import add_task


def question_answering(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Format a question; all its answers are references."""
    answers = pad_punctuation(example["answers"]["text"])
    question, context = pad_punctuation(example["question"]), pad_punctuation(example["context"])
    return {
        "inputs": join("question:", question, "context:", context),
        "targets": answers[0],
        "references": answers,
    }


add_task(
    "squad",
    source=seqio.TfdsDataSource("squad/v1.1:3.0.0", splits=["train", "validation"]),
    preprocessors=[map_examples(question_answering)],
    metrics=["squad_em", "squad_f1"],
    family="reading_comprehension",
    licence="CC BY-SA 4.0",
    citation="Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text",
    origin="tfds:squad/v1.1",
)
