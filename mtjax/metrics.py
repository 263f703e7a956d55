"""Metrics of text outputs, by name: sums per example on one side, scores from their total on the other.

`METRICS[name](targets, predictions, references=..., ...)` gives scores by name, 0 to 100 (bits_per_byte: bits).
Because every metric is a function of summed statistics, one bootstrap serves all of them. Texts are compared
case-folded and with single spaces unless a metric says otherwise. No TensorFlow.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtjax import tree

FIELDS = ("references", "choices", "source", "group", "label")
"""Fields of an example, beside its target, that some metric reads: all accepted answers; the options of this
example; the text to rewrite, without a prompt (sari); what a question's examples share (group_exact_match);
whether the target is the right one, True or False (referent_accuracy)."""

Fields = Mapping[str, Sequence[Any]]  # a list per field, aligned with the targets
SENTINEL = re.compile(r"<extra_id_\d+>")


class Metric(NamedTuple):
    """`statistics` gives float64 [N, K], sums that add over examples; `aggregate` turns a total [K] into scores."""

    statistics: Callable[..., Any]  # (targets, predictions, fields)
    aggregate: Callable[[np.ndarray], dict[str, float]]
    takes: str = "predictions"  # or "scores": log-likelihoods of the targets, in nats
    lower_is_better: bool = False

    def __call__(
        self, targets: Sequence[str], predictions: Sequence[Any], **fields: Sequence[Any] | None
    ) -> dict[str, float]:
        """Return scores by name. Raises ValueError on no examples or lists of different lengths."""
        return self.aggregate(self.sums(targets, predictions, **fields).sum(axis=0))

    def sums(
        self, targets: Sequence[str], predictions: Sequence[Any], **fields: Sequence[Any] | None
    ) -> np.ndarray:
        """Return the checked statistics per example, float64 [N, K]."""
        given = {name: values for name, values in fields.items() if values is not None}
        if not targets:
            raise ValueError("There are no examples to score.")
        for name, values in {"predictions": predictions, **given}.items():
            if len(values) != len(targets):
                raise ValueError(
                    f"{len(targets)} targets but {len(values)} {name}; give one for each target."
                )
        return np.asarray(self.statistics(targets, predictions, given), np.float64)


def columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Gather the FIELDS that any example has; None where an example lacks one."""
    names = [name for name in FIELDS if any(name in example for example in examples)]
    return {name: [example.get(name) for example in examples] for name in names}


# Text.


def normalise(text: str) -> str:
    """Fold case and whitespace."""
    return " ".join(text.casefold().split())


def normalise_answer(text: str) -> str:
    """Lower-case and drop punctuation, English articles and extra spaces (SQuAD, Rajpurkar et al. 2016)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _answers(targets: Sequence[str], fields: Fields) -> list[list[str]]:
    """Return all accepted answers of each example: its references, or else its target."""
    references = fields.get("references") or [None] * len(targets)
    return [
        list(accepted) if accepted is not None and len(accepted) else [target]
        for target, accepted in zip(targets, references, strict=True)
    ]


# Means of a value per example.


def mean(
    name: str,
    value: Callable[[list[str], str], float],
    *,
    accepted: Callable[[Sequence[str], Fields], list[list[str]]] = _answers,
) -> Metric:
    """Build the metric that averages value(accepted answers, prediction), a number from 0 to 1."""

    def statistics(targets, predictions, fields):
        answers = accepted(targets, fields)
        return [(value(a, p), 1.0) for a, p in zip(answers, predictions, strict=True)]

    return Metric(statistics, lambda total: {name: 100 * float(total[0] / total[1])})


def _only_target(targets: Sequence[str], fields: Fields) -> list[list[str]]:
    del fields
    return [[target] for target in targets]


def _equals(answers: list[str], prediction: str) -> float:
    return float(normalise(prediction) in map(normalise, answers))


def _squad_em(answers: list[str], prediction: str) -> float:
    return float(normalise_answer(prediction) in map(normalise_answer, answers))


def _overlap_f1(target: collections.Counter, prediction: collections.Counter) -> float:
    """Return the F1 of two multisets; two empty ones agree."""
    size = target.total() + prediction.total()
    return 2 * (target & prediction).total() / size if size else 1.0


def _squad_f1(answers: list[str], prediction: str) -> float:
    words = collections.Counter(normalise_answer(prediction).split())
    return max(_overlap_f1(collections.Counter(normalise_answer(a).split()), words) for a in answers)


def _items(text: str) -> collections.Counter:
    """Return the set of items between commas, each counted once."""
    return collections.Counter({normalise(item) for item in text.split(",")} - {""})


def _set_f1(answers: list[str], prediction: str) -> float:
    return max(_overlap_f1(_items(answer), _items(prediction)) for answer in answers)


_NUMBER = re.compile(r"[-−]?(?:\d[\d,]*)?\.?\d+")


def final_number(text: str) -> float | None:
    """Return the last number in a text, commas between thousands removed; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def _final_number_equals(answers: list[str], prediction: str) -> float:
    number = final_number(prediction)
    return float(number is not None and number in map(final_number, answers))


# F1 of counts: true positives, predicted, expected.


def _f1(counts: np.ndarray) -> np.ndarray:
    """Return 2·hits / (predicted + expected) over the last dim [hits, predicted, expected]; 1 where all are 0."""
    hits, size = counts[..., 0], counts[..., 1] + counts[..., 2]
    return np.where(size > 0, 2 * hits / np.maximum(size, 1), 1.0)


def _counts(target: collections.Counter, prediction: collections.Counter) -> tuple[int, int, int]:
    return (target & prediction).total(), prediction.total(), target.total()


def micro(name: str, parts: Callable[[str], collections.Counter]) -> Metric:
    """Build the F1 of all examples' parts counted together."""

    def statistics(targets, predictions, fields):
        del fields
        return [_counts(parts(t), parts(p)) for t, p in zip(targets, predictions, strict=True)]

    return Metric(statistics, lambda total: {name: 100 * float(_f1(total))})


def _pairs(text: str, separator: str) -> collections.Counter:
    """Return the multiset of 'name<separator>value' parts between semicolons; 'none' has no part."""
    if normalise(text) == "none":
        return collections.Counter()
    parts = (part.partition(separator) for part in text.split(";"))
    pairs = ((normalise(name), normalise(value)) for name, _, value in parts)
    return collections.Counter(pair for pair in pairs if any(pair))


def _macro_statistics(targets, predictions, fields):
    """Return [hits, predicted, expected] for every label that occurs in the targets, flattened."""
    del fields
    labels = sorted(set().union(*map(_items, targets)))
    column = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(targets), len(labels), 3))
    for row, target, prediction in zip(counts, map(_items, targets), map(_items, predictions), strict=True):
        for label in prediction.keys() & column.keys():
            row[column[label], 0] = label in target
            row[column[label], 1] = 1
        row[[column[label] for label in target], 2] = 1
    return counts.reshape(len(targets), -1)


def _macro_f1(total: np.ndarray) -> dict[str, float]:
    counts = total.reshape(-1, 3)
    present = counts[counts[:, 2] > 0]  # a bootstrap sample may lack a label
    return {"macro_f1": 100 * float(_f1(present).mean()) if len(present) else 0.0}


def label_f1(label: str) -> Metric:
    """Build the F1 of one label against all else (MRPC, QQP, MultiRC)."""

    def is_label(text: str) -> collections.Counter:
        return collections.Counter({label: int(normalise(text) == normalise(label))})

    return micro("f1", is_label)


def _token_statistics(targets, predictions, fields):
    """Return [agreeing positions, positions of the longer side]: a wrong number of tokens costs."""
    del fields
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        want, have = target.casefold().split(), prediction.casefold().split()
        agree = sum(a == b for a, b in zip(want, have, strict=False))
        rows.append((agree, max(len(want), len(have), 1)))
    return rows


def _group_statistics(targets, predictions, fields):
    """Return, at the first example of each group, [whether all of the group are right, 1]; zeros elsewhere."""
    groups = fields.get("group") or range(len(targets))
    right: dict[Any, bool] = {}
    first: dict[Any, int] = {}
    for i, (group, target, prediction) in enumerate(zip(groups, targets, predictions, strict=True)):
        first.setdefault(group, i)
        right[group] = right.get(group, True) and bool(_equals([target], prediction))
    rows = np.zeros((len(targets), 2))
    for group, i in first.items():
        rows[i] = right[group], 1
    return rows


_DETERMINERS = frozenset(
    (
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "some",
        "my",
        "our",
        "your",
        "his",
        "her",
        "its",
        "their",
    )
)


def _names_same(target: str, prediction: str) -> bool:
    """Tell whether the words of one noun phrase, determiners aside, are among those of the other."""
    want, have = (set(normalise_answer(text).split()) - _DETERMINERS for text in (target, prediction))
    return bool(want and have) and (want <= have or have <= want)


def _referent_statistics(targets, predictions, fields):
    """Return [whether 'the prediction names the target' is as `label` says, 1] (WSC, T5 section 2.4)."""
    labels = fields.get("label") or ["True"] * len(targets)
    pairs = zip(targets, predictions, labels, strict=True)
    return [(_names_same(t, p) == (normalise(str(label)) == "true"), 1.0) for t, p, label in pairs]


# Correlations.


def _matthews_statistics(targets, predictions, fields):
    """Return the confusion matrix [target, prediction], flattened; the last class is 'anything else'."""
    del fields
    labels = sorted(set(map(normalise, targets)))
    column = {label: i for i, label in enumerate(labels)}
    size = len(labels) + 1
    confusion = np.zeros((len(targets), size, size))
    for row, target, prediction in zip(confusion, targets, predictions, strict=True):
        row[column[normalise(target)], column.get(normalise(prediction), size - 1)] = 1
    return confusion.reshape(len(targets), -1)


def _matthews(total: np.ndarray) -> dict[str, float]:
    """Gorodkin 2004's coefficient of K classes; 0 where either side is constant."""
    size = round(len(total) ** 0.5)
    confusion = total.reshape(size, size)
    n, correct = confusion.sum(), np.trace(confusion)
    want, have = confusion.sum(axis=1), confusion.sum(axis=0)
    scale = np.sqrt(n**2 - want @ want) * np.sqrt(n**2 - have @ have)
    return {"matthews_corrcoef": 100 * float((correct * n - want @ have) / scale) if scale else 0.0}


def _numbers(texts: Sequence[str]) -> np.ndarray:
    """Read each text as a number; 0 where it is none, so that a correlation stays defined."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            return 0.0
        return value if np.isfinite(value) else 0.0

    return np.array([number(text) for text in texts])


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _correlation(total: np.ndarray) -> float:
    n, x, y, xx, yy, xy = total
    scale = np.sqrt(max(n * xx - x * x, 0.0)) * np.sqrt(max(n * yy - y * y, 0.0))
    return 100 * float((n * xy - x * y) / scale) if scale > 1e-12 * n * n else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _pearson_statistics(targets, predictions, fields):
    del fields
    return _moments(_numbers(targets), _numbers(predictions))


def _spearman_statistics(targets, predictions, fields):
    del fields
    return _moments(_ranks(_numbers(targets)), _ranks(_numbers(predictions)))


# Generation, from rouge-score and sacrebleu.

ROUGE = ("rouge1", "rouge2", "rougeLsum")


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)


def _rouge_statistics(targets, predictions, fields):
    """Return F1 per variant and 1, best over references; ROUGE-Lsum's sentences are lines."""
    rows = []
    for answers, prediction in zip(_answers(targets, fields), predictions, strict=True):
        lines = [re.sub(r"(?<=[.!?]) +", "\n", text) for text in (prediction, *answers)]
        scores = _rouge_scorer().score_multi(lines[1:], lines[0])
        rows.append([*(scores[variant].fmeasure for variant in ROUGE), 1.0])
    return rows


def _rouge(total: np.ndarray) -> dict[str, float]:
    return {name: 100 * float(value / total[-1]) for name, value in zip(ROUGE, total, strict=False)}


_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_UNSPACED = re.compile(
    r"[\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)  # kana, Thai, Lao, Burmese, Khmer


@functools.cache
def _sacrebleu(name: str, tokenizer: str | None = None):
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if name == "chrf":
        return CHRF()
    return BLEU(tokenize=tokenizer, force=True)  # force: do not warn about tokenised text


def bleu_tokenizer(texts: Sequence[str]) -> str | None:
    """Choose sacrebleu's tokenizer: its default, '13a', sees one word in a sentence written without spaces.

    'zh' for Chinese, 'char' for other scripts without spaces, where they are a third of the characters.
    """
    text = "".join("".join(texts).split())
    han, unspaced = len(_HAN.findall(text)), len(_UNSPACED.findall(text))
    if 3 * (han + unspaced) < max(len(text), 1):
        return None
    return "zh" if 20 * unspaced < han else "char"


def _corpus_metric(name: str) -> Metric:
    """Build sacrebleu's corpus score, at its default settings but for the tokenizer.

    The two private methods are those its own significance tests resample with.
    """

    def statistics(targets, predictions, fields):
        answers = _answers(targets, fields)
        width = max(map(len, answers))
        # sacrebleu skips None, which its types leave out.
        streams: Any = [[a[i] if i < len(a) else None for a in answers] for i in range(width)]
        tokenizer = bleu_tokenizer(targets) if name == "bleu" else None
        return _sacrebleu(name, tokenizer)._extract_corpus_statistics(list(predictions), streams)

    def aggregate(total):
        return {name: float(_sacrebleu(name)._compute_score_from_stats(list(total)).score)}

    return Metric(statistics, aggregate)


def _ngrams(words: Sequence[str], size: int) -> collections.Counter:
    return collections.Counter(zip(*(words[i:] for i in range(size)), strict=False))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def sari(source: Sequence[str], prediction: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return SARI of one tokenised sentence, 0 to 1 (Xu et al. 2016, equations 3 to 8).

    Kept and deleted n-grams are weighted by the share of references that agree; 0/0 counts as 1.
    """
    total = 0.0
    for size in range(1, 5):
        have, was = _ngrams(prediction, size), _ngrams(source, size)
        agree: collections.Counter = collections.Counter()
        for reference in references:
            agree += _ngrams(reference, size)
        times = len(references)
        was_R = collections.Counter({gram: count * times for gram, count in was.items()})
        have_R = collections.Counter({gram: count * times for gram, count in have.items()})

        kept, keep = was_R & have_R, was_R & agree
        good = kept & agree
        precision = _ratio(sum(good[gram] / kept[gram] for gram in good), len(kept))
        recall = _ratio(good.total(), keep.total())
        deleted = was_R - have_R
        good = deleted - agree
        deletion = _ratio(sum(good[gram] / deleted[gram] for gram in good), len(deleted))
        added, add = have.keys() - was.keys(), agree.keys() - was.keys()
        hits = len(added & add)
        addition = _harmonic(_ratio(hits, len(added)), _ratio(hits, len(add)))
        total += (_harmonic(precision, recall) + deletion + addition) / 3
    return total / 4


@functools.cache
def _tokenizer():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _sari_statistics(targets, predictions, fields):
    if "source" not in fields:
        raise ValueError("sari compares with the text to rewrite; give it as `source`, without the prompt.")

    def words(text: str) -> list[str]:
        return _tokenizer()(text.lower()).split()

    rows = zip(fields["source"], predictions, _answers(targets, fields), strict=True)
    return [(sari(words(s), words(p), [words(a) for a in answers]), 1.0) for s, p, answers in rows]


# Likelihood.


def _bits_statistics(targets, scores, fields):
    """Return [bits, UTF-8 bytes] of each target, sentinels not counted as text."""
    del fields
    sizes = [len(SENTINEL.sub("", target).encode()) for target in targets]
    return [(-score / np.log(2), size) for score, size in zip(scores, sizes, strict=True)]


METRICS: dict[str, Metric] = {
    "accuracy": mean("accuracy", _equals, accepted=_only_target),
    "exact_match": mean("exact_match", _equals, accepted=_only_target),
    "exact_match_any": mean("exact_match_any", _equals),
    "squad_em": mean("squad_em", _squad_em),
    "squad_f1": mean("squad_f1", _squad_f1),
    "token_f1": mean("token_f1", _squad_f1),
    "set_f1": mean("set_f1", _set_f1),
    "final_number_accuracy": mean("final_number_accuracy", _final_number_equals),
    "macro_f1": Metric(_macro_statistics, _macro_f1),
    "micro_f1": micro("micro_f1", _items),
    "entity_f1": micro("entity_f1", lambda text: _pairs(text, ":")),
    "slot_f1": micro("slot_f1", lambda text: _pairs(text, "=")),
    "token_accuracy": Metric(
        _token_statistics, lambda total: {"token_accuracy": 100 * float(total[0] / total[1])}
    ),
    "group_exact_match": Metric(
        _group_statistics, lambda total: {"group_exact_match": 100 * float(total[0] / max(total[1], 1))}
    ),
    "referent_accuracy": Metric(
        _referent_statistics, lambda total: {"referent_accuracy": 100 * float(total[0] / total[1])}
    ),
    "matthews_corrcoef": Metric(_matthews_statistics, _matthews),
    "pearson_corrcoef": Metric(_pearson_statistics, lambda total: {"pearson_corrcoef": _correlation(total)}),
    "spearman_corrcoef": Metric(
        _spearman_statistics, lambda total: {"spearman_corrcoef": _correlation(total)}
    ),
    "rouge": Metric(_rouge_statistics, _rouge),
    "bleu": _corpus_metric("bleu"),
    "chrf": _corpus_metric("chrf"),
    "sari": Metric(_sari_statistics, lambda total: {"sari": 100 * float(total[0] / total[1])}),
    "bits_per_byte": Metric(
        _bits_statistics,
        lambda total: {"bits_per_byte": float(total[0] / max(total[1], 1))},
        takes="scores",
        lower_is_better=True,
    ),
}


def lookup(name: str) -> Metric:
    """Return the metric called `name`; 'f1:LABEL' is the F1 of one label.

    Raises ValueError with the nearest names where there is none.
    """
    kind, _, label = name.partition(":")
    if kind == "f1" and label:
        return label_f1(label)
    if name not in METRICS:
        raise tree.unknown_name("metric", name, [*METRICS, "f1:LABEL"])
    return METRICS[name]


# Intervals and trivial baselines.


class Interval(NamedTuple):
    """A score and its bootstrap interval."""

    score: float
    low: float
    high: float


def bootstrap(
    metric: Metric, sums: np.ndarray, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Return each score with its percentile interval over resampled examples (Efron and Tibshirani 1993).

    `sums` are metric.sums(...), float64 [N, K].
    """
    generator = np.random.default_rng(seed)
    size = len(sums)
    totals = (
        generator.multinomial(size, np.full(size, 1 / size)).astype(np.float64) @ sums for _ in range(samples)
    )
    drawn = [metric.aggregate(total) for total in totals]
    tail = 50 * (1 - confidence)
    return {
        name: Interval(score, *np.percentile([d[name] for d in drawn], [tail, 100 - tail]).tolist())
        for name, score in metric.aggregate(sums.sum(axis=0)).items()
    }


def majority(targets: Iterable[str]) -> str:
    """Return the most frequent target; the alphabetically first of equals."""
    counts = collections.Counter(targets)
    if not counts:
        raise ValueError("There are no training targets to take the most frequent from.")
    return min(counts, key=lambda target: (-counts[target], target))


def baselines(
    name: str,
    *,
    train_targets: Sequence[str],
    inputs: Sequence[str],
    targets: Sequence[str],
    samples: int = 1000,
    **fields: Sequence[Any] | None,
) -> dict[str, dict[str, Interval]]:
    """Score the trivial predictors of a metric of texts: 'majority' and 'copy' of the input.

    Returns scores with intervals by predictor and score name.
    """
    metric = lookup(name)
    if metric.takes != "predictions":
        raise ValueError(f"{name} scores likelihoods: its baseline is `unigram_bits`.")
    guesses = {"majority": [majority(train_targets)] * len(targets), "copy": list(inputs)}
    return {
        guess: bootstrap(metric, metric.sums(targets, predictions, **fields), samples=samples)
        for guess, predictions in guesses.items()
    }


def unigram_bits(
    train: Iterable[Sequence[int]], test: Iterable[Sequence[int]], *, vocabulary_size: int
) -> np.ndarray:
    """Return the bits of each test sequence under the add-one unigram model of the training tokens, float64 [N].

    Divide by the bytes of the text for bits per byte; `bootstrap` takes [bits, bytes] per row.
    """
    counts = np.ones(vocabulary_size)
    for tokens in train:
        np.add.at(counts, np.asarray(tokens, np.int64), 1)
    bits = np.log2(counts.sum()) - np.log2(counts)
    return np.array([bits[np.asarray(tokens, np.int64)].sum() for tokens in test])
