"""Gin files and flags → arguments of library functions, with every name checked.

The only file that touches gin. Gin alone accepts TRIAN_STEPS=5 in silence, so we read the statements
ourselves, remember where each stands, and walk the parsed config from its roots (`train.fit`,
`prepare.mixture`): what no root reaches is an error.

Written against the internals of gin-config 0.5.0.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from gin import config as gin
from gin import config_parser as parser

from mtjax import tree
from mtjax.launch.flags import RECIPES

COMMAND_LINE = "command line"
# What a binding on the command line may name even where no recipe imports it: --gin.train.fit.balancer=@balance.x().
_IMPORTS = """
from __gin__ import dynamic_registration
from mtjax import balance
from mtjax import losses
from mtjax import optim
from mtjax import peft
from mtjax import sharding
from mtjax import train
from mtjax.data import mixtures
from mtjax.data import pipeline
from mtjax.launch import prepare
from mtjax.mixing import rates
from mtjax.models import decoder_only
from mtjax.models import moe
from mtjax.models import routers
from mtjax.models import t5
"""

Key = tuple[str, str, str]  # scope, complete selector, parameter; a macro is (NAME, 'gin.macro', 'value')


class Binding(NamedTuple):
    """One statement of a file or flag."""

    key: Key
    value: Any
    where: str


class Config(NamedTuple):
    """A parsed and checked configuration; gin itself holds it, so there is one at a time."""

    text: str  # what config.gin holds: it alone gives the same configuration again
    roots: tuple[Callable[..., Any], ...]

    def is_bound(self, function: Callable[..., Any]) -> bool:
        """Tell whether the configuration binds anything of a root."""
        configurable = gin._inverse_lookup(function)
        return configurable is not None and ("", configurable.selector) in gin._CONFIG

    def arguments(self, function: Callable[..., Any], *, only: Sequence[str] | None = None) -> dict[str, Any]:
        """Build the arguments that are bound for a root; with `only`, just these.

        Raises ValueError where a component cannot be built from its bindings.
        """
        if not self.is_bound(function):
            return {}
        bound = gin.get_bindings(function, resolve_references=False)
        return {name: _build(name, value) for name, value in bound.items() if only is None or name in only}


def parse(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    *,
    roots: Sequence[Callable[..., Any]],
    also: Sequence[Callable[..., Any]] = (),
    search_paths: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    paths: Sequence[str] = (),
) -> Config:
    """Parse files and then bindings (NAME=VALUE); later ones win.

    `also` are roots that are checked and can be built, but are no part of the text. `defaults` fills macros that are still %gin.REQUIRED; relative paths in the macros `paths` become
    absolute, so that the saved text means the same from any folder. Raises ValueError, naming file and line,
    on syntax, on unknown names, on what no root uses, and on what is required but not set.
    """
    if not gin_files and not bindings:
        raise ValueError(f"Give a --gin_file. Shipped: {', '.join(shipped_recipes())}.")
    gin.clear_config()
    history: list[Binding] = []
    for name in gin_files:
        history += _read_file(find(name, search_paths), search_paths=search_paths)
    history += _read_flags(bindings, history=history)
    history += [
        Binding((name, "gin.macro", "value"), value, "default")
        for name, value in (defaults or {}).items()
        if _is_required(_current(history).get((name, "gin.macro", "value")))
    ]
    current = _current(history)
    for key in [(name, "gin.macro", "value") for name in paths]:
        if isinstance(current.get(key), str) and "://" not in current[key]:
            current[key] = os.path.abspath(current[key])
    for (scope, selector, parameter), value in current.items():
        gin._CONFIG.setdefault((scope, selector), {})[parameter] = value
    bound = {key[1] for key in current}
    own, others = (
        [found.selector for root in part if (found := gin._inverse_lookup(root)) and found.selector in bound]
        for part in (roots, also)
    )
    if not own:
        raise ValueError(
            f"The configuration binds nothing of {' or '.join(_name(root) for root in roots)}; "
            "include a recipe such as runs/pretrain.gin."
        )
    selectors, values = [*own, *others], {key: [value] for key, value in current.items()}
    used = _walk(selectors, values)
    # A missing component leaves the bindings of what it would call idle, so it is told first and alone.
    problems = _missing_arguments(used, current)
    problems = problems or [*_unused(history, used=used, selectors=selectors), *_unset(used, current)]
    if problems:
        raise ValueError("\n".join(problems))
    return Config(text=_text(_walk(own, values) if others else used, current), roots=tuple(roots))


def binds(
    gin_files: Sequence[str],
    function: Callable[..., Any],
    argument: str,
    *,
    search_paths: Sequence[str] = (),
) -> bool:
    """Tell whether gin files bind an argument of a function."""
    gin.clear_config()
    history = [
        binding
        for name in gin_files
        for binding in _read_file(find(name, search_paths), search_paths=search_paths)
    ]
    configurable = gin._inverse_lookup(function)
    return configurable is not None and ("", configurable.selector, argument) in _current(history)


def shipped_recipes() -> list[str]:
    """List the recipes that come with mtjax, as --gin_file takes them."""
    return sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.gin"))


def find(name: str, search_paths: Sequence[str] = ()) -> Path:
    """Find a gin file: as given, else in the search paths, the current folder and mtjax's recipes.

    Raises ValueError, with the nearest names, where it is in none.
    """
    # RECIPES.parent makes 'gin/runs/pretrain.gin' work from anywhere, as it reads in a checkout.
    folders = [Path(folder) for folder in (*search_paths, ".")] + [RECIPES, RECIPES.parent]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    near = difflib.get_close_matches(Path(name).name, [Path(r).name for r in shipped_recipes()], n=3)
    hints = [recipe for recipe in shipped_recipes() if Path(recipe).name in near]
    raise ValueError(
        f"No gin file {name!r} in {[str(folder) for folder in folders]}."
        + (f" Did you mean {' or '.join(hints)}?" if hints else f" Shipped: {', '.join(shipped_recipes())}.")
    )


def differences(old: str, new: str) -> dict[str, tuple[str | None, str | None]]:
    """Compare two configuration texts: {name: (old value, new value)} of the bindings that differ."""
    before, after = statements(old), statements(new)
    names = [*before, *(name for name in after if name not in before)]
    return {
        name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    }


# Reading ---------------------------------------------------------------------------------------------------


class _Context(gin.ParseContext):
    """A gin parse context whose errors name the nearest valid name."""

    is_lenient = False  # whether a registered name's end is enough, as on T5X's command line

    def get_configurable(self, selector: str) -> gin.Configurable:
        first, *rest = selector.split(".")
        if first not in self._symbol_table:
            found = gin._REGISTRY.get_match(selector) if self.is_lenient or not self._symbol_table else None
            if found is None:
                imported = [name for name in self._symbol_table if name != "gin"]
                raise tree.unknown_name("gin name", selector, imported or list(gin._REGISTRY))
            return found
        value = self._symbol_table[first]
        for position, name in enumerate(rest):
            if not hasattr(value, name):
                parent = ".".join([first, *rest[:position]])
                public = [n for n in dir(value) if not n.startswith("_") and callable(getattr(value, n))]
                raise tree.unknown_name("gin name", f"{parent}.{name}", [f"{parent}.{n}" for n in public])
            value = getattr(value, name)
        if not callable(value):
            raise ValueError(f"{selector!r} is not a function or class, so nothing of it can be bound.")
        return super().get_configurable(selector)


@contextlib.contextmanager
def _context(*, is_lenient: bool = False) -> Iterator[_Context]:
    context = _Context()
    context.is_lenient = is_lenient
    gin._PARSE_CONTEXTS.append(context)
    try:
        yield context
    finally:
        gin._PARSE_CONTEXTS.pop()


def _read_file(path: Path, *, search_paths: Sequence[str]) -> list[Binding]:
    bindings: list[Binding] = []
    with _context() as context, open(path, encoding="utf-8") as file:
        reader = None
        try:
            reader = parser.ConfigParser(file, gin.ParserDelegate())
            for statement in reader:
                bindings += _read_statement(statement, context, path=path, search_paths=search_paths)
        except (SyntaxError, tokenize.TokenError) as error:
            line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
            raise ValueError(f"{path}:{line}: {error.args[0]}") from error
        except (ValueError, ImportError) as error:
            if re.match(r"\S+\.gin:\d+: ", str(error)):  # from an included file
                raise
            line = reader._current_location().line_num - 1 if reader else 1
            raise ValueError(f"{path}:{line}: {error}") from error
        gin._IMPORTS.update(context.imports)
    return bindings


def _read_statement(
    statement: Any, context: _Context, *, path: Path, search_paths: Sequence[str]
) -> list[Binding]:
    if isinstance(statement, parser.ImportStatement):
        context.process_import(statement)
    elif isinstance(statement, parser.IncludeStatement):
        beside = [*search_paths, str(path.parent)]
        return _read_file(find(statement.filename, beside), search_paths=search_paths)
    elif isinstance(statement, parser.BindingStatement):
        return [_bind(statement, f"{path}:{statement.location.line_num}", context)]
    return []


def _bind(statement: parser.BindingStatement, where: str, context: _Context) -> Binding:
    scope, selector, parameter, value, _ = statement
    if not parameter:  # a macro
        return Binding((f"{scope}/{selector}" if scope else selector, "gin.macro", "value"), value, where)
    configurable = context.get_configurable(selector)
    if not gin._might_have_parameter(configurable.wrapper, parameter):
        raise tree.unknown_name(f"argument of {selector}:", parameter, _parameters(configurable))
    return Binding((scope, configurable.selector, parameter), value, where)


def _read_flags(texts: Sequence[str], *, history: Sequence[Binding]) -> list[Binding]:
    bindings: list[Binding] = []
    with _context(is_lenient=True) as context:
        _import_into(context)
        for text in texts:
            name, separator, value_text = text.partition("=")
            name = name.strip()
            if not separator or not re.fullmatch(r"[\w./]+", name):
                raise ValueError(f"--gin_bindings={text!r}: expected NAME=VALUE.")
            scope, selector, parameter = parser.parse_binding_key(name)
            location = parser.Location(None, 1, None, text)
            statement = parser.BindingStatement(scope, selector, parameter, None, location)
            try:
                key = _bind(statement, COMMAND_LINE, context).key
                value = _read_value(value_text.strip(), previous=_current([*history, *bindings]).get(key))
            except ValueError as error:
                raise ValueError(f"--gin.{name}: {error}") from error
            bindings.append(Binding(key, value, COMMAND_LINE))
    return bindings


def _import_into(context: _Context) -> None:
    """Import the recipes' modules under the recipes' names, and mtjax's own."""
    own = list(parser.ConfigParser(_IMPORTS, gin.ParserDelegate()))
    for statement in [own[0], *gin.ImportManager(gin._IMPORTS).sorted_imports, *own[1:]]:
        name = statement.bound_name()
        if statement.module.startswith("__gin__") and context._dynamic_registration:
            continue
        if name not in context._symbol_table:
            context.process_import(statement)


def _read_value(text: str, *, previous: Any) -> Any:
    """Parse a flag's value; what is no gin literal is a string where its meaning is plain.

    Raises ValueError on a half-written literal, and on a word where the recipe has a number.
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        reader = parser.ConfigParser(text, gin.ParserDelegate())
        value = reader.parse_value()
        is_whole = reader.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
    except (SyntaxError, tokenize.TokenError, StopIteration):
        is_whole, value = False, None
    if is_whole:
        is_word = isinstance(previous, str) and isinstance(value, int | float)
        return text if is_word else value  # --gin.MODEL_DIR=2024 means a folder
    if text[:1] in tuple("[({'\"@%"):
        raise ValueError(f"cannot read {text!r} as a gin value; check brackets and quotes.")
    if isinstance(previous, int | float | list | tuple | dict):
        raise ValueError(f"expected a {type(previous).__name__}, as in {previous!r}, got {text!r}.")
    return os.path.expanduser(text)


# Checking --------------------------------------------------------------------------------------------------


def _current(history: Sequence[Binding]) -> dict[Key, Any]:
    return {binding.key: binding.value for binding in history}


def _references(value: Any) -> list[gin.ConfigurableReference]:
    return [v for v in gin._iterate_flattened_values(value) if isinstance(v, gin.ConfigurableReference)]


def _is_constant(reference: gin.ConfigurableReference) -> bool:
    return reference.configurable.wrapped is gin._retrieve_constant


def _is_required(value: Any) -> bool:
    return isinstance(value, gin.ConfigurableReference) and repr(value) == "%gin.REQUIRED"


class _Used(NamedTuple):
    keys: dict[Key, str]  # → what uses it first
    called: dict[tuple[str, str], str]  # (scope, selector) that is called → what calls it first


def _walk(selectors: Sequence[str], values: Mapping[Key, Sequence[Any]]) -> _Used:
    """Follow references and macros from the roots, each through the scopes it is called in."""
    by_call: dict[tuple[str, str], list[Key]] = {}
    for key in values:
        by_call.setdefault(key[:2], []).append(key)
    used = _Used({}, {})
    stack = [((), selector, "the command") for selector in reversed(selectors)]
    while stack:
        scope, selector, by = stack.pop()
        if ("/".join(scope), selector) in used.called:
            continue
        used.called["/".join(scope), selector] = by
        for depth in range(len(scope) + 1):  # bindings of outer scopes hold in inner ones
            for key in by_call.get(("/".join(scope[:depth]), selector), []):
                used.keys.setdefault(key, by)
                for reference in (r for value in values[key] for r in _references(value)):
                    if not _is_constant(reference):
                        inner = tuple(reference.scopes) or scope
                        stack.append((inner, reference.configurable.selector, _key_name(key)))
    return used


def _unused(history: Sequence[Binding], *, used: _Used, selectors: Sequence[str]) -> list[str]:
    """List the bindings that no root uses.

    A file's binding may go idle because a later one replaced the component it belongs to; it is an error
    only if nothing would have used it before either. One on the command line must be used. Shipped recipes
    may offer more than a user's own model takes (their tests parse them strictly).
    """
    values: dict[Key, list[Any]] = {}
    for binding in history:
        values.setdefault(binding.key, []).append(binding.value)
    ever = _walk(selectors, values)
    lines = []
    for binding in history:
        if binding.key in (used if binding.where == COMMAND_LINE else ever).keys:
            continue
        if binding.where.startswith(f"{RECIPES}{os.sep}"):
            continue
        name = _key_name(binding.key)
        macros = [key[0] for key in ever.keys if key[1] == "gin.macro"]
        candidates = macros if binding.key[1] == "gin.macro" else [_key_name(key) for key in ever.keys]
        near = difflib.get_close_matches(name, candidates, n=2, cutoff=0.6)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        if not near and binding.key[1] == "gin.macro":
            hint = f" Names in use: {', '.join(sorted(macros))}."
        elif not near:
            hint = f" Nothing in this configuration calls {name.rpartition('.')[0]}."
        lines.append(f"{binding.where}: nothing uses {name}.{hint}")
    return lines


def _unset(used: _Used, current: Mapping[Key, Any]) -> list[str]:
    """List the macros in use without a value, and those still %gin.REQUIRED."""
    lines = []
    for (scope, selector), by in used.called.items():
        if selector == "gin.macro" and (scope, selector, "value") not in current:
            near = difflib.get_close_matches(scope, [key[0] for key in current if key[1] == "gin.macro"])
            hint = f" Did you mean %{near[0]}?" if near else ""
            lines.append(f"{by} is %{scope}, but {scope} is never set.{hint} Set it with --gin.{scope}=...")
    for key in current:
        if key in used.keys and _is_required(current[key]):
            lines.append(f"{_key_name(key)} is required: set it with --gin.{_key_name(key)}=...")
    return lines


def _missing_arguments(used: _Used, current: Mapping[Key, Any]) -> list[str]:
    """List the arguments without default or binding of everything that is called."""
    lines = []
    for (scope, selector), by in used.called.items():
        if selector.startswith("gin."):
            continue
        bound = {
            key[2]
            for key in current
            if key[1] == selector and (not key[0] or f"{scope}/".startswith(f"{key[0]}/"))
        }
        needed = _parameters(gin._REGISTRY[selector], required=True)
        lines += [
            f"{_short(selector)}.{name} is not set (called by {by}): bind it, or give a recipe that does."
            for name in needed
            if name not in bound
        ]
    return lines


def _parameters(configurable: gin.Configurable, *, required: bool = False) -> list[str]:
    function = configurable.wrapped
    parameters = inspect.signature(function).parameters.values()
    return [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and (not required or p.default is p.empty)
    ]


# Writing and building --------------------------------------------------------------------------------------


def _text(used: _Used, current: Mapping[Key, Any]) -> str:
    """Write the operative configuration: what the roots use, with the defaults that hold today."""
    operative: dict[tuple[str, str], dict[str, Any]] = {}
    for key in used.keys:
        operative.setdefault(key[:2], {})[key[2]] = current[key]
    for _, selector in used.called:
        configurable = gin._REGISTRY[selector]
        if not selector.startswith("gin."):
            function = configurable.wrapped
            if inspect.isclass(function):
                function = gin._find_class_construction_fn(function)
            defaults = gin._get_default_configurable_parameter_values(function, None, None)
            defaults.pop("config_text", None)
            operative["", selector] = defaults | operative.get(("", selector), {})
    version = metadata.version("mtjax")
    header = (
        f"# The configuration of this run, written by mtjax {version}.\n"
        "# Resume: mtjax train --gin_file=THIS FILE. Repeat: the same with --gin.MODEL_DIR=NEW FOLDER.\n"
    )
    return header + gin._config_str(operative, max_line_length=100)


def _build(name: str, value: Any) -> Any:
    """Resolve references in a value, calling what they name."""
    import copy

    try:
        return copy.deepcopy(value)
    except (ValueError, TypeError) as error:
        message = re.sub(r"\n  In call to configurable '(\w+)'.*", r"\n  (while building \1)", str(error))
        raise ValueError(f"{name}: {message}") from error


def statements(text: str) -> dict[str, str]:
    """Read a configuration's text: {name: the value as written} of its bindings."""

    class Literal(parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name, evaluate):
            return f"@{scoped_configurable_name}{'()' if evaluate else ''}"

        def macro(self, macro_name):
            return f"%{macro_name}"

    return {
        _key_name((s.scope, s.selector, s.arg_name)): repr(s.value)
        for s in parser.ConfigParser(io.StringIO(text), Literal())
        if isinstance(s, parser.BindingStatement)
    }


def _short(selector: str) -> str:
    return ".".join(selector.split(".")[-2:])


def _key_name(key: Key) -> str:
    scope, selector, parameter = key
    if selector == "gin.macro":
        return scope
    return (f"{scope}/" if scope else "") + (f"{_short(selector)}.{parameter}" if parameter else selector)


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
