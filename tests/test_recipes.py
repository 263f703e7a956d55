"""Every shipped recipe parses, is used in full, and builds the abstract state of its run."""

import re

import jax
import pytest

from mtjax import studies, train, tree
from mtjax.launch import config, prepare
from mtjax.launch.flags import RECIPES

MINI = "models/t5_1_1_mini.gin"
PRETRAIN = "runs/pretrain.gin"
# What a user has to say, and nothing more.
REQUIRED = {
    "MIXTURE_OR_TASK_NAME": "some_mixture",
    "MODEL_DIR": "somewhere",
    "TRAIN_STEPS": 1000,
    "CACHE_DIRS": ["cache"],
    "INITIAL_CHECKPOINT_PATH": "pretrained",
    "REFERENCE_RUN": "reference",
    "NUM_CLASSES": (2, 3),
    "NUM_TASKS": 2,
}
TASKS = train.TaskTable(("a", "b"), ("first", "second"))


def files(recipe: str) -> list[str]:
    """Complete a recipe to a run."""
    kind = recipe.partition("/")[0]
    if kind == "models":
        return [recipe, PRETRAIN]
    text = (RECIPES / recipe).read_text()
    if kind == "runs":
        return [recipe] if "train.fit.model = " in text else [MINI, recipe]
    if kind == "studies":
        return [MINI, recipe] if recipe == "studies/base.gin" else [recipe]
    return [MINI, PRETRAIN, recipe]


def arguments(recipe: str) -> dict:
    parsed = config.parse(
        files(recipe), roots=[prepare.mixture, train.fit], also=[studies.study], defaults=REQUIRED
    )
    return parsed.arguments(train.fit)


def test_there_are_recipes_of_every_kind():
    kinds = {recipe.partition("/")[0] for recipe in config.shipped_recipes()}
    assert {"models", "runs", "balance", "peft", "mixtures", "studies"} <= kinds


@pytest.mark.parametrize("recipe", config.shipped_recipes())
def test_recipe_builds_its_state(recipe):
    found = arguments(recipe)
    program = train.prepare(**train.program_arguments(found), tasks=TASKS)
    parameters = tree.num_parameters(jax.eval_shape(program.merge, program.abstract))
    text = (RECIPES / recipe).read_text()
    assert text.startswith("# "), "a recipe opens with what it is"
    if recipe.startswith("models/"):
        stated = re.match(r"#.*: (\d+(?:\.\d)?)([MB]) parameters", text)
        unit = {"M": 1e6, "B": 1e9}[stated[2]]
        assert f"{parameters / unit:.{1 if stated[2] == 'B' else 0}f}" == stated[1]
    if "studies.study:" in text:
        assert "mtjax study run " in text
        assert "Hardware: " in text
        assert "Time: " in text
    if recipe.startswith("runs/"):
        assert "mtjax train --gin_file=" in text
        assert "Hardware: " in text
        assert "Time: " in text


@pytest.mark.parametrize("recipe", config.shipped_recipes())
def test_recipe_is_used_in_full(recipe, monkeypatch, tmp_path):
    # Elsewhere than at their home, recipes are checked as a user's files are.
    monkeypatch.setattr(config, "RECIPES", tmp_path / "nowhere")
    options = {
        "roots": [prepare.mixture, train.fit],
        "also": [studies.study],
        "defaults": REQUIRED,
        "search_paths": [str(RECIPES)],
    }
    config.parse(files(recipe), **options)
    (tmp_path / "wrong.gin").write_text("TRIAN_STEPS = 5")
    with pytest.raises(ValueError, match=r"wrong.gin:1: nothing uses TRIAN_STEPS. Did you mean TRAIN_STEPS"):
        config.parse([*files(recipe), str(tmp_path / "wrong.gin")], **options)


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [("models/t5_1_1_xxl.gin", (24, 4096, 10240)), ("models/t5_1_0_xxl.gin", (24, 1024, 65536))],
)
def test_the_largest_models_have_their_published_shapes(recipe, kernel):
    shapes = tree.flatten(jax.eval_shape(arguments(recipe)["model"].init, jax.random.key(0)))
    name = next(path for path in shapes if re.fullmatch(r"encoder/layers/mlp/wi(_0)?/kernel", path))
    assert shapes[name].shape == kernel
    assert ("decoder/logits_dense/kernel" in shapes) == ("1_1" in recipe)


def test_runs_say_what_they_need():
    with pytest.raises(
        ValueError, match=r"(?s)MIXTURE_OR_TASK_NAME is required.*TRAIN_STEPS.*MODEL_DIR"
    ) as error:
        config.parse([MINI, PRETRAIN], roots=[prepare.mixture, train.fit], defaults={"CACHE_DIRS": ["c"]})
    assert "INITIAL_CHECKPOINT_PATH" not in str(error.value)
    with pytest.raises(ValueError, match=r"train\.fit\.model is not set"):
        config.parse([PRETRAIN], roots=[prepare.mixture, train.fit], defaults=REQUIRED)


def test_finetuning_differs_from_pretraining():
    parsed = [
        config.parse([MINI, run], roots=[prepare.mixture, train.fit], defaults=REQUIRED).text
        for run in (PRETRAIN, "runs/finetune.gin")
    ]
    changed = config.differences(*parsed)
    assert changed["DROPOUT_RATE"] == ("0.0", "0.1")
    assert changed["INITIAL_CHECKPOINT_PATH"] == ("None", "'pretrained'")
    assert changed["optim.learning_rate.factors"] == ("'constant * rsqrt_decay'", "'constant'")
