"""Imports go one way, and the library needs neither TensorFlow nor gin."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEVELS = {
    "types": 0,
    "tree": 0,
    "lazy": 0,
    "hardware": 1,
    "hlo": 1,
    **dict.fromkeys(
        ("sharding", "losses", "metrics", "host_memory", "hosts", "optim", "checkpoint", "log"), 1
    ),
    **dict.fromkeys(("models", "balance", "mixing", "peft", "merging", "data"), 2),
    **dict.fromkeys(
        (
            "program",
            "aot",
            "monitor",
            "feedback",
            "health",
            "start",
            "validation",
            "train",
            "decode",
            "predict",
            "evaluate",
            "infer",
            "convert",
        ),
        3,
    ),
    "studies": 4,
    "tasks": 4,
    "launch": 5,
}
# The stream of data draws its tasks from a mixture; no other folder of level 2 knows another.
SIBLINGS = {("data", "mixing")}
# Heavy or foreign packages and the only places that may import them (prefixes of paths).
HOMES = {
    "tensorflow": ("mtjax/data/seqio_cache/", "tasks/", "launch/"),
    "tensorflow_datasets": ("tasks/", "launch/"),
    "tensorflow_text": (),
    "apache_beam": ("mtjax/data/seqio_cache/beam.py",),
    "seqio": ("mtjax/data/seqio_cache/", "tasks/", "launch/"),
    "gin": ("launch/config.py",),
    "absl": (),
    "argparse": ("launch/",),
    "flax": ("mtjax/models/",),
    "clu": (),
}


def sources():
    for folder in ("mtjax", "tasks", "launch"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def unit(dotted: str) -> str:
    """Return the part of mtjax.<part>... that has a level."""
    return dotted.split(".")[1] if dotted.count(".") else ""


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "mtjax" else ("mtjax", *parts)).removesuffix(".__init__")


def imports(path: pathlib.Path) -> set[str]:
    """Return the dotted names a file imports, also inside functions; from a import b counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(importer: str, imported: str) -> bool:
    """Tell whether one part of mtjax must not import another."""
    if importer == imported or not importer or not imported:
        return False
    if LEVELS[importer] == LEVELS[imported] == 2:
        return (importer, imported) not in SIBLINGS
    return LEVELS[imported] > LEVELS[importer]


def test_every_part_has_a_level():
    parts = {unit(module_name(path)) for path in sources()} - {""}
    assert parts <= LEVELS.keys(), (
        f"give {parts - LEVELS.keys()} a level in this test and in the README's tree"
    )


def test_imports_go_one_way():
    edges = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in sorted(imports(path))
        if name.split(".")[0] == "mtjax" and upward(unit(module_name(path)), unit(name))
    ]
    assert not edges, "\n".join(edges)


@pytest.mark.parametrize(
    ("importer", "imported", "is_upward"),
    [
        ("tree", "losses", True),
        ("models", "balance", True),
        ("train", "models", False),
        ("data", "mixing", False),
    ],
)
def test_upward_edges_are_seen(importer, imported, is_upward):
    assert upward(importer, imported) == is_upward


def test_foreign_packages_stay_home():
    strays = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in sorted(imports(path))
        if (homes := HOMES.get(name.split(".")[0])) is not None
        and not str(path.relative_to(ROOT)).startswith(homes or ("nowhere",))
    ]
    assert not strays, "\n".join(strays)


BLOCKED = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "gin", "clu.metric_writers")
IMPORT_ALL = f"""
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {BLOCKED}):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
import mtjax
names = [m.name for m in pkgutil.walk_packages(mtjax.__path__, "mtjax.")]
names = [n for n in names if not n.startswith(("mtjax.tasks", "mtjax.launch", "mtjax.data.seqio_cache"))]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_library_imports_without_tensorflow_seqio_and_gin():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 20


def test_gin_is_no_package():
    # From the root of a checkout, gin/__init__.py would shadow gin-config.
    assert not (ROOT / "gin" / "__init__.py").exists()
