"""Gin plumbing: what a configuration means, that it repeats itself, and that every wrong name is an error."""

import re
import sys

import pytest

from mtjax.launch import config

TOY = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Size:
    width: int
    depth: int = 2

def model(size, dropout=0.0):
    return ("model", size, dropout)

def sgd(learning_rate, momentum=0.9):
    if learning_rate <= 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    return ("sgd", learning_rate, momentum)

def adam(learning_rate, b1=0.9):
    return ("adam", learning_rate, b1)

def fit(*, model, optimizer, steps, folder, lengths=None, log_every=50, config_text=""):
    return model, optimizer, steps, folder

def before(*, name="x"):
    return name
"""
BASE = """
from __gin__ import dynamic_registration
import toy_run as toy

STEPS = %gin.REQUIRED
FOLDER = %gin.REQUIRED
RATE = 0.1
LENGTHS = {'inputs': 4}
USE_IT = False
toy.fit:
    model = @toy.model()
    optimizer = @toy.sgd()
    steps = %STEPS
    folder = %FOLDER
    lengths = %LENGTHS
toy.model.size = @toy.Size()
toy.Size.width = 4
toy.sgd.learning_rate = %RATE
toy.before.name = %USE_IT
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_run.py").write_text(TOY)
    sys.path.insert(0, str(folder))
    import toy_run

    yield toy_run
    sys.path.remove(str(folder))


@pytest.fixture
def parse(toy, tmp_path):
    (tmp_path / "base.gin").write_text(BASE)

    def run(*bindings, files=("base.gin",), **options):
        for name, text in options.pop("texts", {}).items():
            (tmp_path / name).write_text(text)
        return config.parse(
            files, bindings, roots=[toy.before, toy.fit], search_paths=[str(tmp_path)], **options
        )

    return run


def fails(parse, *bindings, match, **options):
    with pytest.raises(ValueError, match=match):
        parse("STEPS=5", "FOLDER=runs", *bindings, **options)


# What a value means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/x/y", "/x/y"),
        ("python_docs", "python_docs"),
        ("gs://bucket/model-1", "gs://bucket/model-1"),
        ("'quoted'", "quoted"),
        ('"quoted"', "quoted"),
        ("5", 5),
        ("1e-3", 1e-3),
        ("-1", -1),
        ("true", True),
        ("False", False),
        ("none", None),
        ("('a', 'b')", ("a", "b")),
        ("{'a': [1, 2]}", {"a": [1, 2]}),
        ("2024-01-01", "2024-01-01"),
        ("%RATE", 0.1),
    ],
)
def test_values_of_flags(parse, toy, text, value):
    assert parse("STEPS=5", f"FOLDER={text}").arguments(toy.fit)["folder"] == value


def test_a_number_stays_text_where_the_recipe_has_text(parse, toy):
    found = parse("STEPS=5", "FOLDER=runs", "FOLDER=2024").arguments(toy.fit)
    assert found["folder"] == "2024"


@pytest.mark.parametrize("text", ["{'inputs': 4", "'runs", "[1, 2", "(1"])
def test_half_a_literal_is_an_error(parse, text):
    fails(parse, f"LENGTHS={text}", match="brackets and quotes")


def test_a_word_for_a_number_is_an_error(parse):
    fails(parse, "RATE=fast", match=r"--gin.RATE: expected a float, as in 0.1, got 'fast'")


def test_later_bindings_win(parse, toy):
    found = parse(
        "STEPS=5", "FOLDER=a", "STEPS=6", files=("base.gin", "more.gin"), texts={"more.gin": "STEPS = 4"}
    )
    assert found.arguments(toy.fit)["steps"] == 6


def test_components_may_be_replaced_on_the_command_line(parse, toy):
    replaced = ("toy.fit.optimizer=@toy.adam()", "adam.learning_rate=%RATE", "adam.b1=0.5")
    found = parse("STEPS=5", "FOLDER=a", *replaced)
    assert found.arguments(toy.fit)["optimizer"] == ("adam", 0.1, 0.5)
    assert "sgd" not in found.text  # the recipe's binding of the replaced component is idle, not an error


def test_dataclasses_stay_what_they_are(parse, toy):
    size = parse("STEPS=5", "FOLDER=a").arguments(toy.fit)["model"][1]
    assert type(size) is toy.Size
    assert size == toy.Size(width=4, depth=2)


def test_only_some_arguments(parse, toy):
    found = parse("STEPS=5", "FOLDER=a", "RATE=-1.0")
    assert found.arguments(toy.fit, only=["folder"]) == {"folder": "a"}


def test_paths_become_absolute(parse, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = parse("STEPS=5", "FOLDER=a/b", paths=["FOLDER", "NO_SUCH"])
    assert found.arguments(toy.fit)["folder"] == str(tmp_path / "a" / "b")
    assert str(tmp_path / "a" / "b") in found.text
    assert parse("STEPS=5", "FOLDER=gs://b/c", paths=["FOLDER"]).arguments(toy.fit)["folder"] == "gs://b/c"


# What is wrong ---------------------------------------------------------------------------------------------


def test_unknown_macro_on_the_command_line(parse):
    with pytest.raises(ValueError, match=r"command line: nothing uses STPES\. Did you mean STEPS\?"):
        parse("STPES=5", "FOLDER=a")


def test_unknown_macro_in_a_file(parse):
    fails(
        parse,
        match=r"wrong.gin:2: nothing uses RATES\. Did you mean RATE",
        files=("base.gin", "wrong.gin"),
        texts={"wrong.gin": "# comment\nRATES = 1.0"},
    )


def test_binding_of_a_component_that_nothing_calls(parse):
    fails(parse, "toy.adam.b1=0.5", match="nothing uses .*adam.b1")


def test_binding_of_a_replaced_component_on_the_command_line(parse):
    replaced = ("toy.fit.optimizer=@toy.adam()", "toy.adam.learning_rate=1.0", "toy.sgd.momentum=0.0")
    fails(parse, *replaced, match="nothing uses .*sgd.momentum")


@pytest.mark.parametrize(
    ("binding", "match"),
    [
        ("toy.sgd.momentun=0.5", "argument of toy.sgd: 'momentun'. Did you mean 'momentum'"),
        ("toy.sdg.momentum=0.5", "Unknown gin name 'toy.sdg'. Did you mean 'toy.sgd'"),
        ("toy.fit.optimizer=@toy.adma()", "Unknown gin name 'toy.adma'. Did you mean 'toy.adam'"),
        ("RATE=%RATTE", "RATTE is never set. Did you mean %RATE"),
        ("STEPS", "expected NAME=VALUE"),
    ],
)
def test_wrong_names_get_the_nearest_right_one(parse, binding, match):
    fails(parse, binding, match=match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("toy.Size.wdth = 3", r"wrong.gin:4: Unknown argument of toy.Size: 'wdth'. Did you mean 'width'"),
        ("toy.Size.width = ", r"wrong.gin:4: "),
        ("import no_such_module", r"wrong.gin:4: No module named 'no_such_module'"),
        ("include 'bse.gin'", r"wrong.gin:4: No gin file 'bse.gin'"),
    ],
)
def test_errors_name_file_and_line(parse, text, match):
    wrong = f"from __gin__ import dynamic_registration\nimport toy_run as toy\ninclude 'base.gin'\n{text}\n"
    fails(parse, match=match, files=("wrong.gin",), texts={"wrong.gin": wrong})


def test_required_values_are_listed_together(parse):
    with pytest.raises(ValueError, match=r"(?s)STEPS is required: .*--gin.STEPS=.*FOLDER is required"):
        parse("RATE=0.2")


def test_defaults_fill_required_values_only(parse, toy):
    found = parse("FOLDER=a", defaults={"STEPS": 7, "RATE": 5.0}).arguments(toy.fit)
    assert (found["steps"], found["optimizer"][1]) == (7, 0.1)


def test_missing_argument_names_who_calls_it(parse):
    fails(
        parse,
        "toy.fit.optimizer=@toy.adam()",
        match=r"adam.learning_rate is not set \(called by \S+fit.optimizer\)",
    )


def test_errors_of_components_name_the_component(parse, toy):
    with pytest.raises(
        ValueError, match=r"^optimizer: learning_rate must be positive, got -1.0\n  \(while building sgd\)"
    ):
        parse("STEPS=5", "FOLDER=a", "RATE=-1.0").arguments(toy.fit)


def test_unknown_recipe_offers_shipped_ones(parse):
    with pytest.raises(ValueError, match=r"Did you mean runs/pretrain.gin\?"):
        parse(files=("pretrian.gin",))


# What is saved ---------------------------------------------------------------------------------------------


def test_saved_text_gives_the_same_configuration(parse, toy):
    first = parse("STEPS=5", "FOLDER=a", "toy.sgd.momentum=0.5")
    arguments = first.arguments(toy.fit)
    again = parse(files=("saved.gin",), texts={"saved.gin": first.text})
    arguments["log_every"] = 50  # defaults are saved as well
    assert again.arguments(toy.fit) == arguments
    assert again.text == first.text
    moved = parse("FOLDER=b", files=("saved.gin",))
    assert moved.arguments(toy.fit) == {**arguments, "folder": "b"}
    assert config.differences(first.text, moved.text) == {"FOLDER": ("'a'", "'b'")}


def test_saved_text_holds_defaults(parse):
    # A later version with other defaults still repeats the run.
    text = parse("STEPS=5", "FOLDER=a").text
    assert re.search(r"sgd\.momentum = 0\.9", text)
    assert re.search(r"fit\.log_every = 50", text)
    assert "config_text" not in text


def test_include_is_found_beside_the_including_file(parse, toy, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "part.gin").write_text("RATE = 0.25\n")
    (tmp_path / "deep" / "all.gin").write_text("include 'base.gin'\ninclude 'part.gin'\n")
    assert parse("STEPS=5", "FOLDER=a", files=("deep/all.gin",)).arguments(toy.fit)["optimizer"][1] == 0.25
