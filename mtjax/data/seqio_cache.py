"""Write SeqIO tasks and mixtures into the cache: the one TensorFlow module of the library.

A task is run once, up to its first online step. Online, in numpy, run the steps behind
seqio.CacheDatasetPlaceholder, and the known objectives, EOS and trimming wherever they stand at the end;
so a change of feature lengths recaches nothing.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf
from tensorflow.python.eager import context as tf_context

from mtjax import tree
from mtjax.data import cache, fingerprint, publish, records
from mtjax.data import vocabulary as vocabularies
from mtjax.data.objectives import OBJECTIVES
from mtjax.mixing import rates as mixing_rates

TRAIN = "train"
_EOS = ("append_eos", "append_eos_after_trim", "trim")
_ONLINE = (*OBJECTIVES, *_EOS)
_GIVEN_BY_SEQIO = ("dataset", "sequence_length", "output_features")
_IRRELEVANT = ("merge_examples_to_reduce_padding", "input_feature_key", "passthrough_feature_keys")  # we pack
_BATCH = 256  # examples that cross from TensorFlow to numpy at once
Progress = Callable[[int, int, str], None]  # (tasks done, tasks in all, task just done)


@dataclasses.dataclass(frozen=True)
class Description:
    """What the cache says about a task beside its data; a task nobody described has these defaults."""

    family: str = "default"
    licence: str = ""
    citation: str = ""
    options: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    source: str = ""


Info = Callable[[str], Any]  # task name -> an object with Description's attributes


class Plan(NamedTuple):
    """A task's preprocessors: those that run now, and those left for later as (name, arguments)."""

    offline: tuple[Callable[..., tf.data.Dataset], ...]
    online: tuple[tuple[str, dict[str, Any]], ...]


def cache_mixture(name: str, cache_dir: str | os.PathLike, **options: Any) -> list[str]:
    """Cache a mixture's tasks and write its description, or cache a single task.

    Options are those of `cache_tasks`. Returns the names of the tasks that were written.
    """
    names = task_names(name)
    written = cache_tasks(names, cache_dir, **options)
    if name in seqio.MixtureRegistry.names():
        _write_mixture(seqio.MixtureRegistry.get(name), pathlib.Path(cache_dir))
    return written


def task_names(name: str) -> list[str]:
    """List the tasks of a registered mixture or task, sorted: the order of task ids."""
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise tree.unknown_name("task or mixture", name, known)
    return sorted({task.name for task in seqio.get_subtasks(seqio.get_mixture_or_task(name))})


def cache_tasks(
    names: Sequence[str],
    cache_dir: str | os.PathLike,
    *,
    workers: int = 1,
    force: bool = False,
    info: Info = lambda name: Description(),
    progress: Progress = lambda done, total, name: None,
) -> list[str]:
    """Cache registered tasks, each once, in parallel processes; unchanged ones are left alone.

    Every task that can be cached is, before failures are reported. Workers are forked, which is impossible
    once TensorFlow has run in this process: the tasks are then cached here, one by one.

    Returns the names of the tasks that were written. Raises ValueError naming the tasks that failed.
    """
    directory = pathlib.Path(cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    publish.remove_abandoned(directory)
    names = list(dict.fromkeys(names))
    todo = [name for name in names if force or _needs_caching(name, directory)]
    unchanged = [name for name in names if name not in set(todo)]
    for done, name in enumerate(unchanged, 1):
        _refresh(directory / name / "metadata.json", _described(_task(name), info(name)))
        progress(done, len(names), name)
    todo.sort(key=_source_bytes, reverse=True)  # the longest first, so that no worker ends alone
    failures = []
    jobs = _each(functools.partial(_cache_task, directory=directory, info=info), todo, workers)
    for done, (name, error) in enumerate(jobs, len(unchanged) + 1):
        failures += [f"  {name}: {error}"] if error else []
        progress(done, len(names), name)
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(names)} tasks could not be cached:\n" + "\n".join(failures)
        )
    return todo


def _needs_caching(name: str, directory: pathlib.Path) -> bool:
    _task(name)
    try:
        return status(name, directory) != "cached"
    except ValueError:  # a preprocessor that cannot be cached: reported with the other failures
        return True


def status(name: str, cache_dir: str | os.PathLike) -> str:
    """Return "cached", "stale" (the task has changed since) or "missing" for a registered task."""
    path = pathlib.Path(cache_dir) / name / "metadata.json"
    if not path.is_file():
        return "missing"
    try:
        metadata = json.loads(path.read_text("utf-8"))
    except ValueError:
        return "stale"
    found = (metadata.get("format"), metadata.get("fingerprint"))
    return "cached" if found == (cache.FORMAT, task_fingerprint(name)) else "stale"


def task_fingerprint(name: str) -> str:
    """Hash what a registered task's ids depend on: source, preprocessors, vocabularies and features."""
    task = _task(name)
    try:
        plan = plan_of(task)
    except ValueError as error:
        raise ValueError(f"Task {name!r}: {error}") from error
    source = task.source
    parts = {
        "source": source,
        "files": fingerprint.source_files(_files(source)),
        "offline": plan.offline,
        "online": plan.online,
        "features": {k: (f, f.add_eos, f.rank, f.dtype.name) for k, f in task.output_features.items()},
        # What a function reads is unknown; the Python it runs on is part of it.
        "python": sys.version_info[:3] if isinstance(source, seqio.FunctionDataSource) else None,
    }
    return fingerprint.fingerprint(parts, _special)


def plan_of(task: seqio.Task) -> Plan:
    """Split a task's preprocessors into offline and online ones.

    Raises ValueError where a random or length-dependent one is unknown, or where an offline one follows an
    online one.
    """
    offline: list[Callable[..., tf.data.Dataset]] = []
    online: list[tuple[str, dict[str, Any]]] = []
    for step in task.preprocessors:
        if isinstance(step, seqio.CacheDatasetPlaceholder):
            continue
        name = seqio.utils.function_name(step)
        if name in _ONLINE:
            online.append((name, _arguments(name, step)))
            continue
        parameters = inspect.signature(step).parameters.keys()
        if unknown := parameters & {"seed", "seeds", "sequence_length"}:
            raise ValueError(
                f"preprocessor {name!r} takes {sorted(unknown)}, so it must run at every reading, but only "
                f"{', '.join(_ONLINE)} are known there. Use one of them or a deterministic preprocessor."
            )
        if online:
            raise ValueError(
                f"preprocessor {name!r} stands behind {online[-1][0]!r}, which runs at every reading; "
                "move it before."
            )
        offline.append(step)
    if len([name for name, _ in online if name in OBJECTIVES]) > 1:
        raise ValueError(f"more than one objective: {[name for name, _ in online]}.")
    return Plan(tuple(offline), tuple(online))


def _arguments(name: str, step: Callable) -> dict[str, Any]:
    """Return the arguments of an online preprocessor, defaults included."""
    parameters = inspect.signature(step).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not p.empty}
    if name not in OBJECTIVES:
        return {}
    known = inspect.signature(OBJECTIVES[name]).parameters.keys()
    given = step.keywords if isinstance(step, functools.partial) else {}
    if foreign := given.keys() - known - {*_GIVEN_BY_SEQIO, *_IRRELEVANT}:
        raise ValueError(
            f"argument {sorted(foreign)[0]!r} of {name!r} is unknown; known: {sorted(known)[2:]}."
        )
    return {key: values[key] for key in known & values.keys()}


# Writing one task.


def _cache_task(name: str, *, directory: pathlib.Path, info: Info) -> str | None:
    """Write one task and return None, or what went wrong."""
    try:
        with publish.folder(directory / name) as temporary:
            metadata = _write_task(_task(name), temporary, directory / cache.VOCABULARIES)
            publish.write_json(temporary / "metadata.json", metadata | _described(_task(name), info(name)))
    except Exception as error:  # whatever a user's preprocessor raises must name its task
        if os.environ.get("MTJAX_TRACEBACK"):
            traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def _write_task(task: seqio.Task, directory: pathlib.Path, models: pathlib.Path) -> dict[str, Any]:
    plan = plan_of(task)
    specs = {name: _vocabulary_spec(f.vocabulary, models) for name, f in task.output_features.items()}
    dtype = records.token_dtype(spec["size"] for spec in specs.values())
    cached: list[str] = []
    splits = {}
    for split in task.splits:
        features, splits[split] = _write_split(task, split, plan, directory, dtype)
        if cached and features != cached:
            raise ValueError(f"split {split!r} has features {features}, others have {cached}.")
        cached = features
    return {
        "format": cache.FORMAT,
        "name": task.name,
        "fingerprint": task_fingerprint(task.name),
        "dtype": dtype,
        "features": {
            name: {"cached": name in cached, "add_eos": feature.add_eos, "vocabulary": specs[name]}
            for name, feature in task.output_features.items()
        },
        "online": [{"name": name, "arguments": arguments} for name, arguments in plan.online],
        "splits": splits,
        "source_files": fingerprint.source_files(_files(task.source)),
    }


def _write_split(
    task: seqio.Task, split: str, plan: Plan, directory: pathlib.Path, dtype: str
) -> tuple[list[str], dict[str, Any]]:
    """Write one split; return its cached features and its entry in metadata.json."""
    started = time.monotonic()
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for step in plan.offline:
        dataset = seqio.utils.add_kwargs_to_transform(
            step, sequence_length=None, output_features=task.output_features
        )(dataset)
    spec: Any = dataset.element_spec
    features = [name for name in task.output_features if name in spec]
    _check_features(features, spec)
    counts, raw_path = publish.Counts(features), directory / f"{split}.examples.jsonl"
    is_evaluated = split != TRAIN

    def encoded() -> Iterator[bytes]:
        with publish.lines(raw_path) if is_evaluated else contextlib.nullcontext() as raw:
            for example in _examples(dataset, features, keep_raw=is_evaluated):
                ids = [example[name] for name in features]
                counts.add(ids)
                if raw is not None:
                    fields = {k: v for k, v in example.items() if k not in features}
                    raw.write(json.dumps(fields, ensure_ascii=False) + "\n")
                yield records.encode(ids, dtype)

    files = records.write(encoded(), directory / split)
    if not counts.num_examples:
        raise ValueError(f"split {split!r} has no examples (source {_source_name(task.source)}).")
    entry = counts.entry(split) | {"files": files, "seconds": round(time.monotonic() - started, 2)}
    if is_evaluated:
        entry["examples"] = {"name": raw_path.name, "bytes": raw_path.stat().st_size}
    return features, entry


def _check_features(features: Sequence[str], spec: Mapping[str, Any]) -> None:
    if "targets" not in features:
        raise ValueError(f"no feature 'targets' after preprocessing, only {sorted(spec)}.")
    for name in features:
        if spec[name].shape.rank != 1 or not spec[name].dtype.is_integer:
            raise ValueError(
                f"feature {name!r} is {spec[name].dtype.name} of rank {spec[name].shape.rank} after "
                "preprocessing; the cache holds token ids (integers of rank 1). Is it tokenized?"
            )


def _examples(
    dataset: tf.data.Dataset, features: Sequence[str], *, keep_raw: bool
) -> Iterator[dict[str, Any]]:
    """Yield examples as numpy ids and, where raw fields are kept, Python values."""
    if not keep_raw:
        dataset = dataset.map(lambda example: {name: example[name] for name in features})
    for batch in dataset.ragged_batch(_BATCH).prefetch(2):
        columns = {name: _rows(value, is_ids=name in features) for name, value in batch.items()}
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


def _rows(values: Any, *, is_ids: bool) -> list[Any]:
    """Split a batched column into its examples: arrays of ids, or Python values with text decoded."""
    if is_ids and isinstance(values, tf.RaggedTensor):
        flat, ends = values.flat_values.numpy(), values.row_splits.numpy().tolist()
        return [flat[start:end] for start, end in itertools.pairwise(ends)]
    if is_ids:
        return list(values.numpy())
    return _plain(values.to_list() if isinstance(values, tf.RaggedTensor) else values.numpy().tolist())


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


# Vocabularies.


def _special(value: Any) -> Any:
    """Describe vocabularies by their content, for fingerprints."""
    if isinstance(value, seqio.Vocabulary):
        spec = vocabulary_of(value).spec()
        return ["vocabulary", spec["kind"], spec["fingerprint"]]
    if isinstance(value, seqio.CacheDatasetPlaceholder):
        return ["placeholder"]
    return None


@functools.lru_cache(maxsize=64)
def _sentencepiece(path: str, extra_ids: int) -> vocabularies.Vocabulary:
    with tf.io.gfile.GFile(path, "rb") as file:
        return vocabularies.sentencepiece_from_bytes(file.read(), extra_ids, origin=path)


def vocabulary_of(vocabulary: seqio.Vocabulary) -> vocabularies.Vocabulary:
    """Return our vocabulary with the same ids as SeqIO's. Raises ValueError on an unknown kind."""
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return vocabularies.byte(vocabulary.extra_ids)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        raise ValueError(
            f"{type(vocabulary).__name__} is no SentencePieceVocabulary or ByteVocabulary, the kinds "
            "that work without TensorFlow."
        )
    if vocabulary._normalizer_spec_overrides is None and vocabulary._reverse_extra_ids:
        return _sentencepiece(vocabulary.sentencepiece_model_file, vocabulary.extra_ids)
    # Changed pieces or normalization: keep the model as SeqIO built it.
    return vocabularies.sentencepiece_from_bytes(vocabulary.sp_model or b"")


def _vocabulary_spec(vocabulary: seqio.Vocabulary, models: pathlib.Path) -> dict[str, Any]:
    ours = vocabulary_of(vocabulary)
    path = vocabularies.model_path(ours.fingerprint, models)
    if ours.model and not path.is_file():
        models.mkdir(parents=True, exist_ok=True)
        publish.write(path, ours.model)
    return ours.spec()


# Mixtures.


def _write_mixture(mixture: seqio.Mixture, directory: pathlib.Path) -> None:
    """Write mixtures/<name>.json: tasks, their resolved rates, and the rules they came from."""
    tasks = {task.name: cache.open_task(directory, task.name) for task in mixture.tasks}
    cache.check_vocabularies(mixture.name, list(tasks.values()))
    rates = _resolved(mixture, tasks)
    mixing_rates.checked(list(rates.values()), list(rates))
    content = {
        "format": cache.FORMAT,
        "name": mixture.name,
        "tasks": sorted(tasks),
        "fingerprints": {name: tasks[name].fingerprint for name in sorted(tasks)},
        "rates": {name: rates[name] for name in sorted(tasks)},
        "components": _components(mixture),
    }
    (directory / cache.MIXTURES).mkdir(exist_ok=True)
    publish.write_json(directory / cache.MIXTURES / f"{mixture.name}.json", content)


class _Counted:
    """A task as rate functions see it: cached, with our counts."""

    def __init__(self, task: seqio.Task, cached: cache.CachedTask):
        self._task, self._cached = task, cached
        self.cache_dir = str(cached.directory)

    def get_cached_stats(self, split: str = TRAIN) -> dict[str, int]:
        entry = self._cached.metadata["splits"][split]
        tokens = {f"{name}_tokens": count for name, count in entry["tokens"].items()}
        return {"examples": entry["num_examples"], **tokens}

    def num_input_examples(self, split: str = TRAIN) -> int:
        return self._cached.num_examples(split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def _resolved(mixture: seqio.Mixture, tasks: Mapping[str, cache.CachedTask]) -> dict[str, float]:
    """Return a rate per task; a sub-mixture's rate is shared out, a task in two sub-mixtures adds its rates.

    As seqio.Mixture.get_rate, with rate functions seeing the cached counts.
    """
    total: dict[str, float] = {}
    for name, rate in mixture.rate_per_task_name.items():
        part, value = mixture._task_map[name], rate
        if isinstance(part, seqio.Mixture):
            shares = _resolved(part, tasks)
        else:
            shares = {name: 1.0}
            value = rate(_Counted(part, tasks[name])) if callable(rate) else rate  # pyright: ignore[reportArgumentType]
        whole = sum(shares.values())
        if callable(value) or not np.isfinite(value) or value < 0 or whole <= 0:
            raise ValueError(
                f"Mixture {mixture.name!r}: component {name!r} has rate {value!r} over parts that sum to {whole}; "
                "a rate must be a number, not negative, and the parts of a sub-mixture must not all be 0."
            )
        for task, share in shares.items():
            total[task] = total.get(task, 0.0) + float(value) * share / whole
    return total


def _components(mixture: seqio.Mixture) -> list[dict[str, Any]]:
    """Describe a mixture as it was registered, sub-mixtures nested."""
    found = []
    for name, rate in mixture.rate_per_task_name.items():
        part = mixture._task_map[name]
        component: dict[str, Any] = {"name": name, "rate": _rule(rate) if callable(rate) else float(rate)}
        if isinstance(part, seqio.Mixture):
            component["components"] = _components(part)
        found.append(component)
    return found


def _rule(rate: Callable) -> dict[str, Any]:
    """Describe a rate function by name and arguments, e.g. maximum, temperature and scale."""
    parameters = inspect.signature(rate).parameters.values()
    numbers = {p.name: p.default for p in parameters if isinstance(p.default, (int, float, str))}
    return {"function": seqio.utils.function_name(rate), **numbers}


# Facts, files, processes.


def _task(name: str) -> seqio.Task:
    if name not in seqio.TaskRegistry.names():
        raise tree.unknown_name("task", name, list(seqio.TaskRegistry.names()))
    return seqio.TaskRegistry.get(name)


def _described(task: seqio.Task, info: Any) -> dict[str, Any]:
    functions = [*task._metric_fn_constructor_args, *task._metric_objs_constructor_args]
    return {
        "family": info.family,
        "licence": info.licence,
        "citation": info.citation,
        "source": info.source or _source_name(task.source),
        "options": None if info.options is None else list(info.options),
        "metrics": list(info.metrics) or [seqio.utils.function_name(f) for f in functions],
    }


def _refresh(path: pathlib.Path, described: Mapping[str, Any]) -> None:
    """Rewrite metadata.json where only the description of a task has changed."""
    metadata = json.loads(path.read_text("utf-8"))
    if metadata | described != metadata:
        publish.write_json(path, metadata | described)


def _source_name(source: Any) -> str:
    if isinstance(source, seqio.TfdsDataSource):
        return f"tfds:{source.tfds_dataset.name}"
    return type(source).__name__


def _files(source: Any) -> list[str]:
    if not isinstance(source, seqio.FileDataSource):
        return []
    return [path for split in source.splits for path in source.list_shards(split)]


def _source_bytes(name: str) -> int:
    return sum(os.path.getsize(path) for path in _files(_task(name).source) if os.path.exists(path))


def _each(
    function: Callable[[str], str | None], names: Sequence[str], workers: int
) -> Iterator[tuple[str, str | None]]:
    """Yield (name, error) as function(name) finishes, in forked processes where that is possible."""
    if min(workers, len(names)) <= 1 or _tensorflow_has_run():
        yield from ((name, function(name)) for name in names)
        return
    global _job
    _job = function  # the forked workers inherit it; pickled, it would have to be importable
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*")  # of JAX and Python 3.12: workers use no JAX
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(names)), context, _watch_parent, (os.getpid(),)
        ) as pool:
            futures = {pool.submit(_run_job, name): name for name in names}
            for future in concurrent.futures.as_completed(futures):
                try:
                    yield futures[future], future.result()
                except concurrent.futures.process.BrokenProcessPool:
                    yield futures[future], "a worker process died (out of memory?); try fewer --workers."


_job: Callable[[str], str | None] = str


def _watch_parent(parent: int) -> None:
    """Let this worker end when its parent was killed: it would wait for jobs for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_job(name: str) -> str | None:
    return _job(name)


def _tensorflow_has_run() -> bool:
    """Tell whether TensorFlow's threads exist, which a forked process would wait for in vain."""
    context = tf_context._context
    return context is not None and context._initialized
