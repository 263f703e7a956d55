"""The flags that several commands share, with T5X's names and meaning where T5X has them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent / "gin"  # the shipped recipes, in a wheel and in a checkout


def add_gin(parser: argparse.ArgumentParser) -> None:
    """Add --gin_file, --gin.NAME=VALUE, --gin_bindings and --gin_search_paths."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file, looked up in the search paths; repeatable, later ones win",
    )
    group.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one binding, after all files; --gin.NAME=VALUE is the same. Plain strings need no quotes",
    )
    group.add_argument(
        "--gin_search_paths",
        action="append",
        type=_comma_list,
        default=[],
        metavar="DIR,DIR",
        help="folders searched for gin files, before the current folder and mtjax's own recipes",
    )


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add --module, --vocabulary, --tfds_data_dir and the cache flags: how tasks are found."""
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module that registers SeqIO tasks; repeatable",
    )
    group.add_argument(
        "--vocabulary",
        metavar="PATH",
        help="SentencePiece model of mtjax's own tasks, or 'byte' (default: $MTJAX_VOCABULARY)",
    )
    group.add_argument(
        "--tfds_data_dir", metavar="DIR", help="TensorFlow Datasets folder of TFDS-based tasks"
    )
    add_cache(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add --cache_dir and --seqio_additional_cache_dirs."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="where cached tasks are written and looked up first (default: $MTJAX_CACHE or ~/.cache/mtjax)",
    )
    group.add_argument(
        "--seqio_additional_cache_dirs",
        action="append",
        type=_comma_list,
        default=[],
        metavar="DIR,DIR",
        help="more folders to look for cached tasks in",
    )


def add_model_dir(parser: argparse.ArgumentParser) -> None:
    """Add --model_dir, the folder that `mtjax train` wrote."""
    parser.add_argument(
        "--model_dir", required=True, metavar="DIR", help="model directory that `mtjax train` wrote"
    )


def cache_dirs(args: argparse.Namespace) -> list[str]:
    """Return the cache folders in the order of search; the first is the one written to."""
    first = args.cache_dir or os.environ.get("MTJAX_CACHE") or str(Path.home() / ".cache" / "mtjax")
    return [_absolute(folder) for folder in (first, *additional_cache_dirs(args))]


def additional_cache_dirs(args: argparse.Namespace) -> list[str]:
    """Return the folders of --seqio_additional_cache_dirs, flat."""
    return [folder for folders in args.seqio_additional_cache_dirs for folder in folders]


def import_tasks(args: argparse.Namespace, modules: Sequence[str] = ()) -> None:
    """Import the modules of --module and of `modules`, which register SeqIO tasks. Imports TensorFlow.

    ValueError where a module is not found; an error inside a module is the user's and passes through.
    """
    set_task_environment(args)
    with _no_native_log():
        import tensorflow  # noqa: F401
    sys.path.insert(0, "")  # a console script does not see the current folder, where users keep their tasks
    for name in dict.fromkeys([*modules, *args.module]):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ValueError(
                f"No module {name!r} (--module): give its dotted name, importable from the current folder "
                f"or PYTHONPATH. Searched: {[folder or os.getcwd() for folder in sys.path]}."
            ) from error
    if args.tfds_data_dir or args.seqio_additional_cache_dirs:
        import seqio

        if args.tfds_data_dir:
            seqio.set_tfds_data_dir_override(args.tfds_data_dir)
        seqio.add_global_cache_dirs(additional_cache_dirs(args))


def vocabulary(args: argparse.Namespace) -> str | None:
    """Return --vocabulary, its path absolute."""
    given = args.vocabulary
    return given if not given or given.partition(":")[0] == "byte" else _absolute(given)


def set_task_environment(args: argparse.Namespace) -> None:
    """Hand --vocabulary to task modules, which read it when they are imported, in worker processes too."""
    if args.vocabulary:
        os.environ["MTJAX_VOCABULARY"] = vocabulary(args)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


@contextlib.contextmanager
def _no_native_log() -> Iterator[None]:
    """Drop what native code writes to file descriptor 2: TensorFlow reports missing GPUs before it reads any setting."""
    if "--debug" in sys.argv:
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _comma_list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]
