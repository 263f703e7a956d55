"""`mtjax train`: configuration → cached mixture → train.fit; or, with --dry_run, what that would be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtjax.launch import distributed, flags, initial

EXAMPLES = """
examples:
  mtjax train --gin_file=runs/python_docs.gin --gin.MODEL_DIR=runs/first
  mtjax train --gin_file=models/t5_1_1_small.gin --gin_file=runs/pretrain.gin --module=my_tasks \\
      --gin.MIXTURE_OR_TASK_NAME=my_mixture --gin.TRAIN_STEPS=10000 --gin.MODEL_DIR=runs/mine
  mtjax train --gin_file=runs/finetune.gin --gin.INITIAL_CHECKPOINT_PATH=hf:flan-t5-base \\
      --gin.MIXTURE_OR_TASK_NAME=my_task --gin.TRAIN_STEPS=2000 --gin.MODEL_DIR=runs/tuned
  mtjax train --gin_file=runs/mine/config.gin                           resume (or just repeat the command)
  mtjax train --gin_file=runs/mine/config.gin --gin.MODEL_DIR=runs/two  the same run again

SIGTERM (preemption) saves the step under way, cuts an evaluation under way short (it is made when the run goes
on), and exits with code 75: repeat the command. Other codes than 0 and 75 say that repeating will not help.
"""
CONFIG = "config.gin"
# What may change between the parts of one run; everything else makes it another run.
_FREE = """
    MODEL_DIR TRAIN_STEPS LOG_PERIOD EVAL_PERIOD EVAL_EXAMPLES CHECKPOINT_PERIOD KEEP_CHECKPOINTS MESH CACHE_DIRS
    USE_CACHED_TASKS VOCABULARY TFDS_DATA_DIR MODULES MIXTURE_OR_TASK_MODULE train.fit.model_dir
    train.fit.train_steps train.fit.log_every train.fit.mesh train.fit.profile_steps train.fit.max_skipped
    pipeline.TrainData.cache_dirs pipeline.TrainData.prefetch
"""
FREE = frozenset(_FREE.split())
FREE_OF = ("train.Evaluation.", "train.Saving.", "prepare.mixture.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax train`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print parameters, sharding, bytes per device, batch and mixture, and exit",
    )
    parser.add_argument(
        "--profile_steps",
        metavar="FIRST,LAST",
        help="write a jax.profiler trace of the steps FIRST to LAST - 1 to MODEL_DIR/profile",
    )
    parser.add_argument(
        "--grace_time",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long saving may take after SIGTERM before the run exits without it (default: 0, as it takes)",
    )
    flags.add_gin(parser)
    flags.add_tasks(parser)
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, resume, or explain."""
    from mtjax import host_memory

    host_memory.keep()
    from mtjax import health, train
    from mtjax.launch import preemption

    roll_call = None
    try:
        with preemption.notice(grace_time=args.grace_time) as notice:
            roll_call = distributed.start(args)
            return _run(args, notice)
    except train.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return preemption.EXIT_CODE
    except Exception as error:
        is_users = isinstance(error, (ValueError, OSError, health.NonFiniteError))
        if roll_call is not None:
            distributed.leave(roll_call, error, is_users=is_users and not args.debug)
        if isinstance(error, health.NonFiniteError):
            raise ValueError(str(error)) from error
        raise
    finally:
        if roll_call is not None:
            roll_call.close()


def _run(args: argparse.Namespace, notice: Any) -> int:
    import jax

    from mtjax import hosts, train
    from mtjax.launch import prepare

    config = configure(args)
    if args.dry_run:
        return _dry_run(config)
    check_model_dir(Path(config.arguments(train.fit, only=["model_dir"])["model_dir"]), config.text)
    if config.is_bound(prepare.mixture) and jax.process_index() == 0:  # the others wait for its cache
        prepare.mixture(**config.arguments(prepare.mixture))
    hosts.wait("cached")
    arguments = config.arguments(train.fit)
    save(Path(arguments["model_dir"]), config.text)
    _announce(arguments)
    train.fit(**arguments, config_text=config.text, should_stop=notice.asked)
    return 0


def configure(
    args: argparse.Namespace,
    *,
    defaults: Mapping[str, Any] | None = None,
    also: Sequence[Callable[..., Any]] = (),
) -> Any:
    """Parse --gin_file and the bindings; other flags become macros, so that config.gin holds them.

    defaults and also: see config.parse.
    """
    from mtjax import train
    from mtjax.launch import config, prepare

    bindings = list(args.gin_bindings)
    if args.cache_dir or flags.additional_cache_dirs(args):
        bindings.append(f"CACHE_DIRS={flags.cache_dirs(args)!r}")
    if args.module:
        bindings.append(f"MODULES={args.module!r}")
    if args.vocabulary:
        bindings.append(f"VOCABULARY={flags.vocabulary(args)!r}")
    if args.tfds_data_dir:
        bindings.append(f"TFDS_DATA_DIR={args.tfds_data_dir!r}")
    if steps := getattr(args, "profile_steps", None):
        first, separator, last = steps.partition(",")
        if not (separator and first.strip().isdigit() and last.strip().isdigit()):
            raise ValueError(f"--profile_steps={steps} must be two steps, such as 10,15.")
        bindings.append(f"train.fit.profile_steps=({int(first)}, {int(last)})")
    if not args.gin_file:
        raise ValueError(f"Give a --gin_file. Shipped: {', '.join(config.shipped_recipes())}.")
    files = list(args.gin_file)
    search_paths = [folder for folders in args.gin_search_paths for folder in folders]
    with initial.temporary() as folder:
        if (found := initial.of(args)) is not None:
            bindings.append(f"{initial.MACRO}={found.path!r}")
            if found.model and not config.binds(args.gin_file, train.fit, "model", search_paths=search_paths):
                files = [initial.write(found, folder), *files]
            if found.vocabulary and not any(text.startswith("VOCABULARY=") for text in bindings):
                bindings.append(f"VOCABULARY={found.vocabulary!r}")
        return config.parse(
            files,
            bindings,
            roots=[prepare.mixture, train.fit],
            also=also,
            search_paths=search_paths,
            defaults={"CACHE_DIRS": flags.cache_dirs(args), **(defaults or {})},
            paths=["MODEL_DIR", initial.MACRO],
        )


def check_model_dir(model_dir: Path, text: str) -> None:
    """Raise ValueError where model_dir holds something else than this run."""
    from mtjax import checkpoint
    from mtjax.launch import config, screen

    saved = model_dir / CONFIG
    if not saved.is_file():
        if model_dir.is_dir() and any(model_dir.iterdir()) and not (model_dir / "checkpoints").is_dir():
            raise ValueError(f"MODEL_DIR {str(model_dir)!r} is not empty and holds no run; choose another.")
        if model_dir.exists() and not model_dir.is_dir():
            raise ValueError(f"MODEL_DIR {str(model_dir)!r} is a file.")
        return
    if not checkpoint.checkpoint_steps(model_dir):
        return  # it never came to a checkpoint, perhaps for what has changed since
    changes = config.differences(saved.read_text("utf-8"), text)
    if "TRAIN_STEPS" in changes and text.count("%TRAIN_STEPS") > 1:
        old, new = changes["TRAIN_STEPS"]
        users = [line.split("=")[0].strip() for line in text.splitlines() if "%TRAIN_STEPS" in line]
        screen.console().print(
            f"TRAIN_STEPS changes from {old} to {new}, which {', '.join(users)} use: from here on the run is not "
            f"what {new} steps from the start would have been."
        )
    differing = [
        f"  {name}: {old} -> {new}"
        for name, (old, new) in changes.items()
        if old is not None and name not in FREE and not name.startswith(FREE_OF)
    ]
    if differing:
        raise ValueError(
            f"MODEL_DIR {str(model_dir)!r} holds another run, which differs in\n"
            + "\n".join(differing)
            + "\n"
            f"Resume it with --gin_file={saved}, or choose another MODEL_DIR."
        )


def save(model_dir: Path, text: str) -> None:
    """Write config.gin in a model directory, in one piece."""
    import jax

    if jax.process_index() == 0:
        model_dir.mkdir(parents=True, exist_ok=True)
        partial = model_dir / f"{CONFIG}.partial"
        partial.write_text(text, "utf-8")
        partial.replace(model_dir / CONFIG)


def _announce(arguments: Mapping[str, Any]) -> None:
    import jax

    from mtjax import tree
    from mtjax.launch import screen

    parameters = tree.num_parameters(jax.eval_shape(arguments["model"].init, jax.random.key(0)))
    data, devices = arguments["data"], jax.devices()
    lengths = ", ".join(f"{name} {length}" for name, length in data.lengths.items())
    screen.console().print(
        f"{parameters:,} parameters, {len(devices)} x {devices[0].device_kind}, mixture {data.mixture}, "
        f"{data.batch_size} rows of {lengths} a step, to step {arguments['train_steps']} in {arguments['model_dir']}"
    )


# Dry run ---------------------------------------------------------------------------------------------------


def _dry_run(config: Any) -> int:
    from mtjax import train
    from mtjax.data import cache, pipeline
    from mtjax.launch import prepare, screen

    arguments = config.arguments(train.fit)
    data = arguments["data"]
    try:
        mixture = cache.open_mixture(data.cache_dirs, data.mixture)
        why_unknown = ""
    except ValueError as error:
        mixture, why_unknown = None, str(error)
    if mixture:
        with pipeline.open_stream(data):  # checks lengths and batch
            pass
        if config.is_bound(prepare.mixture):
            prepare.check_vocabulary(mixture, config.arguments(prepare.mixture).get("vocabulary"))
    tasks = None if mixture else train.TaskTable((data.mixture,), ("not cached",))
    program = train.prepare(**train.program_arguments(arguments), tasks=tasks)
    out = screen.console()
    out.print(_parameter_table(program))
    out.print(_memory_table(program))
    out.print(_batch_table(program, data))
    if mixture:
        out.print(_mixture_table(mixture, data))
    else:
        print(f"The mixture is not cached, so its tasks and rates are not known yet: {why_unknown}")
    return 0


def _parameter_table(program: Any) -> Any:
    import jax

    from mtjax import tree
    from mtjax.launch import screen

    model = jax.eval_shape(program.merge, program.abstract)
    shardings = tree.flatten(program.model_shardings)
    blocks: dict[str, list[Any]] = {}
    for path, leaf in tree.flatten(model).items():
        block = blocks.setdefault("/".join(path.split("/")[:2]), [0, 0, set()])
        block[0] += leaf.size
        block[1] += leaf.size * leaf.dtype.itemsize
        block[2].add(_spec(shardings[path].spec))
    rows = [
        (name, n, screen.size(size), ", ".join(sorted(specs))) for name, (n, size, specs) in blocks.items()
    ]
    rows.append(
        ("total", sum(b[0] for b in blocks.values()), screen.size(sum(b[1] for b in blocks.values())), "")
    )
    return screen.table("parameters", ("block", "parameters", "size", "sharding"), rows)


def _spec(spec: Any) -> str:
    return (
        "(" + ", ".join("-" if axis is None else str(axis) for axis in spec) + ")"
        if any(spec)
        else "replicated"
    )


def _memory_table(program: Any) -> Any:
    from mtjax import sharding
    from mtjax.launch import screen

    shape = {axis: n for axis, n in program.mesh.shape.items() if n > 1} or "one device"
    rows = [
        (name, screen.size(sharding.bytes_per_device(part, getattr(program.shardings, name))))
        for name, part in program.abstract._asdict().items()
        if name in ("params", "frozen", "opt", "balance", "average") and part
    ]
    total = sharding.bytes_per_device(program.abstract, program.shardings)
    rows.append(("state in all", screen.size(total)))
    return screen.table(f"bytes per device, mesh {shape}", ("part of the state", "size"), rows)


def _batch_table(program: Any, data: Any) -> Any:
    from mtjax.launch import screen

    rows_per_device = program.abstract and data.batch_size / _row_shards(program.mesh)
    rows = [(name, data.batch_size, length, f"{rows_per_device:g}") for name, length in data.lengths.items()]
    return screen.table("batch", ("feature", "rows", "length", "rows per device"), rows)


def _row_shards(mesh: Any) -> int:
    from mtjax import sharding

    spec = sharding.batch_sharding(mesh).spec[0] or ()
    axes = (spec,) if isinstance(spec, str) else spec
    product = 1
    for axis in axes:
        product *= mesh.shape[axis]
    return product


def _mixture_table(mixture: Any, data: Any) -> Any:
    from mtjax.launch import screen, stats

    shares = stats.shares(mixture._replace(rates=data.rates or mixture.rates))
    rows = [(task.name, task.family, task.num_examples("train"), shares[task.name]) for task in mixture.tasks]
    return screen.table(f"mixture {mixture.name}", ("task", "family", "examples", "share of examples"), rows)
