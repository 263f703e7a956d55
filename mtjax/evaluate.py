"""Evaluate tasks: target loss, decoded predictions and their metrics, trivial baselines, results on disk.

Sums per example come from the device; means and metrics are taken once, on the host.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtjax import metrics, predict
from mtjax.data.cache import CachedTask
from mtjax.data.objectives import OBJECTIVES
from mtjax.data.online import ENCODER_ONLY, online
from mtjax.predict import DecodeConfig, Example, Predictor, TargetSums
from mtjax.types import Model, Params

TRAIN_EXAMPLES = 20_000  # what trivial baselines are fitted on, at most


class Interrupted(Exception):
    """Ends an evaluation; a `progress` raises it."""


class Baseline(NamedTuple):
    """The best trivial predictor of a score, with its 95 % bootstrap interval."""

    name: str
    score: float
    low: float
    high: float
    lower_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What one task scored. `loss` is nats per target token; `error` says why nothing else is there."""

    task: str
    family: str
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    loss: float | None = None
    accuracy: float | None = None  # of target tokens, teacher-forced, 0 to 1
    num_examples: int = 0
    num_tokens: int = 0
    bits_per_byte: float | None = None
    decode: str = ""
    baselines: dict[str, Baseline] = dataclasses.field(default_factory=dict)
    error: str | None = None

    def beats_baseline(self, score: str) -> bool | None:
        """Tell whether a score is better than its baseline's whole interval; None without a baseline."""
        if score not in self.baselines:
            return None
        baseline, value = self.baselines[score], self.scores[score]
        return value < baseline.low if baseline.lower_is_better else value > baseline.high


class Examples(NamedTuple):
    """A task's examples: as token ids, as they were cached, and as the texts that metrics compare."""

    ids: list[Example]
    raw: list[dict[str, Any]]
    inputs: list[str]
    targets: list[str]  # whole
    scored: list[str]  # the text of the target tokens: cut where they are cut, corrupted where they are


Report = Callable[[int, int, str], None]  # (examples done, of how many, task)


def evaluate_mixture(
    model: Model,
    params: Params,
    tasks: Sequence[CachedTask],
    *,
    split: str,
    lengths: Mapping[str, int],
    batch_size: int,
    mesh: Mesh,
    decoder: DecodeConfig | None = None,
    architecture: str = "encoder_decoder",
    max_examples: int | None = None,
    predictions_dir: str | os.PathLike | None = None,
    with_baselines: bool = False,
    task_ids: Mapping[str, int] | None = None,
    predictor: Predictor | None = None,
    progress: Report | None = None,
) -> list[TaskResult]:
    """Evaluate every task of a split, in their order.

    A task that fails gives a result with `error`; the others still run. Predictions go to
    <predictions_dir>/<task>.jsonl. task_ids: the ids the model was trained with (default: the position in
    `tasks`); a task it does not name is -1. Give one `predictor` to reuse what it compiled for other
    checkpoints. Raises ValueError on an unknown split or metric of any task, before anything runs.
    """
    for task in tasks:
        task.num_examples(split)
        for name in task.metrics:
            metrics.lookup(name)
    predictor = predictor or predict.predictor(
        model, decoder, lengths=lengths, batch_size=batch_size, mesh=mesh, architecture=architecture
    )
    task_ids = {task.name: i for i, task in enumerate(tasks)} if task_ids is None else task_ids
    counts = [min(task.num_examples(split), max_examples or sys.maxsize) for task in tasks]
    results = []
    for i, task in enumerate(tasks):
        try:
            examples = read(
                task,
                split,
                lengths=lengths,
                limit=max_examples,
                task_id=task_ids.get(task.name, -1),
                architecture=architecture,
            )
            result, lines = _evaluate(
                predictor, params, task, examples, progress=_scaled(progress, counts, i, task.name)
            )
            if with_baselines:
                table = baselines(task, examples, result, lengths=lengths, architecture=architecture)
                result = dataclasses.replace(result, baselines=table)
            if predictions_dir is not None and jax.process_index() == 0:
                write_lines(Path(predictions_dir) / f"{task.name}.jsonl", lines)
        except Interrupted:
            raise
        except Exception as error:  # one broken task must not cost the others' results
            result = TaskResult(task.name, task.family, error=f"{type(error).__name__}: {error}")
        results.append(result)
    return results


def _scaled(
    progress: Report | None, counts: Sequence[int], i: int, name: str
) -> Callable[[float], None] | None:
    """Turn a task's share done, 0 to 1, into the mixture's examples done."""
    if progress is None:
        return None
    before, total = sum(counts[:i]), sum(counts)
    return lambda share: progress(before + int(share * counts[i]), total, name)


def _part(progress: Callable[[float], None] | None, start: float, stop: float) -> predict.Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(start + (stop - start) * done / total)


def _evaluate(
    predictor: Predictor,
    params: Params,
    task: CachedTask,
    examples: Examples,
    *,
    progress: Callable[[float], None] | None,
) -> tuple[TaskResult, list[dict[str, Any]]]:
    """Score, decode and measure one task; returns its result and a line per example."""
    if not examples.ids:
        raise ValueError("no example is left: every target is empty, or the feature lengths drop them all.")
    wanted = {name: metrics.lookup(name) for name in task.metrics}
    needs_text = any(metric.takes == "predictions" for metric in wanted.values())
    sums = predictor.score(params, examples.ids, progress=_part(progress, 0, 0.3 if needs_text else 1))
    if not np.isfinite(sums.logprob).all():
        raise ValueError("the loss is not finite: these parameters have diverged.")
    mode, predictions = "", None
    if needs_text:
        mode, predictions = _predictions(predictor, params, task, examples, progress=_part(progress, 0.3, 1))
    taken = {"predictions": predictions, "scores": sums.logprob.tolist()}
    scores: dict[str, float] = {}
    for metric in wanted.values():
        texts = examples.targets if metric.takes == "predictions" else examples.scored
        scores |= metric(texts, taken[metric.takes], **metrics.columns(examples.raw))
    tokens = sums.tokens.sum()
    bits = metrics.lookup("bits_per_byte")(examples.scored, sums.logprob.tolist())
    result = TaskResult(
        task.name,
        task.family,
        scores=scores,
        loss=float(-sums.logprob.sum() / tokens),
        accuracy=float(sums.correct.sum() / tokens),
        num_examples=len(examples.ids),
        num_tokens=int(tokens),
        bits_per_byte=bits["bits_per_byte"],
        decode=mode,
    )
    return result, _lines(examples, predictions, sums)


def read(
    task: CachedTask,
    split: str,
    *,
    lengths: Mapping[str, int],
    limit: int | None,
    task_id: int,
    architecture: str,
) -> Examples:
    """Read a split as the model sees it: objective applied, cut to `lengths`, EOS at the end.

    With a limit, that many examples, evenly spread over the split: their order may mean something. The noise
    of an example is the same in every evaluation. Examples without target tokens are left out.
    """
    source, prepare = task.source(split), online(task, lengths, architecture=architecture)
    count = min(len(source), limit or len(source))
    # Training splits keep no raw text; it is read off the ids.
    has_text = "examples" in task.metadata["splits"][split]
    raws: list[dict[str, Any]] = task.examples(split) if has_text else [{}] * len(source)
    found = Examples([], [], [], [], [])
    for number in range(count):
        i = number * len(source) // count
        prepared = prepare(source.read(i), i)
        if prepared is None:
            continue
        inputs, targets, _ = prepared
        found.ids.append(Example(inputs, targets, task_id))
        found.raw.append(raws[i])
        if prepare.classes:
            targets = np.array(prepare.classes[int(targets[0])], np.int32)
        for texts, text in zip(found[2:], _texts(task, raws[i], inputs, targets), strict=True):
            texts.append(text)
    return found


def _texts(
    task: CachedTask, raw: Mapping[str, Any], inputs: np.ndarray, targets: np.ndarray
) -> tuple[str, str, str]:
    """Return the texts of inputs, targets and scored target tokens: raw ones where the ids stand for them."""
    shown = task.vocabulary("inputs" if "inputs" in task.features else "targets").decode(inputs)
    vocabulary = task.vocabulary("targets")
    scored = vocabulary.decode(targets)
    if not is_whole(task):
        return shown, scored, scored
    whole = raw.get("targets_pretokenized", scored)
    is_all = vocabulary.encode(whole) == predict.before_eos(targets, vocabulary.eos_id)
    return raw.get("inputs_pretokenized", shown), whole, whole if is_all else scored


def is_whole(task: CachedTask) -> bool:
    """Tell whether the model's targets are the task's own text, not made by an objective after the cache."""
    return not any(step["name"] in OBJECTIVES for step in task.metadata["online"])


def _predictions(
    predictor: Predictor,
    params: Params,
    task: CachedTask,
    examples: Examples,
    *,
    progress: predict.Progress | None,
) -> tuple[str, list[str]]:
    """Return how predictions were made and their texts; a task without options is not ranked but decoded."""
    vocabulary = task.vocabulary("targets")
    mode = predictor.config.mode
    if predictor.architecture == ENCODER_ONLY:
        listed = task.metadata["options"]
        classes = [[[number] for number in range(len(listed))]] * len(examples.ids)
        best = predict.rank(predictor, params, examples.ids, classes, progress=progress).best
        return "rank", [listed[i] for i in best]
    options = [choices_of(task, raw) for raw in examples.raw]
    if mode == "rank" and all(options):
        end = examples.ids[0].targets[-1:].tolist()  # EOS, where the task has one
        end = [vocabulary.eos_id] if end == [vocabulary.eos_id] else []
        ids = [[[*vocabulary.encode(option), *end] for option in listed] for listed in options]
        best = predict.rank(predictor, params, examples.ids, ids, progress=progress).best
        return mode, [listed[i] for listed, i in zip(options, best, strict=True)]
    decoded = predictor.decode(params, examples.ids, progress=progress)
    return "greedy" if mode == "rank" else mode, [vocabulary.decode(ids) for ids in decoded]


def choices_of(task: CachedTask, raw: Mapping[str, Any]) -> list[str]:
    """Return an example's options: its own `choices`, or else the task's; [] for free text."""
    return list(raw.get("choices") or task.metadata.get("options") or [])


def _lines(examples: Examples, predictions: Sequence[str] | None, sums: TargetSums) -> list[dict[str, Any]]:
    """Describe every example for reading and later metrics; `correct` compares with all accepted answers."""
    fields = metrics.columns(examples.raw)
    references = fields.get("references") or [None] * len(examples.ids)
    lines = []
    for i, (text, accepted) in enumerate(zip(examples.inputs, references, strict=True)):
        line = {"input": text, "target": examples.targets[i], "references": accepted or [examples.targets[i]]}
        if predictions is not None:
            right = {metrics.normalise(answer) for answer in line["references"]}
            line |= {"prediction": predictions[i], "correct": metrics.normalise(predictions[i]) in right}
        else:
            line |= {"scored": examples.scored[i]}
        lines.append(line | {"logprob": float(sums.logprob[i]), "tokens": int(sums.tokens[i])})
    return lines


# Trivial baselines.


def baselines(
    task: CachedTask, examples: Examples, result: TaskResult, *, lengths: Mapping[str, int], architecture: str
) -> dict[str, Baseline]:
    """Score the trivial predictors of every metric; each score keeps the better one.

    Texts: the most frequent training target, and the input copied. Likelihoods: a unigram model of the
    training targets' tokens, over the same tokens and bytes as the model.
    """
    if "train" not in task.splits:
        return {}
    fields: dict[str, Any] = metrics.columns(examples.raw)
    majority = most_frequent_targets(task)
    best: dict[str, Baseline] = {}
    for name in task.metrics:
        metric = metrics.lookup(name)
        if metric.takes == "scores":
            sums = _unigram_sums(task, examples, lengths=lengths, architecture=architecture)
            found = {"unigram": metrics.bootstrap(metric, sums)}
        else:
            texts = {"inputs": examples.inputs, "targets": examples.targets}
            found = metrics.baselines(name, train_targets=majority, **texts, **fields)
        sign = -1 if metric.lower_is_better else 1
        for score in next(iter(found.values())):
            guess = max(found, key=lambda guess: sign * found[guess][score].score)
            best[score] = Baseline(guess, *found[guess][score], metric.lower_is_better)
    return best


def most_frequent_targets(task: CachedTask) -> list[str]:
    """Return the most frequent training target, or all that are equally frequent."""
    source = task.source("train")
    counts = collections.Counter(
        tuple(source[i]["targets"].tolist()) for i in range(min(len(source), TRAIN_EXAMPLES))
    )
    highest = max(counts.values())
    decode = task.vocabulary("targets").decode
    return [decode(ids) for ids, count in counts.items() if count == highest]


def _unigram_sums(
    task: CachedTask, examples: Examples, *, lengths: Mapping[str, int], architecture: str
) -> np.ndarray:
    """Return [bits, bytes] of each example under the unigram model of the training targets."""
    source, prepare = task.source("train"), online(task, lengths, architecture=architecture)
    prepared = (prepare(source.read(i), i) for i in range(min(len(source), TRAIN_EXAMPLES)))
    train = (example.targets.tolist() for example in prepared if example is not None)
    bits = metrics.unigram_bits(
        train,
        [example.targets.tolist() for example in examples.ids],
        vocabulary_size=task.vocabulary("targets").size,
    )
    nats = (-bits * np.log(2)).tolist()
    return metrics.lookup("bits_per_byte").sums(examples.scored, nats)


# Results on disk.


def results_path(model_dir: str | os.PathLike, mixture: str) -> Path:
    """Name the file that holds a mixture's results."""
    return Path(model_dir) / "eval" / f"{mixture}.jsonl"


def predictions_path(
    model_dir: str | os.PathLike, mixture: str, step: int, *, split: str, decode: str
) -> Path:
    """Name the folder of a checkpoint's predictions for one split by one decode mode."""
    return Path(model_dir) / "eval" / "predictions" / mixture / f"{step}-{split}-{decode}"


def write_results(
    path: str | os.PathLike, results: Sequence[TaskResult], *, step: int, split: str, decode: str
) -> None:
    """Add a checkpoint's results to a file, a line a task.

    Lines of the same step, task, split and decode mode are replaced; the file is ordered by step.
    """
    key = lambda line: (line["step"], line["task"], line["split"], line["mode"])  # noqa: E731
    new = [{"step": step, "split": split, "mode": decode, **_as_json(result)} for result in results]
    replaced = {key(line) for line in new}
    old = [line for line in read_results(path) if key(line) not in replaced]
    write_lines(path, sorted([*old, *new], key=lambda line: line["step"]))


def _as_json(result: TaskResult) -> dict[str, Any]:
    named = {score: baseline._asdict() for score, baseline in result.baselines.items()}
    plain = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return plain | {"baselines": named}


def read_results(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the lines of a results file; [] where there is none. ValueError names a damaged line."""
    if not Path(path).exists():
        return []
    lines = []
    with open(path, encoding="utf-8") as file:  # str.splitlines would split inside texts
        for number, text in enumerate(file, start=1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}. Remove the line.") from error
    return lines


def write_lines(path: str | os.PathLike, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines in one piece: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    os.replace(unfinished, path)
