"""Let SeqIO's own Evaluator compute the metrics of mtjax.metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtjax import metrics


def _text(value: Any) -> Any:
    """Decode bytes, also inside lists and arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value
    return [_text(item) for item in value]


def keep_references(
    output: str, *, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> str | dict[str, Any]:
    """Postprocess for SeqIO: a target becomes the example's text fields that metrics need, a prediction stays."""
    if not is_target or example is None:
        return output
    fields = {name: _text(example[name]) for name in metrics.FIELDS if name in example}
    original = _text(example.get("targets_pretokenized", output))
    return {**fields, "targets": original if isinstance(original, str) else output}


def _columns(targets: Sequence[str | Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Any]]]:
    """Split SeqIO's postprocessed targets into the target texts and the lists of further fields."""
    rows = [{"targets": target} if isinstance(target, str) else dict(target) for target in targets]
    texts = [row.pop("targets") for row in rows]
    return texts, metrics.columns(rows)


def metric_fn(name: str) -> Callable[..., dict[str, float]]:
    """Return SeqIO's metric function of a metric known by name.

    Raises ValueError on an unknown name.
    """
    metric = metrics.lookup(name)

    def predict_metric(targets, predictions):
        texts, fields = _columns(targets)
        return metric(texts, list(predictions), **fields)

    def score_metric(targets, scores):
        texts, fields = _columns(targets)
        # SeqIO may pair the scores with auxiliary values.
        values = scores[0] if isinstance(scores, tuple) else scores
        return metric(texts, [float(value) for value in values], **fields)

    function = score_metric if metric.takes == "scores" else predict_metric
    function.__name__ = name
    return function
