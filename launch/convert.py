"""`mtjax convert`: Hugging Face and T5X checkpoints to ours and back."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mtjax.launch.model_dir import CONFIG

EXAMPLES = """
examples:
  mtjax convert --from=hf:flan-t5-base --to=runs/flan_base           # then finetune:
  mtjax train --gin_file=runs/finetune.gin --gin.INITIAL_CHECKPOINT_PATH=runs/flan_base \\
      --gin.MIXTURE_OR_TASK_NAME=NAME --gin.TRAIN_STEPS=2000 --gin.MODEL_DIR=runs/mine
  mtjax convert --from=runs/mine --to=hf:exported                    # transformers' from_pretrained opens it
  mtjax convert --from=t5x:t5_1_1_small/checkpoint_1000000 --to=runs/t5_1_1_small --vocabulary=cc_all.32000.model
  mtjax convert --from=runs/t5_1_1_base --upcycle=models/task_gated_base.gin --gin.NUM_TASKS=8 --to=runs/sparse
  mtjax convert --from=runs/mine --average=5 --to=runs/mean          # mean of the last five checkpoints

Formats: hf:DIR (config.json and safetensors of T5, T5 1.1, Flan-T5, mT5, UMT5, ByT5, LongT5, Switch), t5x:DIR (legacy
or Orbax; written as legacy), DIR (a model directory of mtjax, or one checkpoint in it). Between the last two the state
of Adafactor and the step come along: --gin.INITIAL_STATE=optimizer goes on with them.
"""
MODEL = "model.gin"
_MACROS = {  # of a configuration that is no training run
    "MIXTURE_OR_TASK_NAME": "converted",
    "MODEL_DIR": "",
    "TRAIN_STEPS": 1,
    "CACHE_DIRS": [],
    "BATCH_SIZE": 8,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax convert`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--from", dest="source", required=True, metavar="[FORMAT:]DIR", help="what to read")
    parser.add_argument("--to", required=True, metavar="[FORMAT:]DIR", help="a new folder to write")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE[:SENTINELS]",
        help="SentencePiece model, or 'byte', of a source that brings none (100 sentinels unless given)",
    )
    steps = parser.add_argument_group("on the way")
    steps.add_argument("--dtype", metavar="TYPE", help="round parameters to float32 or bfloat16")
    steps.add_argument(
        "--pad_vocabulary",
        type=int,
        metavar="N",
        help="grow the embedding to a multiple of N rows, with zeros",
    )
    steps.add_argument(
        "--kv_heads",
        type=int,
        metavar="N",
        help="grouped queries: N keys and values a layer of the decoder, each the mean of its group (ours only)",
    )
    steps.add_argument(
        "--upcycle",
        metavar="FILE",
        help="make the mixture of experts of this gin file (models/...) of a dense model: every expert a copy (ours only)",
    )
    steps.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="--upcycle: what its file leaves open, e.g. --gin.NUM_TASKS=8; repeatable",
    )
    steps.add_argument(
        "--average", type=int, metavar="N", help="the mean of the source's last N checkpoints (ours only)"
    )
    steps.add_argument("--no_optimizer", action="store_true", help="leave the optimizer's state behind")
    steps.add_argument(
        "--scan_layers",
        choices=["true", "false"],
        help="stack the layers' parameters, or not (ours only; default: as in the source)",
    )
    steps.add_argument(
        "--max_distance",
        type=int,
        metavar="N",
        help="relative bias of a T5X model (default: 128)",
    )
    steps.add_argument("--activation", metavar="NAME", help="gated block of a T5X model (default: gelu)")
    steps.add_argument("--max_shard_gb", type=float, metavar="X", help="of a safetensors file (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Read, change, write; the target appears whole or not at all."""
    from mtjax.data import publish
    from mtjax.launch import screen

    kind, target = parse_place(args.to)
    _check_flags(args, parse_place(args.source)[0], kind)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{str(target)!r} is not empty; give --to a new folder.")
    source = _read(args)
    weights = _changed(source, args)
    if kind == "hf" and weights.config.scan_layers:
        weights = weights._replace(config=dataclasses.replace(weights.config, scan_layers=False))
    target.parent.mkdir(parents=True, exist_ok=True)
    with publish.folder(target) as folder:
        _write(weights, kind, folder, target, max_shard_bytes=round((args.max_shard_gb or 5) * 1e9))
    count = sum(leaf.size for leaf in weights.leaves.values())
    size = sum(leaf.nbytes for leaf in weights.leaves.values())
    print(
        f"{args.to}: {count:,} parameters, {screen.size(size)}, from {args.source}"
        + ("" if weights.vocabulary or kind != "mtjax" else "; no vocabulary (--vocabulary)")
        + _said_of_optimizer(source, weights, kind)
    )
    return 0


def _said_of_optimizer(source: Any, weights: Any, kind: str) -> str:
    if not source.optimizer:
        return ""
    is_kept = weights.optimizer and kind != "hf"
    return f"; {'with' if is_kept else 'without'} the optimizer's state of step {source.step}"


def parse_place(text: str) -> tuple[str, Path]:
    """Split [FORMAT:]DIR."""
    from mtjax import tree

    kind, colon, rest = text.partition(":")
    if not colon or "/" in kind or rest.startswith("//"):  # also gs://...
        return "mtjax", Path(text)
    if kind not in ("hf", "t5x"):
        raise tree.unknown_name("format", kind, ["hf", "t5x"])
    return kind, Path(rest)


def _check_flags(args: argparse.Namespace, source: str, target: str) -> None:
    """Refuse flags that the formats have no use for."""
    of_source = {"average": "mtjax", "max_distance": "t5x", "activation": "t5x"}
    of_target = {"scan_layers": "mtjax", "upcycle": "mtjax", "kv_heads": "mtjax", "max_shard_gb": "hf"}
    for flags, kind, end in ((of_source, source, "--from"), (of_target, target, "--to")):
        for name, only in flags.items():
            if getattr(args, name) is not None and kind != only:
                raise ValueError(f"--{name} is for {end}={'DIR' if only == 'mtjax' else f'{only}:DIR'} only.")
    if args.gin_bindings and not args.upcycle:
        raise ValueError("--gin_bindings (--gin.NAME=VALUE) are for --upcycle only.")
    if args.vocabulary and target == "t5x":
        raise ValueError("--vocabulary: a T5X checkpoint holds none.")


def _read(args: argparse.Namespace) -> Any:
    from mtjax import checkpoint, convert
    from mtjax.convert import huggingface, t5x

    kind, source = parse_place(args.source)
    if not source.exists():
        raise ValueError(f"There is no {str(source)!r} (--from={args.source}).")
    if kind == "hf":
        return huggingface.read(source)
    if kind == "t5x":
        return t5x.read(source, max_distance=args.max_distance or 128, activation=args.activation or "gelu")
    if args.average is None:
        return convert.read_model_directory(source)
    steps = checkpoint.checkpoint_steps(source)
    if not steps:
        raise ValueError(f"--average: {str(source)!r} is no model directory with checkpoints.")
    if not 1 <= args.average <= len(steps):
        raise ValueError(
            f"--average={args.average}: {str(source)!r} holds {len(steps)} checkpoints: {steps}."
        )
    folders = [source / checkpoint.FOLDER / str(step) for step in steps[-args.average :]]
    return convert.average([convert.read_model_directory(folder) for folder in folders])


def _changed(weights: Any, args: argparse.Namespace) -> Any:
    from mtjax import convert
    from mtjax.data import vocabulary

    if args.no_optimizer:
        weights = weights._replace(optimizer={})
    if args.vocabulary:
        weights = weights._replace(vocabulary=vocabulary.from_text(args.vocabulary))
    if args.pad_vocabulary is not None:
        weights = convert.pad_vocabulary(weights, args.pad_vocabulary)
    if args.kv_heads is not None:
        weights = convert.group_heads(weights, args.kv_heads)
    if args.upcycle:
        weights = convert.upcycle(weights, _model_config(args.upcycle, args.gin_bindings))
    if args.dtype:
        weights = convert.cast(weights, args.dtype)
    if args.scan_layers:
        config = dataclasses.replace(weights.config, scan_layers=args.scan_layers == "true")
        weights = weights._replace(config=config)
    return weights


def _write(weights: Any, kind: str, folder: Path, target: Path, *, max_shard_bytes: int) -> None:
    from mtjax import convert
    from mtjax.convert import huggingface, t5x

    if kind == "hf":
        huggingface.write(weights, folder, max_shard_bytes=max_shard_bytes)
    elif kind == "t5x":
        t5x.write(weights, folder)
    else:
        convert.write_model_directory(weights, folder)
        model = model_gin(weights.config)
        (folder / MODEL).write_text(model, "utf-8")
        (folder / CONFIG).write_text(_run_gin(model, target.absolute()), "utf-8")


def _model_config(gin_file: str, bindings: list[str]) -> Any:
    """Return the configuration of the model that a gin file binds."""
    from mtjax import train
    from mtjax.launch import config, prepare

    roots = [prepare.mixture, train.fit]
    parsed = config.parse([gin_file, "runs/pretrain.gin"], bindings, roots=roots, defaults=_MACROS)
    return parsed.arguments(train.fit, only=["model"])["model"].config


def model_gin(config: Any) -> str:
    """Bind the model in gin, as the files in gin/models do."""
    bindings = "\n".join(_bindings(config, ""))
    modules = [name for name in ("moe", "routers", "t5") if f"{name}." in bindings]
    return "\n".join(
        [
            "# The architecture of a checkpoint. Give it with a run: --gin_file=THIS FILE",
            "# --gin_file=runs/pretrain.gin. runs/finetune.gin takes it from INITIAL_CHECKPOINT_PATH.",
            "from __gin__ import dynamic_registration",
            "from mtjax import train",
            *(f"from mtjax.models import {name}" for name in modules),
            "",
            f"ACTIVATION_DTYPE = {config.dtype!r}",
            *([f"NUM_TASKS = {config.moe.num_tasks}"] if "%NUM_TASKS" in bindings else []),
            "",
            "train.fit.model = @t5.t5()",
            "t5.t5.config = @t5.T5Config()",
            bindings,
            "",
        ]
    )


def _bindings(config: Any, scope: str) -> list[str]:
    """Return the lines that bind a configuration, and after them those of what it holds, each in its scope."""
    macros = {"dtype": "%ACTIVATION_DTYPE", "dropout_rate": "%DROPOUT_RATE"}
    if getattr(config, "num_tasks", 0):
        macros["num_tasks"] = "%NUM_TASKS"
    lines, inner = [f"{scope}{_gin_name(config)}:"], []
    for field in dataclasses.fields(config):
        value, inside = getattr(config, field.name), f"{scope}{field.name}/"
        if dataclasses.is_dataclass(value):
            lines.append(f"    {field.name} = @{inside}{_gin_name(value)}()")
            inner += _bindings(value, inside)
        else:
            lines.append(f"    {field.name} = {macros.get(field.name, repr(value))}")
    return (lines if len(lines) > 1 else []) + inner


def _gin_name(config: Any) -> str:
    """Name a class as recipes import it, from mtjax.models."""
    name = type(config).__name__
    module = {"T5Config": "t5", "MoeConfig": "moe"}.get(name, "routers")
    return f"{module}.{name}"


def _run_gin(model: str, target: Path) -> str:
    """Make the folder one that `mtjax infer` and `mtjax eval` open."""
    macros = {**_MACROS, "MODEL_DIR": str(target)}
    bindings = "\n".join(f"{name} = {value!r}" for name, value in macros.items())
    head = "from __gin__ import dynamic_registration\n"
    return (
        "# Written by `mtjax convert` for `mtjax infer` and `mtjax eval`; no training run.\n"
        f"{head}{model.partition(head)[2]}\ninclude 'runs/pretrain.gin'\n\n{bindings}\n"
    )
