"""The record of a study: by what code, packages, device, recipe and data its runs were made."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import mtjax
from mtjax import start
from mtjax.data import publish

FORMAT = 1
NAME = "study.json"
_MARK = "studies.json"  # in a study directory: what makes it one


def environment() -> dict[str, Any]:
    """Return what two workers must have in common for their runs to be comparable bit for bit."""
    found = start.environment()
    return {**found, "packages": packages() | found["packages"]}


def packages() -> dict[str, str]:
    """Return the versions of mtjax and of the packages it requires."""
    names = [
        re.split(r"[^\w.-]", line)[0] for line in metadata.requires("mtjax") or [] if "extra ==" not in line
    ]
    return {name: metadata.version(name) for name in ["mtjax", *names]}


def code_version() -> str:
    """Return a hash of mtjax's own Python files."""
    root = Path(mtjax.__file__).parent
    content = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def build(
    *, study: str, recipe: str, runs: Sequence[Mapping[str, Any]], data: Mapping[str, str]
) -> dict[str, Any]:
    """Return a manifest. recipe: the study's text; runs: name, id, seed, ... each; data: fingerprints by task."""
    return {
        "format": FORMAT,
        "study": study,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "code": code_version(),
        "environment": environment(),
        "recipe": recipe,
        "data": dict(data),
        "runs": json.loads(json.dumps(list(runs))),  # as it is read again
    }


def open_directory(directory: Path) -> None:
    """Make or accept a study directory. Raises ValueError where it holds something else."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--study_dir {str(directory)!r} is a file.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / _MARK).is_file():
        raise ValueError(
            f"--study_dir {str(directory)!r} is not empty and no study directory (it has no {_MARK}); choose another."
        )
    (directory / "runs").mkdir(parents=True, exist_ok=True)
    if not (directory / _MARK).is_file():
        publish.write_json(directory / _MARK, {"format": FORMAT})


def read(directory: Path, study: str) -> dict[str, Any] | None:
    """Return a study's manifest, None before its first run. Raises ValueError where it cannot be read."""
    path = directory / study / NAME
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error}. Delete it; the runs know their own recipes."
        ) from error


def settle(directory: Path, new: Mapping[str, Any], *, update: bool, any_environment: bool) -> dict[str, Any]:
    """Write a study's manifest, or compare with the one that is there, and return the one that holds.

    Raises ValueError where the directory holds another study of that name (unless it is to be updated; the old
    manifest is kept), and where this worker's packages or device are others than the manifest's.
    """
    path = directory / new["study"] / NAME
    old = read(directory, new["study"])
    if old is None:
        path.parent.mkdir(exist_ok=True)
        publish.write_json(path, new)
        return dict(new)
    if not any_environment:
        check_environment(
            {**old["environment"], "code": old["code"]}, {**new["environment"], "code": new["code"]}
        )
    if ids(old) == ids(new):
        if old["recipe"] != new["recipe"]:  # the same runs, guarded or read in another way
            publish.write_json(path, new)
            return dict(new)
        return old
    if not update:
        raise ValueError(_another_study(path, old, new))
    shutil.copy2(path, path.with_name(f"study.{len(list(path.parent.glob('study.*')))}.json"))
    publish.write_json(path, new)
    return dict(new)


def check_environment(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError naming the packages and devices of this worker that are not the manifest's."""
    lines = [
        f"  {name}: the study has {expected.get(name)}, this worker {value}"
        for name, value in found.items()
        if name != "packages" and expected.get(name) != value
    ]
    theirs, ours = expected.get("packages", {}), found["packages"]
    lines += [
        f"  package {name}: the study has {theirs.get(name)}, this worker {ours.get(name)}"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if lines:
        raise ValueError(
            "This worker is not what the study was begun with:\n"
            + "\n".join(lines)
            + "\nUse the study's packages and device, or say --any_environment: then runs are comparable only up to "
            "what differs, and each says what it was run by."
        )


def ids(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the id of every run that a manifest names."""
    return {run["name"]: run["id"] for run in manifest["runs"]}


def _another_study(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    theirs, ours = ids(old), ids(new)
    gone = [name for name in theirs if name not in ours]
    added = [name for name in ours if name not in theirs]
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    parts = [
        f"{len(names)} runs {what}, e.g. {names[0]!r}"
        for what, names in (
            ("are no longer planned", gone),
            ("are new", added),
            ("have another recipe", changed),
        )
        if names
    ]
    return (
        f"{str(path.parent)!r} holds another study named {new['study']!r}: {'; '.join(parts)}. Give this one another "
        "name or --study_dir, or say --update: then what has changed runs anew, and what has not is kept."
    )
