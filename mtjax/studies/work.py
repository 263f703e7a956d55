"""Take a study's runs, one after the other, until none is left for this worker or any other."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtjax import checkpoint
from mtjax.data import publish
from mtjax.studies import claims
from mtjax.studies.runs import Run
from mtjax.train import Stopped

POLL_S = 2.0


class Node(NamedTuple):
    """A run of a study with its id, and its folder, which other studies may share."""

    run: Run
    id: str
    folder: Path

    @property
    def model_dir(self) -> Path:
        """Return the folder of its training run."""
        return self.folder / claims.MODEL


class Options(NamedTuple):
    """How to work. retries: of a run that failed. expiry: seconds. first: the place in the list to begin at."""

    retries: int = 0
    expiry: float = claims.EXPIRY_S
    first: int = 0


Execute = Callable[[Node, Callable[[], None]], dict[str, Any]]
"""Train and evaluate a run; returns its results, in JSON. It calls its second argument after every step, which
raises claims.Lost where another worker has taken the run over."""


def nodes(directory: Path, runs: Sequence[Run], ids: Mapping[str, str]) -> list[Node]:
    """Give every run its folder in a study directory."""
    return [Node(run, ids[run.name], directory / "runs" / ids[run.name]) for run in runs]


def states(found: Sequence[Node], options: Options) -> dict[str, claims.State]:
    """Return where every run stands, by name: done, running, failed, ready, waiting (for what) or blocked."""
    result: dict[str, claims.State] = {}
    by_id: dict[str, claims.State] = {}
    for node in found:
        if node.id not in by_id:
            by_id[node.id] = claims.state(node.folder, retries=options.retries, expiry=options.expiry)
        state = by_id[node.id]
        if state.status == "free":
            parent = result[node.run.start].status if node.run.start is not None else "done"
            status = {"done": "ready", "failed": "blocked", "blocked": "blocked"}.get(parent, "waiting")
            state = state._replace(status=status)
        result[node.run.name] = state
    return result


def work(
    found: Sequence[Node], execute: Execute, options: Options, *, tell: Callable[[str], None] = print
) -> dict[str, claims.State]:
    """Execute ready runs until no run is ready or running; return where all stand.

    Runs that others train are waited for: what depends on them, or what is left of them, may become ready.
    Raises train.Stopped where `execute` does, and OSError where the disk is full: neither counts as a failure.
    """
    order = [*found[options.first :], *found[: options.first]]
    while True:
        now = states(found, options)
        ready = [node for node in order if now[node.run.name].status == "ready"]
        for node in ready:
            if _take(node, execute, options, tell):
                break  # look again from the start: what this run was waited for by comes first
        else:
            if not any(state.status in ("running", "ready") for state in now.values()):
                return now
            time.sleep(POLL_S)


def _take(node: Node, execute: Execute, options: Options, tell: Callable[[str], None]) -> bool:
    """Claim a run and execute it; False where another worker was faster."""
    step = max(checkpoint.checkpoint_steps(node.model_dir), default=0)
    number = claims.take(node.folder, step=step, expiry=options.expiry)
    if number is None:
        return False
    if (node.folder / claims.RESULTS).exists():  # its owner finished between our look and our claim
        return True
    tell(f"{node.run.name}: " + (f"goes on from step {step}" if step else "starts"))
    try:
        with claims.heartbeat(node.folder, number, expiry=options.expiry):
            _execute(node, execute, number, tell)
    except claims.Lost as lost:
        tell(f"{node.run.name}: {lost}")
    return True


def _execute(node: Node, execute: Execute, number: int, tell: Callable[[str], None]) -> None:
    started = time.time()
    try:
        results = execute(node, lambda: claims.check(node.folder, number))
        claims.check(node.folder, number)
        content = {
            "name": node.run.name,
            "results": results,
            "execution": {"owner": claims.owner(), "attempt": number, "seconds": time.time() - started},
        }
        publish.write_json(node.folder / claims.RESULTS, content)
    except (Stopped, KeyboardInterrupt):
        claims.release(node.folder, number)
        raise
    except Exception as error:
        claims.check(node.folder, number)
        if is_disk_full(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left in {str(node.folder)!r} (run {node.run.name}). Free some and repeat the command: "
                "finished runs and whole checkpoints are kept",
            ) from error
        claims.fail(node.folder, number, _failure(error))
        tell(f"{node.run.name}: failed: {type(error).__name__}: {str(error)[:500]}")
    else:
        tell(f"{node.run.name}: done in {time.time() - started:.0f} s")


def _failure(error: Exception) -> dict[str, Any]:
    return {
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
        "owner": claims.owner(),
        "python": platform.python_version(),
        "time": time.time(),
    }


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one behind it, says that no space is left on a device or in a quota."""
    return any(
        (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(text in str(e) for text in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)))
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def read_results(found: Sequence[Node]) -> dict[str, dict[str, Any] | None]:
    """Return every run's results by name, None where there are none."""
    return {node.run.name: _read(node).get("results") for node in found}


def read_execution(node: Node) -> dict[str, Any]:
    """Return who finished a run, in which attempt and how many seconds; {} where nobody has."""
    return _read(node).get("execution", {})


def _read(node: Node) -> dict[str, Any]:
    path = node.folder / claims.RESULTS
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
