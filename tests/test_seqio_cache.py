"""SeqIO tasks into the cache: the ids SeqIO gives, once, incrementally, whole or not at all."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

import seqio_tasks  # noqa: E402
from seqio_tasks import BYTES, STANDARD, add, split_line  # noqa: E402

from mtjax.data import cache, publish, records, seqio_cache, vocabulary  # noqa: E402
from mtjax.data.online import online  # noqa: E402
from mtjax.data.seqio_cache import mixtures  # noqa: E402
from mtjax.tasks import preprocessors  # noqa: E402

LENGTHS = {"inputs": 24, "targets": 10}


def as_targets(dataset):
    return dataset.map(lambda line: {"targets": line})


def with_references(dataset):
    return dataset.map(
        lambda x: (
            x
            | {
                "references": tf.stack([x["targets"], "or 漢字"]),
                "score": 0.5,
                "number": tf.size(x["inputs"]),
            }
        )
    )


@seqio.map_over_dataset(num_seeds=1)
def shuffle_words(x, seed):
    return x


@seqio.map_over_dataset(num_seeds=1)
def cut_inputs(x, seed):
    length = tf.random.stateless_uniform([], seed, 1, 16, tf.int32)
    return {**x, "inputs": x["inputs"][:length]}


def behind(dataset):
    return dataset


@pytest.fixture
def lines(tmp_path):
    yield from seqio_tasks.writer(tmp_path)


@pytest.mark.parametrize(
    "ending",
    [
        (seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos_after_trim),
        (seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos),
        (seqio.preprocessors.append_eos,),
        (),
    ],
)
@pytest.mark.parametrize("lengths", [LENGTHS, {"inputs": 100, "targets": 100}])
def test_online_gives_what_seqio_gives(lines, tmp_path, ending, lengths):
    task = add("like_seqio", lines(), [split_line, seqio.preprocessors.tokenize, *ending])
    seqio_cache.cache_tasks(["like_seqio"], tmp_path / "cache")
    cached = cache.open_task(tmp_path / "cache", "like_seqio")
    for split in ("train", "validation"):
        theirs = task.get_dataset(lengths, split=split, shuffle=False).as_numpy_iterator()
        source, prepare = cached.source(split), online(cached, lengths)
        for i, expected in enumerate(theirs):
            inputs, targets, _ = prepare(source.read(i), seed=0)
            np.testing.assert_array_equal(inputs, expected["inputs"])
            np.testing.assert_array_equal(targets, expected["targets"])
        assert len(source) == i + 1


def test_metadata_and_raw_text(lines, tmp_path):
    from mtjax.tasks import info

    steps = [split_line, with_references, *STANDARD[1:]]
    files = lines()

    def accuracy(targets, predictions):
        return {}

    add("described", files, steps, metric_fns=[accuracy])
    info.describe("described", family="quiz", licence="MIT", citation="me", options=["a", "b"])
    seqio_cache.cache_tasks(["described"], tmp_path / "cache", info=info.info)
    task = cache.open_task(tmp_path / "cache", "described")
    entry = task.metadata["splits"]["train"]
    assert entry["num_examples"] == 30 and task.num_examples("validation") == 4
    assert entry["tokens"]["targets"] == sum(len(f"answer {i}") for i in range(30))
    assert entry["max_length"] == {"inputs": len(b"train question 10 ") + 2, "targets": 9}
    assert (task.family, task.metrics, task.metadata["options"]) == ("quiz", ["accuracy"], ["a", "b"])
    assert [path for path, *_ in task.metadata["source_files"]] == sorted(files.values())
    raw = task.examples("validation")
    assert raw[1] == {
        "inputs_pretokenized": "validation question 1 é",
        "targets_pretokenized": "answer 1",
        "references": ["answer 1", "or 漢字"],
        "score": 0.5,
        "number": 1,
    }
    # A new description leaves the data alone.
    info.describe("described", family="other")
    assert seqio_cache.cache_tasks(["described"], tmp_path / "cache", info=info.info) == []
    assert cache.open_task(tmp_path / "cache", "described").family == "other"


def test_a_text_with_span_corruption(tmp_path):
    (tmp_path / "text").write_text("".join(f"line {i} of a longer text\n" for i in range(20)))
    steps = [
        as_targets,
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        functools.partial(preprocessors.span_corruption, mean_noise_span_length=2.0),
        seqio.preprocessors.append_eos_after_trim,
    ]
    for features in (("targets",), ("inputs", "targets")):
        add("text", {"train": str(tmp_path / "text")}, steps, features=features)
        seqio_cache.cache_tasks(["text"], tmp_path / "cache")
        task = cache.open_task(tmp_path / "cache", "text")
        assert task.features == ["targets"]
        assert task.metadata["online"][0] == {
            "name": "span_corruption",
            "arguments": {"noise_density": 0.15, "mean_noise_span_length": 2.0},
        }
        inputs, targets, _ = online(task, LENGTHS)(task.source("train").read(0), seed=3)
        assert inputs[-1] == targets[-1] == 1 and targets[0] == 358 and 358 in inputs


def cached_again(names, directory):
    """Return what a second run writes."""
    return seqio_cache.cache_tasks(names, directory)


def test_only_what_changed_is_cached_again(lines, tmp_path):
    directory, names = tmp_path / "cache", ["one", "two"]
    one, two = lines("one"), lines("two")
    add("one", one)
    add("two", two)
    assert sorted(cached_again(names, directory)) == names
    assert seqio_cache.status("one", directory) == "cached"
    assert cached_again(names, directory) == []
    changes = {
        "source": lambda: pathlib.Path(one["train"]).write_text("other question\tanswer\n"),
        "argument": lambda: add("one", one, [functools.partial(split_line, prefix="Q: "), *STANDARD[1:]]),
        "code": lambda: add("one", one, [split_line, lambda dataset: dataset.skip(1), *STANDARD[1:]]),
        "other code": lambda: add("one", one, [split_line, lambda dataset: dataset.skip(2), *STANDARD[1:]]),
        "vocabulary": lambda: add("one", one, vocab=seqio.ByteVocabulary(extra_ids=7)),
        "eos": lambda: add("one", one, STANDARD[:-1]),
    }
    for what, change in changes.items():
        change()
        if what in ("source", "argument"):
            assert seqio_cache.status("one", directory) == "stale", what
        if what == "code":
            pathlib.Path(one["train"]).write_text("a\tb\n" * 5)
        assert cached_again(names, directory) == ["one"], what
        assert cached_again(names, directory) == [], what
    assert cached_again(["two"], directory) == []
    assert seqio_cache.cache_tasks(["two"], directory, force=True) == ["two"]
    assert seqio_cache.status("two", tmp_path / "elsewhere") == "missing"


def test_what_cannot_be_cached_is_named_and_the_rest_is_cached(lines, tmp_path):
    files = lines()
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "blank.tsv").write_text("question\t\n" * 3)
    tokenize = seqio.preprocessors.tokenize
    add("good", files)
    add("no_file", {"train": str(tmp_path / "missing.tsv")})
    add("no_examples", files | {"validation": str(tmp_path / "empty.tsv")})
    add("no_targets", files | {"train": str(tmp_path / "blank.tsv")})
    add("random", files, [split_line, tokenize, seqio.CacheDatasetPlaceholder(), shuffle_words])
    add("not_behind", files, [split_line, tokenize, seqio.preprocessors.append_eos, behind])
    add("not_tokenized", files, [split_line])
    odd = seqio.Feature(seqio.PassThroughVocabulary(10))
    seqio.TaskRegistry.add(
        "odd",
        source=seqio.TextLineDataSource(files),
        preprocessors=STANDARD,
        output_features={"targets": odd},
    )
    names = ["good", "no_file", "no_examples", "no_targets", "random", "not_behind", "not_tokenized", "odd"]
    done = []
    with pytest.raises(ValueError) as caught:
        seqio_cache.cache_tasks(names, tmp_path / "cache", progress=lambda *said: done.append(said))
    message = {line.split(":")[0].strip(): line for line in str(caught.value).splitlines()}
    assert "7 of 8 tasks" in str(caught.value)
    expected = {
        "no_file": "missing.tsv",
        "no_examples": "split 'validation' has no examples",
        "no_targets": "all 3 targets of split 'train' are empty",
        "random": "'shuffle_words' takes a seed",
        "not_behind": "'behind' stands behind 'append_eos'",
        "not_tokenized": "Is it tokenized?",
        "odd": "PassThroughVocabulary",
    }
    for name, part in expected.items():
        assert part in message[name], message[name]
    assert cache.task_names(tmp_path / "cache") == ["good"]
    assert [said[:2] for said in done] == [(n, 8) for n in range(1, 9)]
    assert not list((tmp_path / "cache").glob(".tmp*"))
    with pytest.raises(ValueError, match=r"Unknown task 'godo'.*Did you mean 'good'"):
        seqio_cache.cache_tasks(["godo"], tmp_path / "cache")


@pytest.mark.parametrize("wrong", [-1, 359, 65536, 70000])
def test_ids_outside_the_vocabulary_are_named(lines, tmp_path, wrong):
    def renumber(dataset):
        def change(number, example):
            return example | {"targets": tf.where(number == 2, [wrong], example["targets"][:1])}

        return dataset.enumerate().map(change)

    add(
        "wild", lines(), [split_line, seqio.preprocessors.tokenize, renumber, seqio.CacheDatasetPlaceholder()]
    )
    named = rf"wild: .*example 2 .*split 'train'.*'targets' has the id {wrong}, .* ids 0 to 358"
    with pytest.raises(ValueError, match=named):
        seqio_cache.cache_tasks(["wild"], tmp_path / "cache")
    assert cache.task_names(tmp_path / "cache") == []


def test_an_unfinished_task_is_no_task_and_is_cleared_away(lines, tmp_path):
    directory = tmp_path / "cache"
    add("one", lines())
    seqio_cache.cache_tasks(["one"], directory)
    gone = f".tmp-999999999-{publish.host()}-0-two"
    (directory / gone).mkdir()
    (directory / gone / "metadata.json").write_text("{}")
    mine = publish._temporary(directory / "three")
    mine.mkdir()
    assert cache.task_names(directory) == ["one"]
    (directory / "one" / "metadata.json").unlink()
    assert seqio_cache.status("one", directory) == "missing"
    assert seqio_cache.cache_tasks(["one"], directory) == ["one"]
    assert cache.open_task(directory, "one").source("train")[0]["targets"].size
    assert [path.name for path in directory.glob(".tmp*")] == [mine.name]
    # Of an earlier process with our id, of another machine just now, and long ago.
    reused, elsewhere, old = (
        directory / f".tmp-{os.getpid()}-{name}"
        for name in (f"{publish.host()}-0-four", "otherhost-0-five", "otherhost-0-six")
    )
    for path in (reused, elsewhere, old):
        path.mkdir()
    os.utime(old, (0, 0))
    publish.remove_abandoned(directory)
    assert set(directory.glob(".tmp*")) == {mine, elsewhere}


def test_a_full_disk_leaves_no_half_task(lines, tmp_path, monkeypatch):
    add("one", lines())
    seqio_cache.cache_tasks(["one"], tmp_path / "cache")

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(records, "fsync", full)
    with pytest.raises(ValueError, match=r"one: OSError: .*No space left on device.*train"):
        seqio_cache.cache_tasks(["one"], tmp_path / "cache", force=True)
    assert len(cache.open_task(tmp_path / "cache", "one").source("train")) == 30


RATES = st.floats(0.1, 10.0)


@given(st.lists(RATES, min_size=6, max_size=6), st.integers(5, 50), st.sampled_from([1.0, 2.0]))
@settings(max_examples=10, deadline=None)
def test_nested_rates_are_seqios(tmp_path_factory, rates, maximum, temperature):
    directory, added = tmp_path_factory.mktemp("nested"), []
    num_examples = {"r0": 10, "r1": 20, "r2": 40}
    cached = {}
    try:
        for name, count in num_examples.items():
            source = seqio.FunctionDataSource(
                lambda split, shuffle_files: None, ["train"], num_input_examples={"train": count}
            )
            features = {"targets": seqio.Feature(BYTES)}
            seqio.TaskRegistry.add(name, source=source, preprocessors=[], output_features=features)
            added.append((seqio.TaskRegistry, name))
            entry = {"num_examples": count, "tokens": {"targets": count}, "files": [{"num_examples": count}]}
            cached[name] = cache.CachedTask(name, directory / name, {"splits": {"train": entry}})
        rule = functools.partial(seqio.mixing_rate_num_examples, maximum=maximum, temperature=temperature)
        seqio.MixtureRegistry.add("inner", [("r0", rule), ("r1", rates[0])])
        seqio.MixtureRegistry.add("other", [("r1", rates[1]), ("r2", rule)])
        outer = [("inner", rates[2]), ("other", rates[3]), ("r0", rates[4]), ("r2", rule)]
        seqio.MixtureRegistry.add("outer", outer)
        added += [(seqio.MixtureRegistry, name) for name in ("inner", "other", "outer")]
        mixture = seqio.MixtureRegistry.get("outer")
        ours = mixtures._resolved(mixture, cached)
        for task in mixture.tasks:
            assert ours[task.name] == pytest.approx(mixture.get_rate(task))
        rule_of_r2 = mixtures._components(mixture)[-1]["rate"]
        assert rule_of_r2["function"] == "mixing_rate_num_examples"
        assert (rule_of_r2["maximum"], rule_of_r2["temperature"]) == (maximum, temperature)
    finally:
        for registry, name in added:
            registry.remove(name)


def test_rate_functions_see_one_pass(lines, tmp_path):
    add("noisy", lines(train=6), [*STANDARD[:2], cut_inputs, seqio.CacheDatasetPlaceholder()])
    directory = tmp_path / "cache"
    seqio_cache.cache_tasks(["noisy"], directory, request=seqio_cache.Request(epochs=2))
    cached = cache.open_task(directory, "noisy")
    assert len(cached.source("train")) == 12
    found = mixtures._Counted(seqio.TaskRegistry.get("noisy"), cached).get_cached_stats("train")
    tokens = sum(len(cached.source("train")[k]["inputs"]) for k in range(12))
    assert found["examples"] == 6 and found["inputs_tokens"] == round(tokens / 2)


def test_mixtures_are_cached_with_their_rates(lines, tmp_path):
    add("a", lines("a", train=10))
    add("b", lines("b", train=40))
    capped = functools.partial(seqio.mixing_rate_num_examples, maximum=20)
    seqio.MixtureRegistry.add("inner", ["a", "b"], default_rate=capped)
    seqio.MixtureRegistry.add("outer", [("inner", 3.0), ("a", 1.0)])
    directory = tmp_path / "cache"
    assert sorted(seqio_cache.cache_mixture("outer", directory)) == ["a", "b"]
    assert seqio_cache.cache_mixture("inner", directory) == []
    description = json.loads((directory / "mixtures" / "outer.json").read_text())
    assert description["rates"] == {"a": 2.0, "b": 2.0}
    inner = description["components"][0]
    assert inner["components"][1]["rate"]["maximum"] == 20 and inner["rate"] == 3.0
    mixture = cache.open_mixture(directory, "outer")
    assert [task.name for task in mixture.tasks] == ["a", "b"]
    assert seqio_cache.cache_mixture("a", directory) == []
    assert cache.open_mixture(directory, "a").tasks[0].name == "a"
    with pytest.raises(ValueError, match=r"Did you mean 'outer'"):
        seqio_cache.cache_mixture("outre", directory)
    for name, rates, message in (
        ("negative", (-1.0, 1.0), "'negative': component 'a' has rate -1.0"),
        ("zero", (0.0, 0.0), "All rates are zero"),
    ):
        seqio.MixtureRegistry.add(name, list(zip("ab", rates, strict=True)))
        with pytest.raises(ValueError, match=message):
            seqio_cache.cache_mixture(name, directory)
    seqio.MixtureRegistry.add("huge", [("a", 1e308), ("b", 1e308)])
    seqio.MixtureRegistry.add("around", [("huge", 1.0), ("b", 1.0)])
    with pytest.raises(
        ValueError, match=r"'around': component 'huge' has rate 1.0 over parts that sum to inf"
    ):
        seqio_cache.cache_mixture("around", directory)


def test_sentencepiece_models_are_kept_with_the_cache(lines, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = [f"question {i} and answer" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "small"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = str(tmp_path / "small.model")
    task = add("pieces", lines(), vocab=seqio.SentencePieceVocabulary(path, extra_ids=10))
    seqio_cache.cache_tasks(["pieces"], tmp_path / "cache")
    cached = cache.open_task(tmp_path / "cache", "pieces")
    assert cached.vocabulary("inputs").fingerprint == vocabulary.sentencepiece(path, 10).fingerprint
    theirs = next(task.get_dataset(None, split="train", shuffle=False).as_numpy_iterator())
    assert cached.source("train")[0]["inputs"].tolist() == theirs["inputs"].tolist()[:-1]
    os.remove(path)
    assert cached.vocabulary("targets").decode(theirs["targets"]) == "answer 0"


PARALLEL = """
import functools, os, pathlib, sys, time
import seqio, tensorflow as tf
from mtjax.data import cache, seqio_cache
folder = pathlib.Path(sys.argv[1])
def parse(dataset):
    return dataset.map(lambda line: {"inputs": line, "targets": line})
def die(dataset):
    if sys.argv[2] == "orphan":
        print("worker", os.getpid(), flush=True)
        os.kill(os.getppid(), 9)
        time.sleep(60)
    os._exit(9)
steps = [parse, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
names = []
for n in range(6):
    (folder / f"{n}.txt").write_text("some text\\n" * (n + 1))
    names.append(f"t{n}")
    seqio.TaskRegistry.add(names[-1], source=seqio.TextLineDataSource({"train": str(folder / f"{n}.txt")}),
        preprocessors=[die, *steps] if n == 5 and sys.argv[2] != "live" else steps,
        output_features={k: seqio.Feature(seqio.ByteVocabulary()) for k in ("inputs", "targets")})
try:
    pids = []
    written = seqio_cache.cache_tasks(names, folder / "cache", workers=2, progress=lambda *said: print(*said))
    print("written", len(written))
except ValueError as error:
    print(error)
print([len(cache.open_task(folder / "cache", n).source("train")) for n in cache.task_names(folder / "cache")])
"""


def parallel(tmp_path, how, returncode=0):
    command = [sys.executable, "-c", PARALLEL, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == returncode, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_worker_processes(tmp_path):
    said = parallel(tmp_path, "live")
    assert "6 6 t" in said and "written 6" in said and "[1, 2, 3, 4, 5, 6]" in said


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_worker_that_dies_is_reported_and_the_run_can_be_repeated(tmp_path):
    said = parallel(tmp_path, "die")
    assert "t5: a worker process died" in said
    assert "written" in parallel(tmp_path, "live")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_leaves_no_half_task_and_no_process(tmp_path):
    said = parallel(tmp_path, "orphan", returncode=-9)
    worker = int(said.split("worker")[1].split()[0])
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(worker, 0)
            time.sleep(0.2)
    assert "t5" not in cache.task_names(tmp_path / "cache")
    assert "written" in parallel(tmp_path, "live")
    assert cache.task_names(tmp_path / "cache") == [f"t{n}" for n in range(6)]
    assert not list((tmp_path / "cache").glob(".tmp*"))
