"""What a run takes over from INITIAL_CHECKPOINT_PATH: parameters in our format, architecture, vocabulary."""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mtjax.launch import flags

MACRO = "INITIAL_CHECKPOINT_PATH"
FOLDER = "converted"  # in the first cache folder


class Initial(NamedTuple):
    """A checkpoint of ours to start from, and what its run takes from it unless told otherwise."""

    path: str
    model: str  # in gin; '' where it is another architecture than the encoder-decoder
    vocabulary: str | None  # as --vocabulary takes it


def of(args: argparse.Namespace) -> Initial | None:
    """Open what --gin.INITIAL_CHECKPOINT_PATH names; hf:DIR and t5x:DIR are converted first, once.

    A path that holds no checkpoint is left for the configuration to complain of.
    """
    given = [text.partition("=")[2].strip().strip("'\"") for text in args.gin_bindings if _is_macro(text)]
    if not given or given[-1].lower() in ("", "none"):
        return None
    from mtjax import checkpoint
    from mtjax.launch import convert

    kind, path = convert.parse_place(given[-1])
    folder = given[-1] if kind == "mtjax" else _converted(given[-1], path, args)
    try:
        meta = checkpoint.read_meta(folder)
    except ValueError:
        return None
    return Initial(str(folder), _model(meta["model"]), _vocabulary(checkpoint.find(folder)))


def write(initial: Initial, folder: str) -> str:
    """Write the architecture as a gin file and return its path."""
    path = Path(folder) / "initial_checkpoint.gin"
    path.write_text(initial.model, "utf-8")
    return str(path)


def temporary() -> Any:
    """Return a context manager that gives a folder for `write`."""
    return tempfile.TemporaryDirectory(prefix="mtjax-")


def _is_macro(text: str) -> bool:
    return text.partition("=")[0].strip() == MACRO


def _converted(given: str, path: Path, args: argparse.Namespace) -> Path:
    """Convert a folder into the cache, or find it there from an earlier run: the same files, the same folder."""
    import jax

    from mtjax import hosts
    from mtjax.launch import convert

    if not path.is_dir():
        raise ValueError(f"There is no folder {str(path)!r} (--gin.{MACRO}={given}).")
    files = [(str(file.relative_to(path)), file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
    state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    fingerprint = zlib.crc32(repr((str(path.absolute()), state, args.vocabulary)).encode())
    folder = Path(flags.cache_dirs(args)[0]) / FOLDER / f"{path.absolute().name}-{fingerprint:08x}"
    if jax.process_index() == 0 and not folder.is_dir():
        vocabulary = [f"--vocabulary={flags.vocabulary(args)}"] if args.vocabulary else []
        parser = argparse.ArgumentParser()
        convert.add_arguments(parser)
        convert.run(parser.parse_args([f"--from={given}", f"--to={folder}", *vocabulary]))
    hosts.wait("converted")
    return folder


def _model(described: Mapping[str, Any]) -> str:
    from mtjax.convert import model_directory
    from mtjax.launch import convert

    if described.get("name") != "T5Config":
        return ""
    return convert.model_gin(model_directory.config_of(described, source=MACRO))


def _vocabulary(checkpoint: Any) -> str | None:
    """Return the specification of the vocabulary kept beside a checkpoint, if there is one."""
    from mtjax.data import vocabulary

    kept = Path(checkpoint).parent.parent / vocabulary.FOLDER
    if not kept.is_dir():
        return None
    found = vocabulary.read(kept)["targets"][0]
    name = str(vocabulary.model_path(found.fingerprint, kept)) if found.model else "byte"
    return f"{name}:{found.extra_ids}"
