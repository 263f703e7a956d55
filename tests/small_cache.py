"""Writes small caches of chosen ids without TensorFlow, for tests of what reads them."""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtjax.data import cache, counts, records, vocabulary

Examples = Sequence[Sequence[Sequence[int]]]  # (inputs, targets) or (targets,) each


def write_task(
    directory: pathlib.Path,
    name: str,
    splits: Mapping[str, Examples],
    *,
    online: Sequence[Mapping[str, Any]] = ({"name": "append_eos_after_trim", "arguments": {}},),
    features: Sequence[str] = ("inputs", "targets"),
    vocab: vocabulary.Vocabulary | None = None,
    family: str = "default",
    passes: int = 1,
    options: Sequence[str] | None = None,
) -> cache.CachedTask:
    """Write one task and open it; the training examples are those of all passes."""
    vocab = vocab or vocabulary.byte(extra_ids=100)
    folder = pathlib.Path(directory) / name
    folder.mkdir(parents=True)
    metadata = {
        "format": cache.FORMAT,
        "name": name,
        "fingerprint": f"fingerprint of {name}",
        "dtype": records.token_dtype([vocab.size]),
        "features": {
            feature: {"cached": feature in features, "add_eos": True, "vocabulary": vocab.spec()}
            for feature in ("inputs", "targets")
        },
        "online": list(online),
        "parts": {"ids": name},
        "epochs": passes,
        "source_files": [],
        "imported": None,
        "decontaminate": None,
        "decontaminated": None,
        "splits": {},
        "family": family,
        "licence": "",
        "citation": "",
        "source": "test",
        "options": options,
        "metrics": ["accuracy"],
    }
    for split, examples in splits.items():
        counted = counts.Counts(features)
        encoded = (records.encode([np.array(ids) for ids in e], metadata["dtype"]) for e in examples)
        files = records.write(encoded, folder / split)
        for example in examples:
            counted.add([np.array(ids) for ids in example])
        metadata["splits"][split] = {
            **counted.entry(split, passes=passes if split == "train" else 1),
            "files": files,
        }
        if split != "train":
            path = folder / f"{split}.examples.jsonl"
            path.write_text("".join(json.dumps({"number": i}) + "\n" for i in range(len(examples))))
            content = path.read_bytes()
            raw = {"name": path.name, "bytes": len(content), "crc32": zlib.crc32(content)}
            metadata["splits"][split]["examples"] = raw
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return cache.open_task(directory, name)


def write_mixture(directory: pathlib.Path, name: str, rates: Mapping[str, float]) -> None:
    """Write a mixture of cached tasks."""
    tasks = sorted(rates)
    content = {
        "format": cache.FORMAT,
        "name": name,
        "tasks": tasks,
        "fingerprints": {task: cache.open_task(directory, task).fingerprint for task in tasks},
        "rates": dict(rates),
    }
    folder = pathlib.Path(directory) / cache.MIXTURES
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def random_examples(
    rng: np.random.Generator,
    count: int,
    *,
    inputs: tuple[int, int] = (1, 20),
    targets: tuple[int, int] = (1, 8),
) -> list[list[list[int]]]:
    """Return examples of random ids, lengths uniform between the given bounds."""
    return [
        [rng.integers(3, 250, rng.integers(low, high + 1)).tolist() for low, high in (inputs, targets)]
        for _ in range(count)
    ]
