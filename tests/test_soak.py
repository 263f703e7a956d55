"""SIGKILL at random steps: every resume is bit for bit the straight run. `make soak` kills twenty times of each kind.

Real processes of the real command; the environment variable MTJAX_KILLS says how often each run is killed (1).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import small_cache

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
KILLS = int(os.environ.get("MTJAX_KILLS", "1"))
STEPS = 60 + 40 * KILLS  # longer than the kills, so that each comes at another place
RECIPE = f"""
from __gin__ import dynamic_registration
from mtjax import train
from mtjax.data import pipeline
from mtjax.mixing import rates
from mtjax.models import t5
include 'runs/pretrain.gin'
MIXTURE_OR_TASK_NAME = 'two'
TASK_FEATURE_LENGTHS = {{'inputs': 24, 'targets': 12}}
TRAIN_STEPS = {STEPS}
BATCH_SIZE = 4
WARMUP_STEPS = 10
LEARNING_RATE = 0.05
LOG_PERIOD = 1
EVAL_PERIOD = 25
EVAL_EXAMPLES = 4
CHECKPOINT_PERIOD = 10
DROPOUT_RATE = 0.1
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
    dropout_rate = %DROPOUT_RATE
"""
KINDS = {
    "dense": "",
    "mixture_of_experts": """
from mtjax.models import moe
from mtjax.models import routers
t5.T5Config.moe = @moe.MoeConfig()
moe.MoeConfig:
    num_experts = 4
    every = 1
    encoder_router = @routers.Switch()
    decoder_router = @routers.Switch()
    dispatch = 'capacity'
""",
    "microbatches_and_changing_rates": """
MICROBATCHES = 2
pipeline.TrainData.rates = @rates.exp3()
rates.exp3:
    metric = 'task/{task}/loss'
    reward = 'value'
    bounds = (0.0, 10.0)
    exploration = 0.1
train.fit.observe_every = 7
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("soak"), np.random.default_rng(0)
    for name, count in (("a", 60), ("b", 25)):
        splits = {split: small_cache.random_examples(rng, count) for split in ("train", "validation")}
        small_cache.write_task(folder / "cache", name, splits)
    small_cache.write_mixture(folder / "cache", "two", {"a": 2.0, "b": 1.0})
    return folder


def start(folder, kind, model):
    command = [
        sys.executable,
        "-m",
        "mtjax.launch.main",
        "train",
        f"--gin_file={kind}.gin",
        "--cache_dir=cache",
    ]
    with open(folder / f"{model}.txt", "a") as output:
        return subprocess.Popen(
            [*command, f"--gin.MODEL_DIR={model}"], cwd=folder, stdout=output, stderr=output
        )


def last_step(folder, model):
    log = folder / model / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def kill_at(folder, kind, model, step, delay):
    """Start or resume, wait until the log has reached a step, and send SIGKILL `delay` seconds later."""
    process = start(folder, kind, model)
    end = time.monotonic() + 600
    while process.poll() is None and last_step(folder, model) < step and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def arrays(folder, model):
    """Return {(step, array): sum of its bits} of the checkpoints kept."""
    found = {}
    for path in (folder / model / "checkpoints").iterdir():
        for name, x in json.loads((path / "arrays/metadata").read_text())["value"].items():
            found[int(path.name), name] = x["bits"]
    return found


def scalars(folder, model):
    """Return {(step, name): value} of the log, without times."""
    lines = [json.loads(line) for line in (folder / model / "metrics.jsonl").read_text().splitlines()]
    assert len({(line["step"], "validation/loss" in line) for line in lines}) == len(lines), "a step twice"
    return {
        (line["step"], name): value for line in lines for name, value in line.items() if "second" not in name
    }


def differing(first, second):
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_steps_a_run_becomes_the_straight_one(folder, kind):
    (folder / f"{kind}.gin").write_text(RECIPE + KINDS[kind])
    straight, killed = f"{kind}_straight", f"{kind}_killed"
    assert start(folder, kind, straight).wait() == 0, (folder / f"{straight}.txt").read_text()
    random_of = random.Random(kind)
    places = sorted(random_of.sample(range(2, STEPS - 20), KILLS))
    kills = 0
    for place in places:
        code = kill_at(folder, kind, killed, place, random_of.uniform(0, 0.05))
        assert code == -signal.SIGKILL, (folder / f"{killed}.txt").read_text()
        kills += 1
    assert start(folder, kind, killed).wait() == 0, (folder / f"{killed}.txt").read_text()
    logs = scalars(folder, straight), scalars(folder, killed)
    states = arrays(folder, straight), arrays(folder, killed)
    wrong = differing(*logs), differing(*states)
    print(
        f"{kind}: {kills} kills at steps {places}, {kills} resumes; of {len(logs[0])} scalars {len(wrong[0])} differ, "
        f"of {len(states[0])} arrays {len(wrong[1])} differ"
    )
    assert wrong == ([], [])
    assert len({states[0][key] for key in states[0] if key[1].startswith("params/")}) > 10, (
        "nothing to compare"
    )
