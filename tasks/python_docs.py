"""Fourteen tasks in five families from what every CPython ships, no download: the mixture `python_docs`.

| family | tasks |
|---|---|
| language_modeling | span corruption over help topics and docstrings |
| unicode | character name → category; code point → script; HTML entity → kind of character |
| code | source → function, method or class; does it return a value; does it loop; how many parameters |
| syntax | expression → its kind; error message → exception class; name → what it names |
| documentation | docstring → package; docstring → function name (hard); code → docstring (hard) |

Splits go by a hash of what an example is about (its docstring, its code, ...), so they are the same in every
run, and all examples about one thing share a split. An input occurs once in a task. The examples themselves
follow the Python that runs this (3.11 to 3.13): its library grows and its Unicode does too.
"""

from __future__ import annotations

import ast
import collections
import functools
import hashlib
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

from mtjax.tasks import preprocessors, python_library, registration

SPLITS = {"test": 15, "validation": 8, "train": 77}  # percent
MAX_EXAMPLES = {"train": 10_000, "validation": 250, "test": 500}
MAX_CODE, MAX_TEXT, MAX_CHUNK = 300, 300, 800  # characters
LICENCE = "PSF-2.0"
CITATION = "The Python standard library, Python Software Foundation"


class Example(NamedTuple):
    """One example; `key` is what it is about, and decides its split."""

    inputs: str
    targets: str
    key: str


# Splits.


def _hash(text: str) -> int:
    """Hash a text, ignoring case and spacing; the same in every process."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.casefold().split()).encode()).digest()[:8], "big")


def split_of(key: str) -> str:
    """Return the split of everything about `key`."""
    place = _hash(key) % 100
    for split, percent in SPLITS.items():
        if place < percent:
            return split
        place -= percent
    raise AssertionError("SPLITS do not add up to 100.")


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """Keep each input once, with its most frequent target (the alphabetically first of equals).

    Where there are no inputs (plain text), each target once.
    """
    by_input: dict[int, list[Example]] = collections.defaultdict(list)
    for example in examples:
        by_input[_hash(example.inputs or example.targets)].append(example)

    def choose(group: list[Example]) -> Example:
        counts = collections.Counter(example.targets for example in group)
        return min(group, key=lambda example: (-counts[example.targets], example))

    return [choose(group) for group in by_input.values()]


def _balance(examples: Sequence[Example], *, ratio: float) -> list[Example]:
    """Cap the most frequent target at `ratio` times the least frequent one, by hash of the input."""
    by_target: dict[str, list[Example]] = collections.defaultdict(list)
    for example in sorted(examples, key=lambda example: _hash("balance " + example.inputs)):
        by_target[example.targets].append(example)
    most = int(ratio * min(map(len, by_target.values())))
    return [example for group in by_target.values() for example in group[:most]]


@functools.cache
def examples(task: str) -> Mapping[str, tuple[Example, ...]]:
    """Build a task's examples by split, in an order that looks shuffled and never changes."""
    definition = TASKS[task]
    found = _distinct(definition.build())
    if definition.ratio:
        found = _balance(found, ratio=definition.ratio)
    found.sort(key=lambda example: (_hash("order " + example.inputs + example.targets), example))
    splits: dict[str, list[Example]] = {split: [] for split in MAX_EXAMPLES}
    for example in found:
        splits[split_of(example.key)].append(example)
    return {split: tuple(group[: MAX_EXAMPLES[split]]) for split, group in splits.items()}


# Text.


def _shorten(text: str, length: int) -> str:
    """Cut a text at a space, with an ellipsis, where it is longer than `length`."""
    return (
        textwrap.shorten(text, length, placeholder=" ...") if len(text) > length else " ".join(text.split())
    )


def _chunks(document: str) -> Iterator[str]:
    """Cut a document between paragraphs, or lines, into pieces of up to MAX_CHUNK characters."""
    piece = ""
    for paragraph in document.split("\n\n"):
        lines = [paragraph] if len(paragraph) <= MAX_CHUNK else paragraph.split("\n")
        for i, line in enumerate(lines):
            joint = "\n" if i else "\n\n"
            if piece and len(piece) + len(joint) + len(line) > MAX_CHUNK:
                yield piece
                piece = line
            else:
                piece = piece + joint + line if piece else line
    yield piece


def documentation() -> Iterator[Example]:
    """Yield pieces of documentation; the pieces of a document share a split."""
    for document in python_library.documents():
        for piece in _chunks(document):
            if 80 <= len(piece) <= 2 * MAX_CHUNK:
                yield Example("", piece, document)


# Unicode.

CATEGORIES = {
    "Lu": "capital letter", "Ll": "small letter", "Lo": "other letter", "Lm": "modifier", "Sk": "modifier",
    "Mn": "mark", "Mc": "mark", "Me": "mark", "Nd": "digit", "No": "number", "Nl": "number",
    "Sm": "mathematical symbol", "So": "other symbol", "Sc": "currency symbol",
    "Po": "punctuation", "Pd": "punctuation", "Ps": "punctuation", "Pe": "punctuation",
    "Pi": "punctuation", "Pf": "punctuation",
}  # fmt: skip
SCRIPTS = (
    "arabic", "armenian", "bengali", "braille", "canadian", "cherokee", "coptic", "cyrillic", "devanagari",
    "ethiopic", "georgian", "greek", "hangul", "hebrew", "latin", "linear", "mathematical", "myanmar", "tibetan",
    "vai", "yi",
)  # fmt: skip
ENTITY_KINDS = {
    "Lu": "capital letter", "Ll": "small letter", "Sm": "mathematical symbol", "So": "other symbol",
    "Po": "punctuation", "Ps": "punctuation", "Pe": "punctuation", "Pd": "punctuation",
}  # fmt: skip


def unicode_categories() -> Iterator[Example]:
    """Yield character name → category."""
    for character, name in python_library.characters():
        if kind := CATEGORIES.get(unicodedata.category(character)):
            yield Example(name, kind, name)


def unicode_scripts() -> Iterator[Example]:
    """Yield code point, hexadecimal digits apart → script."""
    for character, name in python_library.characters():
        if (script := name.split()[0]) in SCRIPTS:
            yield Example(" ".join(f"{ord(character):05x}"), script, name)


def entity_kinds() -> Iterator[Example]:
    """Yield HTML entity → kind of character."""
    for name, character in python_library.entities():
        if kind := ENTITY_KINDS.get(unicodedata.category(character)):
            yield Example(f"&{name};", kind, character)


# Code.


def _short_functions() -> Iterator[python_library.Definition]:
    return (f for f in python_library.functions() if 40 <= len(f.code) <= MAX_CODE)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Walk a function's body, but not into the functions and classes defined in it."""
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _own_nodes(child)


def code_kinds() -> Iterator[Example]:
    """Yield source → function, method or class."""
    for definition in python_library.definitions():
        if definition.code:
            yield Example(definition.code[:200], definition.kind, definition.code)


def code_returns() -> Iterator[Example]:
    """Yield source of a function → does it return a value?"""
    for function in _short_functions():
        returns = any(isinstance(node, ast.Return) and node.value for node in _own_nodes(function.node))
        yield Example(function.code, "yes" if returns else "no", function.code)


def code_loops() -> Iterator[Example]:
    """Yield source of a function → has it a loop statement?"""
    for function in _short_functions():
        loops = any(
            isinstance(node, ast.For | ast.AsyncFor | ast.While) for node in _own_nodes(function.node)
        )
        yield Example(function.code, "yes" if loops else "no", function.code)


def code_parameters() -> Iterator[Example]:
    """Yield signature → number of parameters."""
    for function in python_library.functions():
        arguments = function.node.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        number = len(names) + (arguments.vararg is not None) + (arguments.kwarg is not None)
        signature = f"def {function.name}({ast.unparse(arguments)})"
        if number <= 6 and len(signature) <= 150:
            yield Example(signature, str(number), signature)


# Syntax.

EXPRESSIONS = {
    ast.Call: "call", ast.Attribute: "attribute", ast.Subscript: "subscript", ast.BinOp: "arithmetic",
    ast.BoolOp: "logic", ast.Compare: "comparison", ast.Dict: "dict", ast.List: "list", ast.Tuple: "tuple",
    ast.ListComp: "comprehension", ast.SetComp: "comprehension", ast.DictComp: "comprehension",
    ast.GeneratorExp: "comprehension", ast.IfExp: "conditional", ast.Lambda: "lambda", ast.JoinedStr: "string",
}  # fmt: skip
ERRORS = (
    "AssertionError", "AttributeError", "ImportError", "NotImplementedError", "OSError", "RuntimeError",
    "TypeError", "ValueError",
)  # fmt: skip


def expression_kinds() -> Iterator[Example]:
    """Yield an assigned, returned or tested expression → its kind."""
    for module in python_library.modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Assign | ast.Return):
                value = node.value
            elif isinstance(node, ast.If | ast.While):
                value = node.test
            else:
                continue
            if type(value) in EXPRESSIONS and value.lineno == value.end_lineno:
                line = module.lines[value.lineno - 1]  # columns count bytes
                text = line.encode()[value.col_offset : value.end_col_offset].decode()
                if len(text) <= 80:
                    yield Example(text, EXPRESSIONS[type(value)], text)


def _message(node: ast.expr) -> str:
    """Return the literal text of a message, '...' for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_message(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
        return _message(node.left) + (_message(node.right) if isinstance(node.op, ast.Add) else "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _message(node.func.value)
    return ""


def error_classes() -> Iterator[Example]:
    """Yield error message → exception class."""
    for module in python_library.modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = getattr(node.exc.func, "id", "")
                message = " ".join(_message(node.exc.args[0]).split())
                if name in ERRORS and len(message) >= 8:
                    yield Example(message[:MAX_TEXT], name, message)


def name_kinds() -> Iterator[Example]:
    """Yield identifier → class, exception, function, method or constant."""
    for definition in python_library.definitions():
        is_error = definition.name.endswith(("Error", "Exception", "Warning"))
        kind = "exception" if definition.kind == "class" and is_error else definition.kind
        yield Example(definition.name, kind, definition.name)
    for module in python_library.modules():
        for node in module.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name.isupper():
                    yield Example(name, "constant", name)


# Documentation.

PACKAGES = {
    "asyncio": "asyncio", "_pydecimal": "decimal", "email": "email", "importlib": "importlib",
    "logging": "logging", "multiprocessing": "multiprocessing", "unittest": "unittest", "xml": "xml",
}  # fmt: skip


def _documented() -> Iterator[python_library.Definition]:
    return (d for d in python_library.definitions() if len(d.docstring) >= 30)


def doc_packages() -> Iterator[Example]:
    """Yield docstring → package."""
    for definition in _documented():
        if package := PACKAGES.get(definition.module.split(".")[0]):
            yield Example(_shorten(definition.docstring, MAX_TEXT), package, definition.docstring)


def doc_names() -> Iterator[Example]:
    """Yield docstring → name of the function, where the docstring does not say it."""
    for definition in _documented():
        name = definition.name.strip("_")
        if definition.kind != "class" and len(name) >= 3 and name.lower() not in definition.docstring.lower():
            yield Example(_shorten(definition.docstring, MAX_TEXT), name, definition.docstring)


def code_docs() -> Iterator[Example]:
    """Yield code → first line of its docstring."""
    for definition in _documented():
        line = definition.docstring.split("\n")[0].strip()
        if 40 <= len(definition.code) <= 2 * MAX_CODE and len(line) >= 15:
            yield Example(definition.code, line, definition.docstring)


# The tasks.


class Definition(NamedTuple):
    """How a task is made; `ratio` caps the most frequent target at so many times the least frequent one."""

    build: Callable[[], Iterable[Example]]
    family: str
    prompt: str = ""
    metrics: tuple[str, ...] = ("accuracy",)
    options: tuple[str, ...] | None = None
    ratio: float | None = None
    rate: float = 1.0


def _options(*names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set().union(*names)))


YES_NO = ("no", "yes")
TASKS = {
    "span_corruption": Definition(documentation, "language_modeling", metrics=("bits_per_byte",), rate=2.0),
    "unicode_category": Definition(
        unicode_categories, "unicode", "category of character:", options=_options(CATEGORIES.values())
    ),
    "unicode_script": Definition(unicode_scripts, "unicode", "script of code point:", options=SCRIPTS),
    "entity_kind": Definition(
        entity_kinds, "unicode", "kind of entity:", options=_options(ENTITY_KINDS.values())
    ),
    "code_kind": Definition(
        code_kinds, "code", "kind of definition:", options=("class", "function", "method"), ratio=2.0
    ),
    "code_returns": Definition(code_returns, "code", "returns a value:", options=YES_NO, ratio=1.0),
    "code_loops": Definition(code_loops, "code", "has a loop:", options=YES_NO, ratio=1.0),
    "code_parameters": Definition(
        code_parameters, "code", "number of parameters:", options=tuple(map(str, range(7)))
    ),
    "expression_kind": Definition(
        expression_kinds, "syntax", "kind of expression:", options=_options(EXPRESSIONS.values())
    ),
    "error_class": Definition(error_classes, "syntax", "exception of message:", options=ERRORS),
    "name_kind": Definition(
        name_kinds,
        "syntax",
        "kind of name:",
        options=("class", "constant", "exception", "function", "method"),
    ),
    "doc_package": Definition(
        doc_packages, "documentation", "package of docstring:", options=_options(PACKAGES.values())
    ),
    "doc_name": Definition(
        doc_names, "documentation", "name of function:", metrics=("exact_match",), rate=0.5
    ),
    "code_doc": Definition(code_docs, "documentation", "docstring of:", metrics=("rouge", "bleu"), rate=0.5),
}
PREFIX = "python_docs_"
MIXTURE = "python_docs"


def _dataset(task: str, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Return a split of a task as SeqIO's source: strings inputs and targets."""
    del shuffle_files, seed
    prompt = TASKS[task].prompt
    rows = examples(task)[split]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": tf.constant([f"{prompt} {row.inputs}".strip() for row in rows], tf.string),
            "targets": tf.constant([row.targets for row in rows], tf.string),
        }
    )


def register(vocabulary: seqio.Vocabulary | None = None, *, suffix: str = "") -> seqio.Mixture:
    """Register the tasks python_docs_<name><suffix> and the mixture python_docs<suffix> over a vocabulary.

    The default vocabulary unless given one (see tasks/vocabularies.py).
    """
    rates = {}
    for name, definition in TASKS.items():
        task = registration.add_task(
            f"{PREFIX}{name}{suffix}",
            source=seqio.FunctionDataSource(functools.partial(_dataset, name), splits=tuple(MAX_EXAMPLES)),
            online=(preprocessors.span_corruption,) if name == "span_corruption" else (),
            metrics=definition.metrics,
            family=definition.family,
            licence=LICENCE,
            citation=CITATION,
            options=definition.options,
            origin="the running Python's standard library",
            vocabulary=vocabulary,
        )
        rates[task.name] = definition.rate
    return seqio.MixtureRegistry.add(f"{MIXTURE}{suffix}", list(rates.items()))


register()
