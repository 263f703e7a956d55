"""Who trains a run: claims on a shared file system, without a server.

A claim is a file claim.<n> in the run's folder, created exclusively: attempt n. The owner of the highest n owns
the run, and touches its file from time to time. A claim is over when its owner says so (released.<n>,
failed.<n>.json), when its process is gone, or when nobody has touched it for `expiry` seconds by the file
system's own clock; then claim.<n+1> takes the run over, exclusively again, so that two workers never both do.
An owner that finds a higher number has lost the run and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mtjax.data import publish

EXPIRY_S = 300.0
DEATHS = 20  # claims in a row whose owners died at the same step: another one would die there too
RESULTS = "results.json"
MODEL = "model"


class Lost(BaseException):
    """Another worker has taken the run over; no Exception, so that nothing on the way takes it for a failure."""


class Attempt(NamedTuple):
    """The last attempt at a run: who, since when, and how it ended: "", "released", "failed" or "dead"."""

    number: int
    owner: dict[str, Any]
    ended: str


class State(NamedTuple):
    """Where a run stands: done, running, failed, or free for a worker to take."""

    status: str
    attempt: Attempt | None = None
    error: str = ""
    failures: int = 0


def state(folder: Path, *, retries: int, expiry: float) -> State:
    """Return where the run in `folder` stands. `failed` means that no attempt is left."""
    attempt = last_attempt(folder, expiry=expiry)
    failures = sorted(folder.glob("failed.*.json"), key=_number)
    error = _read(failures[-1]).get("error", "") if failures else ""
    if (folder / RESULTS).exists():
        return State("done", attempt, error, len(failures))
    if attempt is not None and not attempt.ended:
        return State("running", attempt, error, len(failures))
    if len(failures) > retries:
        return State("failed", attempt, error, len(failures))
    if attempt is not None and (died := _deaths(folder, attempt)):
        return State("failed", attempt, died, len(failures))
    return State("free", attempt, error, len(failures))


def last_attempt(folder: Path, *, expiry: float) -> Attempt | None:
    """Return the last attempt at a run, None where there was none."""
    claims = sorted(folder.glob("claim.*"), key=_number)
    if not claims:
        return None
    number, owner = _number(claims[-1]), _read(claims[-1])
    if (folder / f"failed.{number}.json").exists():
        return Attempt(number, owner, "failed")
    if (folder / f"released.{number}").exists():
        return Attempt(number, owner, "released")
    return Attempt(number, owner, "dead" if _is_dead(claims[-1], owner, expiry) else "")


def take(folder: Path, *, step: int, expiry: float) -> int | None:
    """Claim a free run; return the attempt's number, None where another worker was faster.

    step: of its last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = last_attempt(folder, expiry=expiry)
    if last is not None and not last.ended:
        return None
    number = last.number + 1 if last else 1
    # Written first and linked, so that nobody reads half a claim; a link to a name in use fails, as O_EXCL does.
    mine = folder / f".{uuid.uuid4().hex}"
    mine.write_text(json.dumps(owner() | {"step": step}), "utf-8")
    try:
        os.link(mine, _claim(folder, number))
    except FileExistsError:
        return None
    except OSError:  # no hard links here: an exclusive file, whose owner is unknown until it is written
        return _take_exclusively(mine.read_text("utf-8"), _claim(folder, number), number)
    finally:
        mine.unlink()
    return number


def _take_exclusively(content: str, claim: Path, number: int) -> int | None:
    try:
        with claim.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return None
    return number


def owner() -> dict[str, Any]:
    """Describe this process: `host` names what its id is unique in."""
    return {"node": os.uname().nodename, "host": publish.host(), "pid": os.getpid(), "started": time.time()}


def check(folder: Path, number: int) -> None:
    """Raise Lost where another worker has taken the run over."""
    if _claim(folder, number + 1).exists():
        raise Lost(f"Another worker has taken over {folder.name}.")


def release(folder: Path, number: int) -> None:
    """Let others take the run at once."""
    (folder / f"released.{number}").touch()


def fail(folder: Path, number: int, content: dict[str, Any]) -> None:
    """Record that an attempt failed."""
    publish.write_json(folder / f"failed.{number}.json", content)


@contextlib.contextmanager
def heartbeat(folder: Path, number: int, *, expiry: float) -> Iterator[None]:
    """Touch a claim while the body runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(expiry / 5):
            with contextlib.suppress(OSError):  # a file system that is away for a moment
                os.utime(_claim(folder, number))

    thread = threading.Thread(target=beat, name="mtjax-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _claim(folder: Path, number: int) -> Path:
    return folder / f"claim.{number}"


def _number(path: Path) -> int:
    return int(path.name.split(".")[1])


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # a full disk may leave an empty file
        return {}


def _is_dead(claim: Path, owner: dict[str, Any], expiry: float) -> bool:
    if owner.get("host") == publish.host() and not publish.is_alive(owner["pid"]):
        return True
    return now(claim.parent) - claim.stat().st_mtime > expiry


def now(folder: Path) -> float:
    """Return the time by the clock of the folder's file system; this machine's may differ."""
    probe = folder / f".{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a full disk or a folder that may only be read
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _deaths(folder: Path, attempt: Attempt) -> str:
    """Say that the last DEATHS attempts all died at one step; "" where they did not."""
    numbers = range(attempt.number, attempt.number - DEATHS, -1)
    if attempt.number < DEATHS or any(
        (folder / f"{end}").exists() for n in numbers for end in (f"released.{n}", f"failed.{n}.json")
    ):
        return ""
    steps = {_read(_claim(folder, n)).get("step") for n in numbers}
    if len(steps) > 1:
        return ""
    return f"{DEATHS} workers in a row died behind step {steps.pop()} without an error (out of memory?)."
