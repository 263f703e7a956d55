"""Register a text-to-text task: strings `inputs` and `targets` in, SeqIO's usual steps behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import seqio

from mtjax.tasks import evaluation, vocabularies
from mtjax.tasks.info import describe


def output_features(vocabulary: seqio.Vocabulary | None = None) -> dict[str, seqio.Feature]:
    """Return the features `inputs` and `targets` over a vocabulary (the default one unless given)."""
    vocabulary = vocabulary or vocabularies.default_vocabulary()
    return {name: seqio.Feature(vocabulary=vocabulary, add_eos=True) for name in ("inputs", "targets")}


def add_task(
    name: str,
    *,
    source: seqio.DataSource,
    preprocessors: Sequence[Callable[..., Any]] = (),
    online: Sequence[Callable[..., Any]] = (),
    metrics: Sequence[str],
    family: str,
    licence: str = "",
    citation: str = "",
    options: Sequence[str] | None = None,
    origin: str = "",
    vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
    """Register and describe a task.

    `preprocessors` turn the source's examples into strings `inputs` and `targets`; further string fields
    (`references`, `choices`) pass through to the metrics. `online` ones (span corruption) run on token ids
    after the cache. Raises ValueError on an unknown metric or a name in use.
    """
    task = seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            *preprocessors,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            *online,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=output_features(vocabulary),
        postprocess_fn=evaluation.keep_references,
        metric_fns=[evaluation.metric_fn(metric) for metric in metrics],
    )
    describe(
        name,
        family=family,
        licence=licence,
        citation=citation,
        options=options,
        metrics=metrics,
        source=origin,
    )
    return task
