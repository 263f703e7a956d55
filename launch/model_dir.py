"""Open what `mtjax train` wrote: the model, its tasks and its checkpoints, from the configuration saved beside them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mtjax import checkpoint, sharding, train, tree
from mtjax.data import cache, pipeline
from mtjax.launch import config, flags, prepare
from mtjax.types import Model, Params


class Run(NamedTuple):
    """A training run on disk."""

    directory: Path
    model: Model
    data: pipeline.TrainData
    cache_dirs: list[str]
    train_steps: int
    mesh: Mesh
    rules: sharding.Rules
    best_metric: str
    best_mode: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what opening a run takes."""
    flags.add_model_dir(parser)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the run's saved configuration, e.g. --gin.MESH={'model': 2}; repeatable",
    )
    flags.add_cache(parser)
