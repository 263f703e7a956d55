"""Studies end to end: plan, run with workers that die, status, report, on a small synthetic cache."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_cache

from mtjax import checkpoint

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
    done = subprocess.run(command(*arguments, **options), capture_output=True, text=True, timeout=400)
    if check and done.returncode:
        pytest.fail(f"{arguments} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def results(folder: pathlib.Path) -> dict:
    """Return what each run measured, by run name."""
    found = [json.loads(path.read_text()) for path in folder.glob("runs/*/results.json")]
    return {content["name"]: content["results"] for content in found}


def wait_for(condition, what, *, timeout=300):
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
    output = parent.communicate(timeout=400)[0]
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
