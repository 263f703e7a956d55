"""Write cache folders so that, whenever the process dies, a task is there whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from mtjax.data import records

ABANDONED_AFTER_S = 2 * 24 * 3600  # what another machine has not touched for so long
_TOKEN = uuid.uuid4().hex[:8]
_OLD = "old-"  # no task has a hyphen in its name


def _temporary(final: pathlib.Path, *, mark: str = "") -> pathlib.Path:
    """Name a file or folder that only this process writes: .tmp-<pid>-<host>-<token>-..."""
    return final.with_name(f".tmp-{os.getpid()}-{host()}-{_TOKEN}-{mark}{final.name}")


@functools.cache
def host() -> str:
    """Return a name of what process ids are unique in: a boot of a machine, or a container on it."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]


@contextlib.contextmanager
def folder(
    final: pathlib.Path, *, is_whole: Callable[[pathlib.Path], bool] = pathlib.Path.is_dir
) -> Iterator[pathlib.Path]:
    """Give a temporary folder that takes the place of `final` where the block ends without an error.

    It does not where `is_whole` then says that the folder is not whole.
    """
    temporary = _temporary(final)
    temporary.mkdir()
    try:
        yield temporary
        if not is_whole(temporary):
            return
        records.fsync(temporary)
        old = _set_aside(final)
        temporary.rename(final)
        records.fsync(final.parent)
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(path: pathlib.Path, content: bytes) -> None:
    """Replace a file."""
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file."""
    write(path, json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8"))


def remove_abandoned(directory: pathlib.Path) -> None:
    """Delete the unfinished folders and files of processes that are gone.

    A folder that was set aside for a new one which never came is put back.
    """
    for path in [*directory.glob(".tmp-*"), *directory.glob("*/.tmp-*")]:
        with contextlib.suppress(FileNotFoundError):  # finished just now
            if not _is_abandoned(path):
                continue
            name = path.name.split("-", 4)[-1]
            if name.startswith(_OLD) and not (final := path.with_name(name.removeprefix(_OLD))).exists():
                path.rename(final)
            else:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(path: pathlib.Path) -> bool:
    _, pid, where, token, *_ = [*path.name.split("-", 4), "", "", ""]
    if where != host():
        return time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
    if pid == str(os.getpid()):
        return token != _TOKEN  # an earlier process had our id
    return not is_alive(int(pid))


def is_alive(pid: int) -> bool:
    """Tell whether a process of this host() runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _set_aside(final: pathlib.Path) -> pathlib.Path | None:
    if not final.exists():
        return None
    old = _temporary(final, mark=_OLD)
    return final.rename(old)


@contextlib.contextmanager
def lines(path: pathlib.Path) -> Iterator[TextIO]:
    """Open a text file that is on disk when the block ends."""
    with path.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
