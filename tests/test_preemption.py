"""SIGTERM in the middle of training and of an evaluation: saved, and the run goes on bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mtjax import checkpoint, optim, train
from mtjax.data import pipeline
from mtjax.launch import preemption
from mtjax.mixing import rates
from mtjax.models import t5
from tests import small_cache

CONFIG = t5.T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    for name, size in (("a", 30), ("b", 12)):
        splits = {split: small_cache.random_examples(rng, size) for split in ("train", "validation")}
        small_cache.write_task(directory, name, splits)
    small_cache.write_mixture(directory, "two", {"a": 1.0, "b": 1.0})
    return directory


def fit(cached, model_dir, should_stop, **options):
    """Train 12 steps with rates that watch the evaluations, after every third step, of several batches each."""
    watched = rates.exp3(metric="validation/task/{task}/loss", bounds=(0.0, 10.0))
    data = {"mixture": "two", "lengths": {"inputs": 32, "targets": 16}, "batch_size": 4, "cache_dirs": cached}
    evaluation = {"every": 3, "examples": 9, "decode": 3, "patience": 3}
    arguments = {
        "model_dir": str(model_dir),
        "model": t5.t5(CONFIG),
        "data": pipeline.TrainData(**data, rates=watched, prefetch=1, lag=3),
        "optimizer": optim.adafactor(0.03),
        "train_steps": 12,
        "log_every": 1,
        "observe_every": 2,
        "mesh": {"data": 1},
        "evaluation": train.Evaluation(**evaluation),
        "saving": train.Saving(every=3, keep_last=9),
        "should_stop": should_stop,
    }
    return train.fit(**(arguments | options))


def fit_with_signal(cached, model_dir, *, step, call):
    """Train with a real SIGTERM before the call-th question at a step; return whether that stopped it."""
    calls = []
    with preemption.notice() as notice:

        def asked(done):
            calls.append(done)
            if calls.count(step) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return notice.asked(done)

        try:
            fit(cached, model_dir, asked)
        except train.Stopped:
            assert calls[-1] == step and calls.count(step) == call, "it stopped later than asked"
            return True
        return False


def kept(model_dir):
    """Return what a run leaves, but for times: log lines, and each checkpoint's arrays, host state and metrics."""
    lines = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if "second" not in k and "waited" not in k} for line in lines]
    items = {}
    for step in checkpoint.checkpoint_steps(model_dir):
        for name in ("arrays/metadata", "host/metadata", "metrics/metrics"):
            file = model_dir / "checkpoints" / str(step) / name
            items[step, name] = json.loads(file.read_text()) if file.exists() else None
    return timeless, items


@pytest.mark.slow
def test_an_evaluation_is_cut_short_between_batches_and_made_when_the_run_goes_on(cached, tmp_path):
    calls = []
    fit(cached, tmp_path / "straight", lambda step: calls.append(step))
    decoding = calls.count(3) - 1
    # In the losses of the first evaluation; in its decoding when it is made; in a step; in the last evaluation.
    for step, call in ((3, 2), (3, decoding), (5, 1), (12, 3)):
        assert fit_with_signal(cached, tmp_path / "stopped", step=step, call=call), (step, call)
        assert checkpoint.checkpoint_steps(tmp_path / "stopped")[-1] == step
        assert not train.has_finished(str(tmp_path / "stopped"))
    fit(cached, tmp_path / "stopped", lambda step: False)
    assert train.has_finished(str(tmp_path / "stopped"))
    straight, stopped = kept(tmp_path / "straight"), kept(tmp_path / "stopped")
    assert stopped[0] == straight[0]
    assert {key: stopped[1][key] for key in straight[1]} == straight[1]
    best = [
        checkpoint.Checkpointer(tmp_path / run, best_metric="validation/loss").best()
        for run in ("straight", "stopped")
    ]
    assert best[0] == best[1] is not None


def test_a_save_that_takes_longer_than_the_grace_time_is_given_up(tmp_path):
    code = """
        import os, signal, time
        from mtjax.launch import preemption
        with preemption.notice(grace_time=0.3) as notice:
            assert not notice.asked(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.asked(2)
            time.sleep(60)  # a save to a slow disk
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == preemption.EXIT_CODE == 75
    assert "--grace_time=0.3 s" in done.stderr


def test_a_save_within_the_grace_time_counts(cached, tmp_path):
    with preemption.notice(grace_time=1000.0) as notice:

        def asked(done):
            if done == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return notice.asked(done)

        with pytest.raises(train.Stopped, match="Stopped at step 2, which is saved"):
            fit(cached, tmp_path / "run", asked)
    assert pathlib.Path(tmp_path / "run/checkpoints/2").is_dir()
