"""Our own model directories as a source and a target of conversion."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtjax import checkpoint
from mtjax.convert.weights import SLOTS, Weights, checked, stacked, unstacked
from mtjax.data import vocabulary
from mtjax.lazy import Leaf
from mtjax.models import configs, t5


def read(path: str | os.PathLike) -> Weights:
    """Open the parameters (their average, where the run kept one) of a model directory or checkpoint.

    With them comes the state of an Adafactor that trained just these parameters. Raises ValueError where it
    holds no encoder-decoder.
    """
    folder = checkpoint.find(path)
    meta = checkpoint.read_meta(folder)
    config = config_of(meta["model"], source=str(folder))
    found = checkpoint.arrays(folder, parts=("params", "frozen", "average", "opt"))
    parts = {name.split("/")[0] for name in found}
    trained = "average" if "average" in parts else "params"
    leaves = {
        name.partition("/")[2]: leaf
        for name, leaf in found.items()
        if name.split("/")[0] in (trained, "frozen")
    }
    optimizer = {} if parts & {"average", "frozen"} else _moments(found)
    kept = Path(folder).parent.parent / vocabulary.FOLDER
    features = vocabulary.read(kept) if kept.is_dir() else {}
    origin = {**meta.get("origin", {}), "mtjax": Path(folder).parent.parent.name}
    if config.moe is not None and config.moe.num_tasks:  # rows of tasks keep their names
        origin |= {name: meta[name] for name in ("tasks", "families")}
    weights = Weights(
        config,
        unstacked(config, leaves),
        origin,
        features["targets"][0] if "targets" in features else None,
        int(Path(folder).name),
        unstacked(config, optimizer),
        meta.get("decoding", {}),
    )
    return checked(weights, source=repr(str(folder)))


def _moments(found: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Turn an AdafactorState's opt/SLOT/PARAMETER to PARAMETER/SLOT; {} where another optimizer's lies there."""
    moments: dict[str, Leaf] = {}
    for name, leaf in found.items():
        part, _, rest = name.partition("/")
        slot, _, parameter = rest.partition("/")
        if part == "opt" and rest != "step":
            if slot not in SLOTS:
                return {}
            moments[f"{parameter}/{slot}"] = leaf
    return moments


def config_of(described: Mapping[str, Any], *, source: str) -> t5.T5Config:
    """Build the configuration that a checkpoint's meta describes."""
    if described.get("name") != "T5Config":
        raise ValueError(f"{source!r} holds a {described.get('name')}; only encoder-decoders are converted.")
    return configs.build(described)


def write(weights: Weights, directory: str | os.PathLike) -> None:
    """Write a model directory: one checkpoint, the vocabulary, and in its meta the origin and the beam search.

    It holds parameters, and Adafactor's state where the weights have it. Finetuning starts from it
    (INITIAL_CHECKPOINT_PATH), and what T5X trained goes on from it (INITIAL_STATE = 'optimizer').
    """
    directory = Path(directory)
    found = weights.vocabulary
    if found is not None:
        if found.size > weights.config.vocab_size:
            raise ValueError(
                f"The vocabulary has {found.size} ids, the embedding {weights.config.vocab_size} rows. Give the "
                "model's own vocabulary and number of extra ids."
            )
        features = {name: (found, True) for name in ("inputs", "targets")}
        vocabulary.write(directory / vocabulary.FOLDER, features)
    meta = {
        "tasks": list(weights.origin.get("tasks", ())),
        "families": list(weights.origin.get("families", ())),
        "groups": [],
        "vocabulary": {} if found is None else {"origin": found.fingerprint},
        "model": configs.describe(weights.config),
        "mesh": {},
        "environment": {},
        "config": "",
        "origin": dict(weights.origin),
        "decoding": dict(weights.decoding),
    }
    state: dict[str, Any] = {"params": stacked(weights.config, weights.leaves)}
    if weights.optimizer:
        state["opt"] = {"step": np.array(weights.step, np.int32)} | _adafactor(weights)
    checkpointer = checkpoint.Checkpointer(directory, asynchronous=False)
    with contextlib.closing(checkpointer):
        checkpointer.save(weights.step, state, host={}, meta=meta)


def _adafactor(weights: Weights) -> dict[str, Any]:
    """Nest moments as optim.AdafactorState does."""
    state: dict[str, Any] = {}
    for slot in SLOTS:
        suffix = f"/{slot}"
        leaves = {p.removesuffix(suffix): x for p, x in weights.optimizer.items() if p.endswith(suffix)}
        if leaves:
            state[slot] = stacked(weights.config, leaves)
    return state
