"""Metrics by name: hand-computed values, agreement with the libraries, intervals and trivial baselines."""

import math

import numpy as np
import pytest
import sacrebleu.metrics
import scipy.stats
import sklearn.metrics
import sklearn.preprocessing
from rouge_score import rouge_scorer

from mtjax import metrics

LABELS = ["red", "green", "blue"]


def score(name, targets, predictions, **fields):
    (value,) = metrics.lookup(name)(targets, predictions, **fields).values()
    return value


def drawn(count, *, seed, labels=LABELS):
    generator = np.random.default_rng(seed)
    return [labels[i] for i in generator.integers(len(labels), size=count)]


@pytest.mark.parametrize(
    ("name", "targets", "predictions", "fields", "expected"),
    [
        ("accuracy", ["Yes", "no"], [" YES ", "maybe"], {}, 50),
        ("exact_match", ["a  b", "c", "d"], ["A b", "c", "c"], {}, 200 / 3),
        ("exact_match", ["a"], ["b"], {"references": [["b"]]}, 0),  # the target alone counts
        ("exact_match_any", ["a", "b"], ["A1", "b"], {"references": [["a", "a1"], None]}, 100),
        ("squad_em", ["the Tower."], ["tower"], {}, 100),
        # "eiffel tower" against "eiffel tower in paris": 2 common of 2 and 4 words
        ("squad_f1", ["The Eiffel Tower"], ["Eiffel tower in Paris!"], {}, 100 * 2 * 2 / 6),
        ("squad_f1", ["x"], ["b c"], {"references": [["a b"[::-1], "b c d"]]}, 100 * 2 * 2 / 5),
        ("token_f1", ["a", "one two"], ["the", "two two"], {}, 75),  # articles alone are empty answers: equal
        ("set_f1", ["dog, eagle, kangaroo"], ["eagle,dog, dog"], {}, 100 * 2 * 2 / 5),
        ("set_f1", ["a,b", "c"], ["b, a", "d"], {}, 50),
        ("entity_f1", ["gene: A ; drug: B", "none"], ["drug: b; gene: C", "none"], {}, 50),
        ("entity_f1", ["x: A ; x: A"], ["x: A"], {}, 100 * 2 * 1 / 3),  # a multiset
        ("entity_f1", ["none"], ["None"], {}, 100),
        ("entity_f1", ["none", "x: a"], ["x: a", "none"], {}, 0),
        ("slot_f1", ["time = 11:15 ; people = 2"], ["people=2 ; time = 11"], {}, 50),
        ("token_accuracy", ["N V N", "N"], ["N N N", "N V"], {}, 100 * 3 / 5),
        ("final_number_accuracy", ["#### 1,234", "2"], ["so 5 is 1234.", "3"], {}, 50),
        ("final_number_accuracy", ["-7", "0.5"], ["It is -7.0", ".5 apples"], {}, 100),
        ("final_number_accuracy", ["7"], ["seven"], {}, 0),
        ("micro_f1", ["joy, fear", "joy"], ["joy", "fear"], {}, 100 * 2 * 1 / (2 + 3)),
        # joy: 1 hit of 1 predicted, 2 expected; fear: 0 of 1, 1
        ("macro_f1", ["joy, fear", "joy"], ["joy", "fear"], {}, (100 * 2 / 3 + 0) / 2),
        ("f1:yes", ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"], {}, 50),
        ("group_exact_match", ["T", "F", "T"], ["T", "T", "T"], {"group": ["0", "0", "1"]}, 50),
        ("referent_accuracy", ["The big dog"], ["dog"], {"label": ["True"]}, 100),
        ("referent_accuracy", ["the dog", "Tom"], ["a cat", "Ann"], {"label": ["True", "False"]}, 50),
        ("referent_accuracy", ["the dog"], [""], {}, 0),
        ("bits_per_byte", ["ab<extra_id_1>", "é"], [-3 * math.log(2), -5 * math.log(2)], {}, 2.0),
    ],
)
def test_values_computed_by_hand(name, targets, predictions, fields, expected):
    assert score(name, targets, predictions, **fields) == pytest.approx(expected)


def test_macro_and_micro_f1_agree_with_scikit_learn():
    targets, predictions = drawn(200, seed=0), drawn(200, seed=1, labels=[*LABELS, "garbage"])
    expected = sklearn.metrics.f1_score(targets, predictions, labels=LABELS, average="macro", zero_division=0)
    assert score("macro_f1", targets, predictions) == pytest.approx(100 * expected)
    expected = sklearn.metrics.f1_score(targets, predictions, average="micro", zero_division=0)
    assert score("micro_f1", targets, predictions) == pytest.approx(100 * expected)


def test_f1_of_several_labels_agrees_with_scikit_learn():
    pairs = zip(drawn(60, seed=2), drawn(60, seed=3), strict=True)
    targets = [", ".join(sorted(set(pair))) for pair in pairs]
    predictions = drawn(60, seed=4)
    binary = sklearn.preprocessing.MultiLabelBinarizer(classes=LABELS)
    sets = [[text.split(", ") for text in texts] for texts in (targets, predictions)]
    want, have = binary.fit_transform(sets[0]), binary.transform(sets[1])
    for average in ("macro", "micro"):
        expected = sklearn.metrics.f1_score(want, have, average=average)
        assert score(f"{average}_f1", targets, predictions) == pytest.approx(100 * expected)


def test_correlations_agree_with_scikit_learn_and_scipy():
    for labels in (LABELS[:2], LABELS):
        targets, noise = drawn(150, seed=5, labels=labels), drawn(150, seed=6, labels=labels)
        predictions = [t if i % 3 else n for i, (t, n) in enumerate(zip(targets, noise, strict=True))]
        expected = sklearn.metrics.matthews_corrcoef(targets, predictions)
        assert score("matthews_corrcoef", targets, predictions) == pytest.approx(100 * expected)
    x = np.random.default_rng(7).integers(0, 26, size=80) / 5
    y = np.clip(np.round((x + np.random.default_rng(8).normal(size=80)) * 5) / 5, 0, 5)
    texts = [[f"{value:.1f}" for value in values] for values in (x, y)]
    assert score("pearson_corrcoef", *texts) == pytest.approx(100 * scipy.stats.pearsonr(x, y)[0])
    assert score("spearman_corrcoef", *texts) == pytest.approx(100 * scipy.stats.spearmanr(x, y)[0])


def test_correlations_of_constant_or_senseless_predictions_are_zero():
    for name in ("pearson_corrcoef", "spearman_corrcoef"):
        assert score(name, ["1.0", "2.0", "3.0"], ["4.0"] * 3) == 0
        assert score(name, ["1.0", "2.0", "3.0"], ["what", "nan", "inf"]) == 0
    assert score("matthews_corrcoef", ["a", "b"], ["a", "a"]) == 0


TEXTS = {
    "targets": ["The cat sat on the mat today.", "Hello there, world!", "One two three four five six."],
    "predictions": ["A cat sat on the mat.", "Hello world!", "six five four three"],
    "references": [
        ["The cat sat on the mat today.", "A cat sat on the mat now."],
        ["Hello there, world!"],
        None,
    ],
}


@pytest.mark.parametrize(("name", "library"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_corpus_scores_are_those_of_sacrebleu(name, library):
    metric = getattr(sacrebleu.metrics, library)()
    targets, predictions = TEXTS["targets"], TEXTS["predictions"]
    assert score(name, targets, predictions) == pytest.approx(
        metric.corpus_score(predictions, [targets]).score
    )
    second = [TEXTS["references"][0][1], None, None]
    expected = metric.corpus_score(predictions, [targets, second]).score
    found = score(name, targets, predictions, references=TEXTS["references"])
    assert found == pytest.approx(expected)
    assert found > score(name, targets, predictions)


def test_bleu_splits_text_written_without_spaces():
    chinese = ["我们今天去公园散步了。", "他不喜欢喝咖啡。"]
    expected = (
        sacrebleu.metrics.BLEU(tokenize="zh").corpus_score([chinese[0], "他喜欢咖啡。"], [chinese]).score
    )
    assert score("bleu", chinese, [chinese[0], "他喜欢咖啡。"]) == pytest.approx(expected)
    assert 10 < expected < 100
    assert score("bleu", ["วันนี้เราไปเดินเล่นในสวน"], ["วันนี้เราไปเดินเล่นในสวน"]) == pytest.approx(100)
    assert metrics.bleu_tokenizer(["Peking (北京) is the capital of China."]) is None
    assert metrics.bleu_tokenizer(["今日は公園へ散歩に行きました。"]) == "char"


def test_rouge_is_that_of_rouge_score_and_takes_the_best_reference():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    pairs = list(zip(TEXTS["targets"], TEXTS["predictions"], strict=True))
    found = metrics.lookup("rouge")(TEXTS["targets"], TEXTS["predictions"])
    for variant, value in found.items():
        expected = np.mean(
            [scorer.score(target, prediction)[variant].fmeasure for target, prediction in pairs]
        )
        assert value == pytest.approx(100 * expected)
    best = metrics.lookup("rouge")(["no", "x y"], ["a b c", "x y"], references=[["z", "a b c"], None])
    assert best == pytest.approx(dict.fromkeys(found, 100))


def test_rouge_lsum_reads_sentences_as_lines():
    target, prediction = "A b c. D e f.", "D e f. A b c."
    assert metrics.lookup("rouge")([target], [prediction])["rougeLsum"] == pytest.approx(100)


def test_sari_gives_the_published_example():
    # The value in the documentation of Hugging Face's implementation.
    found = score(
        "sari",
        ["About 95 species are currently known."],
        ["About 95 you now get in."],
        source=["About 95 species are currently accepted."],
        references=[
            [
                "About 95 species are currently known.",
                "About 95 species are now accepted.",
                "95 species are now accepted.",
            ]
        ],
    )
    assert found == pytest.approx(26.953601953601954)


def test_sari_rewards_the_reference_and_needs_the_source():
    source, target = ["The big cat sat down slowly ."], ["The cat sat ."]
    assert score("sari", target, target, source=source) == pytest.approx(100)
    assert score("sari", target, source, source=source) < 60
    with pytest.raises(ValueError, match="source"):
        metrics.lookup("sari")(target, target)


EXAMPLE = {"targets": ["x: 1 ; y = 2.5", "x: 3"], "source": ["a b", "c"], "group": ["0", "1"]}
TEXT_METRICS = [name for name, metric in metrics.METRICS.items() if metric.takes == "predictions"]


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_empty_predictions_score_lower_than_right_ones(name):
    texts = ["1.5", "2.5", "4.0"] if "corrcoef" in name else EXAMPLE["targets"]
    fields = {"source": ["a"] * len(texts), "group": list(range(len(texts)))}
    empty = metrics.lookup(name)(texts, [""] * len(texts), **fields)
    right = metrics.lookup(name)(texts, texts, **fields)
    for key, value in right.items():
        assert value == pytest.approx(100)
        assert 0 <= empty[key] < value


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_scores_are_functions_of_summed_statistics(name):
    """Two halves that share their labels add up to the whole; ranks do not, they depend on all examples."""
    texts = ["1.5", "2.5", "4.0", "2.5"] if "corrcoef" in name else ["a: 1", "b: 2", "c", "b: 2"]
    predictions = [texts[0], texts[0], texts[2], texts[3]]
    fields = {"source": ["a"] * 4, "group": [0, 1, 2, 3]}
    metric = metrics.lookup(name)
    sums = metric.sums(texts, predictions, **fields)
    assert len(sums) == 4
    assert metric.aggregate(sums[:2].sum(0) + sums[2:].sum(0)) == pytest.approx(
        metric(texts, predictions, **fields)
    )


def test_every_metric_named_in_the_data_format_is_known():
    named = [
        "accuracy",
        "exact_match",
        "exact_match_any",
        "squad_em",
        "squad_f1",
        "token_f1",
        "macro_f1",
        "micro_f1",
        "entity_f1",
        "slot_f1",
        "set_f1",
        "token_accuracy",
        "final_number_accuracy",
        "rouge",
        "bleu",
        "chrf",
        "sari",
    ]
    assert set(named) <= set(metrics.METRICS)


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown metric 'acuracy'.*'accuracy'"):
        metrics.lookup("acuracy")


def test_lists_must_match_and_hold_examples():
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        metrics.lookup("accuracy")(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="2 targets but 1 references"):
        metrics.lookup("exact_match_any")(["a", "b"], ["a", "b"], references=[["a"]])
    with pytest.raises(ValueError, match="no examples"):
        metrics.lookup("accuracy")([], [])


def test_columns_gather_what_metrics_read():
    rows = [{"references": ["a"], "other": 1}, {"other": 2}]
    assert metrics.columns(rows) == {"references": [["a"], None]}
    assert score("exact_match_any", ["x", "b"], ["a", "b"], **metrics.columns(rows)) == 100


def test_bootstrap_covers_the_score_as_the_normal_approximation_does():
    metric = metrics.lookup("accuracy")
    sums = metric.sums(["a"] * 400, ["a"] * 300 + ["b"] * 100)
    interval = metrics.bootstrap(metric, sums)["accuracy"]
    half = 196 * math.sqrt(0.75 * 0.25 / 400)
    assert interval.score == pytest.approx(75)
    assert interval.low == pytest.approx(75 - half, abs=0.7)
    assert interval.high == pytest.approx(75 + half, abs=0.7)
    assert metrics.bootstrap(metric, sums)["accuracy"] == interval
    same = metrics.bootstrap(metric, metric.sums(["a"] * 5, ["a"] * 5))["accuracy"]
    assert same == metrics.Interval(100, 100, 100)


def test_bootstrap_gives_every_score_of_a_corpus_metric():
    metric = metrics.lookup("rouge")
    found = metrics.bootstrap(metric, metric.sums(TEXTS["targets"], TEXTS["predictions"]), samples=50)
    assert set(found) == {"rouge1", "rouge2", "rougeLsum"}
    assert all(i.low <= i.score <= i.high for i in found.values())
    assert found["rouge1"].low < found["rouge1"].high


def test_baselines_are_the_most_frequent_target_and_the_input():
    found = metrics.baselines(
        "accuracy", train_targets=["b", "a", "a", "b", "c"], inputs=["a", "x", "c"], targets=["a", "b", "c"]
    )
    assert metrics.majority(["b", "a", "a", "b", "c"]) == "a"
    assert found["majority"]["accuracy"].score == pytest.approx(100 / 3)
    assert found["copy"]["accuracy"].score == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="unigram_bits"):
        metrics.baselines("bits_per_byte", train_targets=["a"], inputs=["a"], targets=["a"])


def test_unigram_bits_are_those_of_add_one_counts():
    train, test = [[0, 1, 1], [2]], [[1, 1], [3], []]
    # counts + 1: 2, 3, 2, 1 of 8
    expected = [-2 * math.log2(3 / 8), -math.log2(1 / 8), 0]
    assert metrics.unigram_bits(train, test, vocabulary_size=4) == pytest.approx(expected)
