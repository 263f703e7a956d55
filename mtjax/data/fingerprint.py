"""Describe callables and values so that equal descriptions mean equal behaviour.

A function is its bytecode, constants, defaults, closure, and the functions and constants of its own package
that it uses; an object is its class and attributes. Processes of one Python version describe alike.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_LIBRARIES = (
    "tensorflow",
    "tensorflow_text",
    "tensorflow_datasets",
    "seqio",
    "numpy",
    "jax",
    "absl",
    "keras",
)
Special = Callable[[Any], Any]  # value -> JSON, or None to describe it as usual


def fingerprint(value: Any, special: Special = lambda value: None) -> str:
    """Return a short hash of what `value` does."""
    text = json.dumps(_describe(value, special, set()), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def source_files(paths: Sequence[str | os.PathLike]) -> list[list[Any]]:
    """Describe source files by path, size and modification time in nanoseconds."""
    found = []
    for name in sorted(str(os.fspath(path)) for path in paths):
        status = os.stat(name) if pathlib.Path(name).exists() else None  # a remote file has only its name
        found.append([name, status and status.st_size, status and status.st_mtime_ns])
    return found


def _describe(value: Any, special: Special, seen: set[int]) -> Any:
    def again(part: Any) -> Any:
        return _describe(part, special, seen)

    if (description := special(value)) is not None:
        return description
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if (description := _leaf(value)) is not None:
        return description
    if isinstance(value, Mapping):
        return ["mapping", sorted(([str(k), again(v)] for k, v in value.items()), key=lambda item: item[0])]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted(map(again, value), key=json.dumps)]
    if isinstance(value, Sequence):
        return ["sequence", list(map(again, value))]
    if isinstance(value, functools.partial):
        return ["partial", again(value.func), again(value.args), again(value.keywords)]
    if isinstance(value, types.MethodType):
        return ["method", again(value.__func__), again(value.__self__)]
    if id(value) in seen:
        return ["again", _name(value)]
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        return _function(value, again)
    if hasattr(value, "__wrapped__"):  # functools.cache
        return ["wrapped", again(value.__wrapped__)]
    return _object(value, again)


def _leaf(value: Any) -> Any:
    if isinstance(value, bytes):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, os.PathLike):
        return ["path", os.fspath(value)]
    if isinstance(value, enum.Enum):
        return ["enum", _name(value), value.name]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return ["name", f"{value.__module__}.{value.__qualname__}"]
    return None


def _function(function: types.FunctionType, again: Callable[[Any], Any]) -> Any:
    package = _package(function)
    if package in _LIBRARIES and not function.__closure__:
        return ["library", _name(function)]
    cells = [again(cell.cell_contents) for cell in function.__closure__ or () if _is_filled(cell)]
    used = {} if package in _LIBRARIES else {name: again(v) for name, v in _used(function, package).items()}
    return [
        "function",
        _name(function),
        _code(function.__code__),
        again(function.__defaults__),
        again(function.__kwdefaults__),
        cells,
        sorted(used.items()),
    ]


def _used(function: types.FunctionType, package: str) -> dict[str, Any]:
    """Return the functions and constants of its own package that a function names."""
    names = sorted(_names(function.__code__))
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for module in [v for v in values.values() if isinstance(v, types.ModuleType)]:
        if module.__name__.split(".")[0] == package:
            values |= {f"{module.__name__}.{n}": getattr(module, n) for n in names if hasattr(module, n)}
    return {name: value for name, value in values.items() if _counts(name, value, package)}


def _counts(name: str, value: Any, package: str) -> bool:
    if callable(value) and not isinstance(value, type):
        return _package(value) == package
    constant = (bool, int, float, str, bytes, tuple, frozenset)
    # A lower-case dict or list may well grow while the program runs.
    return isinstance(value, constant) or (isinstance(value, (dict, list)) and name.split(".")[-1].isupper())


def _object(value: Any, again: Callable[[Any], Any]) -> Any:
    if type(value).__module__.split(".")[0] in _LIBRARIES and not hasattr(value, "__dict__"):
        return ["object", _name(value), str(value)]
    call = vars(type(value)).get("__call__")
    state = getattr(value, "__dict__", None)
    return [
        "object",
        _name(value),
        again(state),
        again(call) if isinstance(call, types.FunctionType) else None,
    ]


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(_ordered(c)) for c in code.co_consts]
    return [hashlib.sha256(code.co_code).hexdigest(), constants, list(code.co_names)]


def _ordered(constant: Any) -> Any:
    return sorted(constant, key=repr) if isinstance(constant, frozenset) else constant


def _names(code: types.CodeType) -> set[str]:
    nested = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, nested))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell  # an empty cell raises
    except ValueError:
        return False


def _package(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").split(".")[0]


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
