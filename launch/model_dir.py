"""Open what `mtjax train` wrote: the model and its checkpoints, by the configuration saved beside them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtjax.launch import flags

CONFIG = "config.gin"


class Run(NamedTuple):
    """A training run on disk: what it trained, on what data, and where parameters go."""

    directory: Path
    arguments: dict[str, Any]  # of train.fit
    cache_dirs: list[str]
    mesh: Any
    abstract: Any  # parameters as ShapeDtypeStructs with shardings

    @property
    def model(self) -> Any:
        """Return the model."""
        return self.arguments["model"]

    @property
    def data(self) -> Any:
        """Return the training data's description, with the batch size to predict with."""
        return self.arguments["data"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that predict with a trained model."""
    flags.add_model_dir(parser)
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the run's saved configuration, e.g. --gin.MESH=\"{'model': 2}\"; repeatable",
    )
    parser.add_argument(
        "--batch_size", type=int, metavar="ROWS", help="rows on all devices (default: as in training)"
    )
    add_decoding(parser)


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add --decode and what it can be tuned by."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--decode",
        default="greedy",
        metavar="MODE",
        help="greedy, beam, sample, or rank: the likeliest of the listed options (default: greedy)",
    )
    group.add_argument(
        "--max_length",
        type=int,
        metavar="TOKENS",
        help="longest prediction (default: the targets of training)",
    )
    group.add_argument(
        "--num_beams", type=int, metavar="N", help="beam: hypotheses (default: the model's, or 4)"
    )
    group.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="beam: exponent of the length (default: the model's, or 0.6)",
    )
    group.add_argument(
        "--normaliser",
        metavar="NAME",
        help="beam: t5x, ((5+n)/6)^X, or huggingface, n^X (default: what the model came with, or t5x)",
    )
    group.add_argument(
        "--stopping",
        metavar="NAME",
        help="beam: t5x, huggingface, huggingface_early or huggingface_never (default: as --normaliser)",
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="X", help="sample (default: 1)")
    group.add_argument("--top_k", type=int, default=0, metavar="N", help="sample: likeliest tokens (0: all)")
    group.add_argument("--top_p", type=float, default=0.0, metavar="X", help="sample: nucleus (0: all)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="sample (default: 0)")
    group.add_argument(
        "--length_normalized",
        action="store_true",
        help="rank: by mean, not summed, log-probability of tokens",
    )


def decoder(args: argparse.Namespace, recorded: Mapping[str, Any] | None = None) -> Any:
    """Return the DecodeConfig of the flags; what they leave open is as `recorded` with the model."""
    from mtjax.predict import DecodeConfig

    names = [field.name for field in dataclasses.fields(DecodeConfig) if field.name != "mode"]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.normaliser and not args.stopping:
        given["stopping"] = args.normaliser
    return DecodeConfig(args.decode, **{**(recorded or {}), **given})


def open_run(args: argparse.Namespace, *, cache_dirs: Sequence[str] = ()) -> Run:
    """Build the model and the layout of its parameters from <model_dir>/config.gin.

    cache_dirs are searched before those of the configuration.

    Raises ValueError where model_dir holds no run.
    """
    from mtjax import program, sharding, train
    from mtjax.launch import config, prepare

    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}.")
    directory = Path(args.model_dir).absolute()
    if not (directory / CONFIG).is_file():
        near = sorted(str(path.parent) for path in directory.parent.glob(f"*/{CONFIG}"))
        hint = f" Runs beside it: {', '.join(near[:5])}." if near else ""
        raise ValueError(f"{str(directory)!r} is no model directory: it has no {CONFIG}.{hint}")
    parsed = config.parse([str(directory / CONFIG)], args.gin_bindings, roots=[prepare.mixture, train.fit])
    arguments = parsed.arguments(train.fit)
    data = arguments["data"]
    arguments["data"] = dataclasses.replace(data, batch_size=args.batch_size or data.batch_size)
    changed = {"microbatches": 1, "tasks": _trained_tasks(directory)}
    built = train.prepare(**train.program_arguments(arguments) | changed)
    sharding.check_divides(built.mesh, arguments["data"].batch_size)
    searched = list(dict.fromkeys([*cache_dirs, *data.cache_dirs]))
    return Run(directory, arguments, searched, built.mesh, program.abstract_parameters(built))


def _trained_tasks(directory: Path) -> Any:
    """Return the tasks of the last checkpoint; None, so that the cache is asked, before there is one."""
    from mtjax import checkpoint, train

    if not checkpoint.checkpoint_steps(directory):
        return None
    meta = checkpoint.read_meta(directory)
    return train.TaskTable(tuple(meta["tasks"]), tuple(meta["families"]))


def task_ids(run: Run, meta: Mapping[str, Any]) -> dict[str, int]:
    """Return tasks' ids by name: those of training, and those that the model describes beside them."""
    from mtjax.models import routers

    routers.check_descriptions(run.model.config, meta["tasks"])
    names = routers.described_tasks(run.model.config) or meta["tasks"]
    return {name: i for i, name in enumerate(names)}


def predictor(run: Run, args: argparse.Namespace) -> Any:
    """Compile the run's model for prediction, with the beam search that its last checkpoint records."""
    from mtjax import checkpoint, predict

    steps = checkpoint.checkpoint_steps(run.directory)
    recorded = checkpoint.read_meta(run.directory).get("decoding") if steps else None
    return predict.predictor(
        run.model,
        decoder(args, recorded),
        lengths=run.data.lengths,
        batch_size=run.data.batch_size,
        mesh=run.mesh,
        architecture=run.data.architecture,
    )


def restore(run: Run, step: int) -> tuple[Any, dict[str, Any]]:
    """Return a checkpoint's parameters and meta."""
    from mtjax import checkpoint

    path = run.directory / checkpoint.FOLDER / str(step)
    return checkpoint.restore_parameters(path, run.abstract), checkpoint.read_meta(path)


def chosen_steps(run: Run, text: str) -> list[int]:
    """Return the steps that --checkpoints means: latest, best, all, or numbers between commas.

    Raises ValueError where there is no such checkpoint, with the nearest ones.
    """
    from mtjax import checkpoint

    steps = checkpoint.checkpoint_steps(run.directory)
    if not steps:
        raise ValueError(f"{str(run.directory)!r} has no complete checkpoint yet.")
    if text == "all":
        return steps
    chosen = {_step(run, item.strip(), steps) for item in text.split(",") if item.strip()}
    return sorted(chosen)


def _step(run: Run, item: str, steps: Sequence[int]) -> int:
    from mtjax import tree

    if item == "latest":
        return steps[-1]
    if item == "best":
        return best_step(run, steps)
    if not item.isdigit():
        raise tree.unknown_name("checkpoint", item, ["latest", "best", "all", *map(str, steps)])
    if int(item) not in steps:
        near = sorted(steps, key=lambda step: abs(step - int(item)))[:3]
        raise ValueError(f"No checkpoint of step {item} in {str(run.directory)!r}; the nearest: {near}.")
    return int(item)


def best_step(run: Run, steps: Sequence[int]) -> int:
    """Return the step that was best by the run's own evaluation metric.

    Raises ValueError where no checkpoint was evaluated.
    """
    evaluation = run.arguments.get("evaluation")
    metric, sign = getattr(evaluation, "metric", None), -1 if getattr(evaluation, "mode", "") == "max" else 1
    values = {step: saved_metrics(run, step).get(metric) for step in steps}
    found = {step: sign * value for step, value in values.items() if value is not None}
    if not found:
        raise ValueError(
            f"No checkpoint of {str(run.directory)!r} was evaluated in training (EVAL_PERIOD), so none is best. "
            f"Choose of {list(steps)}."
        )
    return min(found, key=lambda step: (found[step], step))


def saved_metrics(run: Run, step: int) -> Mapping[str, float]:
    """Return the metrics that were saved with a checkpoint; {} where there are none."""
    from mtjax import checkpoint

    path = run.directory / checkpoint.FOLDER / str(step) / "metrics" / "metrics"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def check_vocabulary(run: Run, meta: Mapping[str, Any], tasks: Sequence[Any]) -> None:
    """Raise ValueError where a cached task has another vocabulary than the checkpoint was trained with."""
    known = set(meta["vocabulary"].values())
    for task in tasks:
        found = task.vocabulary("targets")
        if found.fingerprint not in known:
            raise ValueError(
                f"The vocabulary of task {task.name!r} in {str(task.directory)!r} ({found.size} ids, fingerprint "
                f"{found.fingerprint}) is not the one that {str(run.directory)!r} was trained with "
                f"({', '.join(sorted(known))}). Cache the task with that vocabulary, or give its --cache_dir."
            )
