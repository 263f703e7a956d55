"""Read what CPython ships as data: documentation, source code, character names. No download, no TensorFlow.

Source is parsed, never imported, so nothing runs and docstrings survive `python -OO`. Packages that some
distributions leave out (tkinter, idlelib, tests, ...) are skipped everywhere. The order is that of sorted
paths: nothing depends on the file system or on PYTHONHASHSEED.
"""

from __future__ import annotations

import ast
import functools
import html.entities
import inspect
import os
import sysconfig
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

OPTIONAL = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"),
    *(
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "tkinter",
        "turtledemo",
        "venv",
    ),
}
MIN_MODULES = 100
UNNAMED = (  # ranges whose names only count: nothing to learn from
    "CJK ",
    "HANGUL SYLLABLE ",
    "TANGUT ",
    "KHITAN ",
    "NUSHU ",
    "EGYPTIAN ",
    "CUNEIFORM ",
    "ANATOLIAN ",
    "BAMUM ",
    "VARIATION SELECTOR",
    "SIGNWRITING ",
)


class Module(NamedTuple):
    name: str  # dotted, as imported
    lines: tuple[str, ...]
    tree: ast.Module


class Definition(NamedTuple):
    """A class, function or method; `code` is dedented and has no docstring and no decorators."""

    module: str
    kind: str  # 'class', 'function' or 'method'
    name: str
    code: str
    docstring: str
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _paths(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in OPTIONAL and not f.startswith("config-"))
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "__phello__")):
                yield os.path.join(folder, name)


@functools.cache
def modules() -> tuple[Module, ...]:
    """Parse the standard library. Raises ValueError where its source is not installed."""
    root = sysconfig.get_path("stdlib")
    found = []
    for path in _paths(root):
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):  # a file kept to be wrong
            continue
        name = os.path.relpath(path, root).removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
        found.append(Module(name, tuple(text.split("\n")), tree))
    if len(found) < MIN_MODULES:
        raise ValueError(
            f"Found the source of only {len(found)} standard library modules in {root!r}; python_docs is made "
            "from it. Use a Python that ships its library as .py files."
        )
    return tuple(found)


def _code(lines: tuple[str, ...], node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return a definition's lines from its `def` or `class` on, docstring left out."""
    first, last = node.lineno - 1, node.end_lineno
    if ast.get_docstring(node, clean=False) is None:
        kept = lines[first:last]
    else:
        docstring = node.body[0]
        kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : last]
    return textwrap.dedent("\n".join(kept)).strip()


def _definitions(module: Module) -> Iterator[Definition]:
    def visit(node: ast.AST, inside_class: bool) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            is_class = isinstance(child, ast.ClassDef)
            if is_class or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "class" if is_class else "method" if inside_class else "function"
                docstring = inspect.cleandoc(ast.get_docstring(child, clean=False) or "")
                yield Definition(module.name, kind, child.name, _code(module.lines, child), docstring, child)
                yield from visit(child, is_class)
            else:
                yield from visit(child, inside_class)

    return visit(module.tree, False)


@functools.cache
def definitions() -> tuple[Definition, ...]:
    """Return the library's classes, functions and methods, in the order of their files."""
    return tuple(definition for module in modules() for definition in _definitions(module))


def functions() -> Iterator[Definition]:
    """Yield the functions and methods."""
    return (definition for definition in definitions() if definition.kind != "class")


@functools.cache
def documents() -> tuple[str, ...]:
    """Return documentation texts: the help topics, then all docstrings, each text once."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # left out by some distributions
        topics = {}
    texts = [topics[name] for name in sorted(topics)]
    texts += [inspect.cleandoc(ast.get_docstring(module.tree, clean=False) or "") for module in modules()]
    texts += [definition.docstring for definition in definitions()]
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


@functools.cache
def characters() -> tuple[tuple[str, str], ...]:
    """Return (character, lower-case name) of all characters whose names say something."""
    named = ((chr(i), unicodedata.name(chr(i), "")) for i in range(0x110000) if not 0xAC00 <= i < 0xD7A4)
    return tuple((c, name.lower()) for c, name in named if name and not name.startswith(UNNAMED))


def entities() -> tuple[tuple[str, str], ...]:
    """Return (name, character) of the HTML entities that stand for one character."""
    pairs = ((name.removesuffix(";"), text) for name, text in html.entities.html5.items() if len(text) == 1)
    return tuple(sorted(set(pairs)))
