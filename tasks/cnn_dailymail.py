"""CNN / Daily Mail (Hermann et al. 2015, See et al. 2017) as T5 reads it: 'summarize: <article>' → highlights."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from mtjax.tasks.preprocessors import join, map_examples
from mtjax.tasks.registration import add_task


def summarize(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Format an article."""
    return {"inputs": join("summarize:", example["article"]), "targets": example["highlights"]}


add_task(
    "cnn_dailymail",
    source=seqio.TfdsDataSource("cnn_dailymail:3.4.0", splits=["train", "validation", "test"]),
    preprocessors=[map_examples(summarize)],
    metrics=["rouge"],
    family="summarization",
    licence="Apache-2.0 (as distributed); the articles are their publishers'",
    citation="See et al. 2017, Get To The Point: Summarization with Pointer-Generator Networks",
    origin="tfds:cnn_dailymail",
)
