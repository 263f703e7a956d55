"""`mtjax cache`: write the tasks of a mixture into the cache, each once, in parallel."""

from __future__ import annotations

import argparse
import os

from mtjax.launch import flags

EXAMPLES = """
examples:
  mtjax cache --mixture=python_docs --vocabulary=runs/vocab.model
  mtjax cache --mixture=my_mixture --module=my_tasks --workers=8

A second call writes only what has changed. Training then needs neither TensorFlow nor the sources.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax cache`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--mixture", required=True, metavar="NAME", help="mixture or task to cache")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes, a task each (default: %(default)s, the number of cores)",
    )
    parser.add_argument("--force", action="store_true", help="write unchanged tasks too")
    flags.add_tasks(parser)


def run(args: argparse.Namespace) -> int:
    """Cache the mixture."""
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}.")
    flags.import_tasks(args)
    from mtjax.data import cache, seqio_cache
    from mtjax.launch import registry, screen
    from mtjax.tasks import info

    registry.lookup(args.mixture)
    directory = flags.cache_dirs(args)[0]
    with screen.progress(f"caching {args.mixture}") as update:
        written = seqio_cache.cache_mixture(
            args.mixture,
            directory,
            workers=args.workers,
            force=args.force,
            info=info.info,
            progress=update,
        )
    tasks = cache.open_mixture([directory], args.mixture).tasks
    examples = sum(task.num_examples(split) for task in tasks for split in task.splits)
    vocabulary = tasks[0].vocabulary("targets")
    print(
        f"{args.mixture}: {len(tasks)} tasks, {examples:,} examples, vocabulary of {vocabulary.size:,} ids, "
        f"in {directory} ({len(written)} written, {len(tasks) - len(written)} up to date)"
    )
    return 0
