"""Drop training examples that share an n-gram with held-out ones, in cached tasks.

As GPT-3 (arXiv:2005.14165, appendix C): n-grams of lower-case words without punctuation (n = 13), here of the
decoded ids of all features; n-grams that more than 10 training examples of the task share are prompts and
common phrases rather than leaked examples, and do not count. A text of fewer than n words is one n-gram.

Held-out n-grams are kept as sorted 64-bit hashes, 8 bytes each: of 10^9 held-out and 10^9 training n-grams,
0.05 agree by chance.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtjax.data import cache, fingerprint, publish, records
from mtjax.data.counts import Counts
from mtjax.data.vocabulary import Vocabulary, model_path

TRAIN = "train"
N = 13
COMMON = 10
_WORD = re.compile(r"\w+")
_BATCH = 512  # examples whose n-grams are hashed at once
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Rule(NamedTuple):
    """What to drop: training examples that share an n-gram with a split of a mixture; '' undoes it."""

    against: str = ""  # mixture or task
    split: str = ""
    n: int = N

    def __str__(self) -> str:
        return f"against={self.against}:{self.split} n={self.n}" if self.against else "none"


def parse(words: Sequence[str]) -> Rule:
    """Parse 'against=<mixture:split>', perhaps with 'n=<words>', or 'none', which undoes it."""
    if list(words) == ["none"]:
        return Rule()
    given = {name: value for name, _, value in (word.partition("=") for word in words)}
    against, colon, split = given.get("against", "").rpartition(":")
    n = given.get("n", str(N))
    if given.keys() - {"against", "n"} or not (against and colon and split) or not n.isdigit() or int(n) < 1:
        raise ValueError(
            f"--decontaminate {' '.join(words)}: expected against=MIXTURE:SPLIT, perhaps with n=WORDS "
            f"(default {N}), or none."
        )
    if split == TRAIN:
        raise ValueError(f"--decontaminate {' '.join(words)}: {TRAIN!r} is what is cleaned, not held out.")
    return Rule(against, split, int(n))


def rule_of(metadata: Mapping[str, Any]) -> Rule | None:
    """Return the rule that a cached task is to be cleaned by."""
    wish = metadata["decontaminate"]
    return None if wish is None else Rule(**wish)


class HeldOut:
    """The held-out examples of a rule: cached tasks, their identity and their n-grams."""

    def __init__(self, rule: Rule, names: Sequence[str], cache_dirs: cache.CacheDirs):
        """Open the tasks `names`, those of the rule's mixture.

        Raises ValueError where one of them is not cached, or where none has the split.
        """
        self.rule = rule
        self.tasks = [
            task
            for task in (cache.open_task(cache_dirs, name, unfinished=True) for name in names)
            if rule.split in task.splits
        ]
        if not self.tasks:
            raise ValueError(
                f"--decontaminate {rule}: none of {len(names)} tasks has a split {rule.split!r}."
            )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Return the rule with a hash of what the held-out ids depend on."""
        parts = {task.name: task.metadata["parts"] for task in self.tasks}
        return self.rule._asdict() | {"held_out": fingerprint.fingerprint(parts), "common": COMMON}

    @functools.cached_property
    def ngrams(self) -> np.ndarray:
        """Return the sorted hashes of the held-out n-grams, uint64."""
        found = [
            np.unique(
                np.concatenate([hashes for hashes, _ in task_ngrams(task, self.rule.split, self.rule.n)])
            )
            for task in self.tasks
        ]
        return np.unique(np.concatenate(found))


def mark(task: cache.CachedTask, rule: Rule) -> None:
    """Note that a task's contaminated examples are to be dropped: until `clean` has, it cannot be read."""
    metadata = {**task.metadata, "decontaminate": rule._asdict(), "decontaminated": None}
    publish.write_json(task.directory / "metadata.json", metadata)


def clean(task: cache.CachedTask, held_out: HeldOut, final: pathlib.Path) -> dict[str, Any]:
    """Write a cached task without its contaminated training examples as `final`; return its metadata.

    Where `final` is the task's own folder, the new one takes its place at once. Raises ValueError where no example would be left.
    """
    keep, common = _kept(task, held_out)
    if not keep.any():
        raise ValueError(
            f"all {len(keep)} training examples share an n-gram with {held_out.rule.against}:"
            f"{held_out.rule.split}; raise n or leave the task out."
        )
    passes = task.epochs(TRAIN)
    if final.parent != task.directory.parent:
        _keep_models(task, final.parent / cache.VOCABULARIES)
    with publish.folder(final) as folder:
        metadata = dict(task.metadata)
        if not keep.all():
            entry = _write_kept(task, np.tile(keep, passes), folder, passes)
            metadata["splits"] = {**metadata["splits"], TRAIN: entry}
        kept = {file["name"] for split in metadata["splits"].values() for file in split["files"]}
        kept |= {split["examples"]["name"] for split in metadata["splits"].values() if "examples" in split}
        for name in kept:
            if not (folder / name).exists():
                _link(task.directory / name, folder / name)
        metadata["decontaminate"] = held_out.rule._asdict()
        metadata["decontaminated"] = {
            "rule": held_out.identity,
            "dropped": int((~keep).sum()),
            "examples": len(keep),
            "common_ngrams": common,
            "held_out_tasks": len(held_out.tasks),
        }
        metadata["fingerprint"] = cache.fingerprint_of(metadata)
        publish.write_json(folder / "metadata.json", metadata)
    return metadata


def _kept(task: cache.CachedTask, held_out: HeldOut) -> tuple[np.ndarray, int]:
    """Tell which examples stay, bool [examples of a pass], and how many common n-grams did not count."""
    ngrams, count = held_out.ngrams, task.num_examples(TRAIN)
    hits: list[np.ndarray] = []
    for hashes, examples in task_ngrams(task, TRAIN, held_out.rule.n):
        places = np.minimum(np.searchsorted(ngrams, hashes), len(ngrams) - 1)
        found = ngrams[places] == hashes
        hits.append(places[found] * count + examples[found] % count)
    pairs = np.unique(np.concatenate(hits))  # an n-gram counts once an example
    _, number, shared = np.unique(pairs // count, return_inverse=True, return_counts=True)
    keep = np.ones(count, bool)
    keep[pairs[shared[number] <= COMMON] % count] = False
    return keep, int((shared > COMMON).sum())


def _write_kept(
    task: cache.CachedTask, keep: np.ndarray, folder: pathlib.Path, passes: int
) -> dict[str, Any]:
    source, counts = task.source(TRAIN), Counts(task.features)

    def encoded() -> Iterator[bytes]:
        for index in np.flatnonzero(keep).tolist():
            ids = source.read(index)
            counts.add(ids)
            yield records.encode(ids, task.metadata["dtype"])

    files = records.write(encoded(), folder / TRAIN)
    return {**task.metadata["splits"][TRAIN], **counts.entry(TRAIN, passes=passes), "files": files}


def _keep_models(task: cache.CachedTask, directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for feature in task.metadata["features"]:
        vocabulary = task.vocabulary(feature)
        if vocabulary.model:
            publish.write(model_path(vocabulary.fingerprint, directory), vocabulary.model)


def _link(old: pathlib.Path, new: pathlib.Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copy2(old, new)
        records.fsync(new)


# N-grams.


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, without punctuation."""
    return _WORD.findall(text.lower())


def task_ngrams(task: cache.CachedTask, split: str, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (hashes of a task's n-grams, index of the example each is from) of a split, batch by batch."""
    source = task.source(split)
    vocabularies = [task.vocabulary(feature) for feature in task.features]
    for start in range(0, len(source), _BATCH):
        indices = range(start, min(start + _BATCH, len(source)))
        texts = [words(_text(source.read(index), vocabularies)) for index in indices]
        hashes, owners = hashed_ngrams(texts, n)
        yield hashes, owners + start


def _text(ids: Sequence[np.ndarray], vocabularies: Sequence[Vocabulary]) -> str:
    return " ".join(v.decode(part.tolist()) for part, v in zip(ids, vocabularies, strict=True))


def hashed_ngrams(texts: Sequence[Sequence[str]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash all n-grams of texts; a text shorter than n words is one n-gram, an empty one has none.

    Returns (hashes, number of the text each is from).
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    flat = np.array([_word_hash(word) for text in texts for word in text], np.uint64)
    if not len(flat):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    owners = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # words up to the end of the text
    is_first = left == np.repeat(lengths, lengths)
    rolled = np.zeros(len(flat), np.uint64)
    padded = np.concatenate([flat, np.zeros(n, np.uint64)])
    for k in range(n):
        word = np.where(left > k, padded[k : k + len(flat)], np.uint64(0))
        rolled = _mix(rolled * _MULTIPLIER + word)
    complete = (left >= n) | is_first
    return rolled[complete], owners[complete]


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ (values >> np.uint64(29))


@functools.lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
