"""Studies end to end: plan, run with workers that die, status, report, on a small synthetic cache."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_cache

from mtjax import checkpoint
from mtjax.launch import main

RECIPE = """
# A study of five small tasks.
from __gin__ import dynamic_registration
from mtjax import studies
from mtjax import train
from mtjax.data import pipeline
from mtjax.mixing import rates
from mtjax.models import t5
include 'runs/pretrain.gin'
MIXTURE_OR_TASK_NAME = 'small'
TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 12}
TRAIN_STEPS = 24
BATCH_SIZE = 4
LOG_PERIOD = 3
EVAL_PERIOD = 0
CHECKPOINT_PERIOD = 4
KEEP_CHECKPOINTS = 1
RATE_GROUPS = {'supervised': None}
RATE_WEIGHTS = {'supervised': 1.0}
train.fit.model = @t5.t5()
t5.t5.config = @t5.T5Config()
t5.T5Config:
    vocab_size = 384
    emb_dim = 16
    num_heads = 2
    head_dim = 8
    mlp_dim = 32
    num_encoder_layers = 1
    num_decoder_layers = 1
    dropout_rate = 0.1
pipeline.TrainData.rates = @rates.ratio()
rates.ratio:
    groups = %RATE_GROUPS
    weights = %RATE_WEIGHTS
studies.study:
    name = 'tiny'
    plan = @studies.scaling()
studies.scaling:
    counts = [0, 2]
    targets = ['goal/*']
    unsupervised = ['text']
    seeds = [(0, 0)]
    split = 'validation'
    fine_tune = {'TRAIN_STEPS': 6, 'rates.ratio.within': '@rates.equal()'}
"""
TASKS = {"text": "text", "one": "a", "two": "a", "three": "b", "goal_1": "goal", "goal_2": "goal"}


def write_cache(folder: pathlib.Path) -> pathlib.Path:
    """Cache six tasks of random ids; the first target has options to rank."""
    rng = np.random.default_rng(0)
    for name, family in TASKS.items():
        splits = {
            split: small_cache.random_examples(rng, n) for split, n in (("train", 30), ("validation", 6))
        }
        small_cache.write_task(folder, name, splits, family=family)
    path = folder / "goal_1" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "options": ["yes", "no"]}))
    small_cache.write_mixture(folder, "small", dict.fromkeys(TASKS, 1.0))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with a cache and the recipe."""
    folder = tmp_path_factory.mktemp("study")
    write_cache(folder / "cache")
    (folder / "tiny.gin").write_text(RECIPE)
    return folder


def command(world, action, *more, study_dir="study", recipe="tiny.gin"):
    """Return the command line of a study action."""
    return [
        *(sys.executable, "-m", "mtjax.launch.main", "study", action, str(world / recipe)),
        *(f"--study_dir={world / study_dir}", f"--cache_dir={world / 'cache'}", *more),
    ]


def do(*arguments, check=True, **options):
    done = subprocess.run(command(*arguments, **options), capture_output=True, text=True, timeout=900)
    if check and done.returncode:
        pytest.fail(f"{arguments} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def results(folder: pathlib.Path) -> dict:
    """Return what each run measured, by run name."""
    found = [json.loads(path.read_text()) for path in folder.glob("runs/*/results.json")]
    return {content["name"]: content["results"] for content in found}


def wait_for(condition, what, *, timeout=600):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def straight(world):
    """Run the study in one process, without interruption."""
    do(world, "run", study_dir="straight")
    return results(world / "straight")


def unfinished(folder: pathlib.Path) -> list[int]:
    """List the processes of first attempts that have a checkpoint and no results."""
    claims = folder.glob("runs/*/claim.1")
    found = [c for c in claims if checkpoint.checkpoint_steps(c.parent / "model")]
    return [json.loads(c.read_text())["pid"] for c in found if not (c.parent / "results.json").exists()]


def test_interrupted_workers_end_with_the_same_results(world, straight):
    folder, arguments = world / "killed", command(world, "run", "--workers=2", study_dir="killed")
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: unfinished(folder), "a checkpoint")
    victim = unfinished(folder)[0]
    os.kill(victim, signal.SIGKILL)
    output = parent.communicate(timeout=900)[0]
    assert parent.returncode == 0, output
    assert f"Worker {victim} was killed by SIGKILL" in output
    assert "goes on from step" in output
    assert results(folder) == straight
    assert len(straight) == 4


def test_finished_study_is_done_at_once(world, straight):
    before = sorted((world / "straight").rglob("*"))
    done = do(world, "run", study_dir="straight")
    assert "4 of 4 runs done" in done.stdout
    assert "starts" not in done.stdout
    assert sorted((world / "straight").rglob("*")) == before


def plan(world, capsys, *more, recipe="tiny.gin", action="plan", study_dir="planned"):
    """Run an action in this process; return its exit code and what it printed."""
    code = main.main(command(world, action, *more, recipe=recipe, study_dir=study_dir)[3:])
    return code, capsys.readouterr()


def test_plan_names_every_run_and_its_cost(world, capsys):
    code, said = plan(world, capsys, "--device=v5e", "--chips=4")
    assert code == 0
    assert re.search(r"tasks=2/subset=0/seed=0/fine_tuned .* tasks=2/subset=0/seed=0 ", said.out)
    assert "4 distinct runs, 8,640 positions" in said.out  # 2 x (24 + 6) steps x 4 rows x (24 + 12)
    assert "On 4 x v5e at 40% of the peak" in said.out
    assert "n-gram overlap" in said.out
    assert not (world / "planned").exists()  # planning writes nothing of a study


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gin.studies.scaling.targets=['goal_3']"], "Unknown target 'goal_3'. Did you mean 'goal_"),
        (["--gin.studies.scaling.counts=[0, 9]"], "A subset of 9 tasks cannot be drawn: 3 tasks are left"),
        (["--gin.t5.T5Config.vocab_size=128"], "Run 'tasks=0/seed=0': The model has vocab_size=128"),
        (["--gin.MESH={'data': 3}"], "Run 'tasks=0/seed=0': "),
        (
            ["--gin.studies.scaling.fine_tune={'TRIAN_STEPS': 2}"],
            "nothing uses TRIAN_STEPS. Did you mean TRAIN_STEPS",
        ),
        (["--gin.studies.study.unreported=['goal_*']"], "goal_1 is marked by ['goal_*']"),
        (["--device=v5x"], "Unknown device 'v5x'. Did you mean 'v5"),
    ],
)
def test_what_cannot_run_is_found_when_planning(world, capsys, more, message):
    code, said = plan(world, capsys, *more)
    assert code == 2
    assert message in said.err
    assert not (world / "planned").exists()


def test_another_study_of_the_name_is_refused(world, capsys, straight):
    code, said = plan(world, capsys, "--gin.TRAIN_STEPS=23", action="run", study_dir="straight")
    assert code == 2
    assert "holds another study named 'tiny': 4 runs have another recipe" in said.err
    assert results(world / "straight") == straight


def test_status_and_report_of_a_finished_study(world, capsys, straight):
    code, said = plan(world, capsys, action="status", study_dir="straight")
    assert code == 0 and "tiny: 4 done" in said.out
    code, said = plan(world, capsys, action="report", study_dir="straight")
    assert code == 0
    curves = (world / "straight" / "tiny" / "report" / "curves.csv").read_text()
    assert "bits per byte,goal,2,," in curves
    assert "no interval" in (world / "straight" / "tiny" / "report" / "differences.csv").read_text()
