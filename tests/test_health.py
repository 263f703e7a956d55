"""What the losses of steps say: spikes, skipped steps, the same after a resume."""

import json

import numpy as np
import pytest

from mtjax import health
from mtjax.losses import TaskSums
from mtjax.program import StepMetrics, TaskTable

TASKS = TaskTable(("a", "b"), ("x", "y"))


class Said:
    """A writer that keeps what it is told."""

    def __init__(self):
        self.texts = []

    def text(self, message):
        self.texts.append(message)

    def scalars(self, step, values):
        del step, values

    def close(self):
        pass


def step(loss, *, worse=0.0):
    """Return the metrics of a step of ten tokens, five of each task; b's loss is higher by `worse`."""
    per_task = np.array([5.0 * loss - worse, 5.0 * loss + worse])
    zeros = np.zeros(2)
    tasks = TaskSums(per_task, zeros, zeros, np.array([5.0, 5.0]))
    total = TaskSums(*(np.sum(x) for x in tasks))
    is_finite = np.isfinite(loss)
    return StepMetrics(tasks, total, np.float32(1), np.float32(1), is_finite, {}, {}, {})


def losses(count):
    return (2.0 + 0.1 * np.random.default_rng(0).standard_normal(count)).tolist()


def test_a_spike_is_marked_once_with_its_worst_task():
    judge, said = health.Health(TASKS), Said()
    for done, loss in enumerate([*losses(200), 9.0, *losses(50)], 1):
        for _ in range(2):  # the loop may look at a step twice
            judge.look(done, step(loss, worse=1.0), said)
    assert len(said.texts) == 1
    assert "Step 201: the loss spikes to 9" in said.texts[0]
    assert "highest in b, a" in said.texts[0]
    assert judge.scalars() == {"train/skipped_steps": 0.0, "train/loss_spikes": 1.0}


def test_no_spike_while_the_mean_is_unknown():
    judge, said = health.Health(TASKS), Said()
    for done, loss in enumerate([10.0, 8.0, 30.0, 7.0], 1):
        judge.look(done, step(loss), said)
    assert not said.texts


def test_skipped_steps_are_counted_and_limited_and_the_mean_is_untouched():
    judge, said = health.Health(TASKS, max_skipped=1), Said()
    judge.look(1, step(2.0), said)
    judge.look(2, step(np.nan), said)
    assert "Step 1: " in said.texts[0]
    assert "['a', 'b']" in said.texts[0]
    with pytest.raises(health.NonFiniteError, match="1 such steps are allowed"):
        judge.look(3, step(np.inf), said)
    assert judge.state()["mean"] == 2.0


def test_restored_it_judges_as_if_never_stopped():
    series = [*losses(150), 9.0, *losses(20), np.nan, *losses(30)]
    straight, stopped, said = health.Health(TASKS, max_skipped=1), health.Health(TASKS, max_skipped=1), Said()
    for done, loss in enumerate(series, 1):
        straight.look(done, step(loss), said)
        stopped.look(done, step(loss), said)
        state = json.loads(json.dumps(stopped.state()))
        stopped = health.Health(TASKS, max_skipped=1)
        stopped.restore(state)
    assert stopped.state() == straight.state()
    assert straight.scalars() == {"train/skipped_steps": 1.0, "train/loss_spikes": 1.0}
