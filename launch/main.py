"""The `mtjax` command: pick a subcommand, import only its module, turn user errors into one message."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "tasks": "list tasks and mixtures, show their examples and statistics",
    "vocab": "train a SentencePiece vocabulary on a mixture's text",
    "cache": "write a mixture's tasks into the cache, once per task",
    "train": "train a model on a cached mixture",
    "eval": "evaluate checkpoints on every task of a mixture",
    "infer": "predict or score JSON lines",
    "convert": "convert Hugging Face and T5X checkpoints to ours and back",
    "inspect": "show what a checkpoint holds, or how two differ",
    "study": "plan, run, watch and report many runs as one experiment",
    "compile": "compile a recipe for a TPU slice that is not here: memory, FLOPs, collectives, estimated speed",
    "bench": "measure time to first step, speed and memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Code 2 means a mistake in the input (flags, names, files, configuration), told in one message on stderr;
    130 means interrupted.
    """
    quiet_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has left, e.g. `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if args.debug:
            raise
        print(f"mtjax {args.command}: {error}\n(--debug shows the traceback)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"\nmtjax {args.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; importing the one command that it names keeps `mtjax --help` fast."""
    # --gin.NAME=VALUE is a flag whose name is open; argparse sees it as --gin_bindings, as T5X does.
    arguments = [_gin_binding(argument) for argument in arguments]
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="mtjax", description="Multi-task pretraining of text-to-text models in JAX.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
        subparser.set_defaults(command=name)
        if name == command:
            module = importlib.import_module(f"mtjax.launch.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, parser=subparser, arguments=arguments)
    if command is not None and command not in COMMANDS:
        parser.error(f"unknown command {command!r}{_nearest(command, COMMANDS)}")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in args.parser._actions for flag in action.option_strings]
        args.parser.error(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].split('=')[0], flags)}")
    return args


def quiet_libraries() -> None:
    """Keep the terminal for our own lines; a value that the user has set stays.

    TensorFlow and gRPC read these when they are imported, in worker processes too.
    """
    if "--debug" in sys.argv:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"mtjax(\..*)?$")


def _gin_binding(argument: str) -> str:
    name, separator, value = argument.partition("=")
    if not name.startswith("--gin."):
        return argument
    if not separator:
        raise SystemExit(f"mtjax: {argument} needs a value: {argument}=VALUE")
    return f"--gin_bindings={name.removeprefix('--gin.')}={value}"


def _nearest(name: str, names: Sequence[str] | dict) -> str:
    near = difflib.get_close_matches(name, list(names), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
