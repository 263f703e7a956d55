"""Rates that change while training: logged, observed under the log's names, and resumed bit for bit."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_cache

from mtjax import checkpoint, feedback, optim, train
from mtjax.data import pipeline
from mtjax.losses import TaskSums
from mtjax.mixing import rates
from mtjax.models import t5
from mtjax.program import StepMetrics, TaskTable

CONFIG = t5.T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
NAMES = ("long", "short", "tiny")
REFERENCE = {"long": 5.5, "short": 4.0, "tiny": 5.9}
VALIDATION = "validation/task/{task}/loss"


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    for name, size in zip(NAMES, (40, 20, 8), strict=True):
        targets = (6, 8) if name == "long" else (1, 3)
        splits = {"train": small_cache.random_examples(rng, size, targets=targets)}
        if name != "tiny":
            splits["validation"] = small_cache.random_examples(rng, 4, targets=targets)
        small_cache.write_task(directory, name, splits)
    small_cache.write_mixture(directory, "three", dict.fromkeys(NAMES, 1.0))
    return directory


@pytest.fixture
def fit(cached, tmp_path):
    def call(ours, name="run", **options):
        data = {
            "mixture": "three",
            "lengths": {"inputs": 32, "targets": 16},
            "batch_size": 4,
            "cache_dirs": cached,
            "rates": ours,
            "prefetch": 1,
            "lag": 3,
        } | options.pop("data", {})
        arguments = {
            "model_dir": str(tmp_path / name),
            "model": t5.t5(CONFIG),
            "data": pipeline.TrainData(**data),
            "optimizer": optim.adafactor(0.03),
            "train_steps": 14,
            "log_every": 4,
            "observe_every": 3,
            "mesh": {"data": 1},
            "evaluation": train.Evaluation(every=5, examples=4),
            "saving": train.Saving(every=5, keep_last=9),
        }
        train.fit(**(arguments | options))
        return tmp_path / name

    return call


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_after(run, step, into):
    """Leave what a process leaves that is killed after it saved `step`, in a folder of its own."""
    shutil.copytree(run, into)
    for later in checkpoint.checkpoint_steps(str(into)):
        if later > step:
            shutil.rmtree(into / "checkpoints" / str(later))
    return into


def arrays(run, step):
    abstract = jax.eval_shape(t5.t5(CONFIG).init, jax.random.key(0))
    return checkpoint.restore_parameters(str(run / "checkpoints" / str(step)), abstract)


def host(run, step):
    """The part of a checkpoint that is not arrays: position, rates, open windows."""
    return checkpoint._read_json(checkpoint.find(run / "checkpoints" / str(step)), "host")


def of_the_run(line):
    """A line without what is of the process: times, and how full its rows were."""
    of_the_process = ("per_second", "waited", "data/packing", "data/fitting")
    return {name: x for name, x in line.items() if not any(part in name for part in of_the_process)}


def closed_loop():
    """Every part that observes: training losses from the start, validation losses from step 9 on."""
    gaps = rates.gap_proportional(targets=REFERENCE, metric=VALIDATION, exploration=0.3)
    return rates.ratio(
        {"large": 4.0, "small": 1.0},
        {"large": ["long", "short"], "small": None},
        within={
            "large": rates.staged([(0, rates.excess_loss(reference=REFERENCE)), (9, gaps)]),
            "small": rates.exp3(),
        },
    )


def staged():
    warm = rates.annealed(first=1.0, last=5.0, steps=4, every=2)
    return rates.staged([(0, warm), (6, rates.explicit({"tiny": 1.0}, default=0.0)), (8, rates.equal())])


@pytest.mark.parametrize(("make", "kills"), [(closed_loop, (5, 10)), (staged, (5,))])
def test_a_killed_run_goes_on_bit_for_bit(make, kills, fit, tmp_path):
    # Saved at 5 and 10: between logs (4, 8, 12), observations (3, 6, ...) and, for the rates, inside the lag.
    straight = fit(make(), "straight")
    for step in kills:
        resumed = kill_after(straight, step, tmp_path / f"killed_{step}")
        fit(make(), resumed.name)
        jax.tree.map(np.testing.assert_array_equal, arrays(straight, 14), arrays(resumed, 14))
        ours, theirs = host(resumed, 14), host(straight, 14)
        assert ours["data"] == theirs["data"] and ours["feedback"] == theirs["feedback"]
        for a, b in zip(lines(straight), lines(resumed), strict=True):
            assert of_the_run(a) == of_the_run(b)
    logged = [line for line in lines(straight) if "data/rate/tiny" in line]
    assert [line["step"] for line in logged] == [4, 8, 12, 14]
    for line in logged:
        assert sum(line[f"data/rate/{name}"] for name in NAMES) == pytest.approx(1.0)
    shares = [[line[f"data/rate/{name}"] for name in NAMES] for line in logged]
    if make is staged:
        assert len(host(straight, 10)["data"]["rates"]) == 1  # nothing is observed
        np.testing.assert_allclose(
            shares[0], np.array([40, 20, 8]) ** 0.2 / sum(np.array([40, 20, 8]) ** 0.2)
        )
        np.testing.assert_allclose(shares[1:], 1 / 3)
    else:
        np.testing.assert_allclose([line["data/rate/tiny"] for line in logged], 0.2)
        # Excess losses from step 6 on (3 and the lag), the second stage at 9, its gaps from step 13 on.
        assert len({shares[0][0], shares[1][0], shares[3][0]}) == 3 and shares[2][0] == shares[0][0]


def test_a_task_is_drawn_only_in_its_stage(fit):
    run = fit(
        rates.staged([(0, only("long")), (4, only("tiny"))]),
        train_steps=8,
        data={"packing": False},
        evaluation=None,
    )
    first, second = (line for line in lines(run) if "train/loss" in line)
    assert "task/tiny/loss" not in first and "task/long/loss" not in second
    assert first["data/rate/tiny"] == 1.0  # of the next batch


def only(name):
    return rates.explicit({name: 1.0}, default=0.0)


def test_what_rates_see_is_what_is_logged(fit):
    seen = []

    def observe(state, metrics):
        seen.append(dict(metrics))
        return state

    fixed = rates.equal()
    run = fit(
        fixed._replace(observe=observe, watched=lambda state: ["task/long/loss", "validation/loss"]),
        train_steps=8,
        log_every=4,
        observe_every=4,
        evaluation=train.Evaluation(every=4, examples=2),
    )
    logged = {("train/loss" in line, line["step"]): line for line in lines(run)}
    assert [("train/loss" in line, line["step"]) for line in seen] == [
        (True, 4),
        (False, 4),
        (True, 8),
        (False, 8),
    ]
    for line in seen:
        there = logged["train/loss" in line, line["step"]]
        assert {name: there[name] for name in line} == line
        assert any(name.endswith("task/long/loss") for name in line)
    # The run is a reference for others, and its mean shares are rates.
    last = rates.excess_loss(reference=run).init([40, 20, 8], NAMES)["learnt"]["reference"]
    assert last == [logged[True, 8][f"task/{name}/loss"] for name in NAMES]
    mean = rates.logged(run)
    np.testing.assert_allclose(mean.rates(mean.init([40, 20, 8], NAMES), 0), 1 / 3)


@pytest.mark.parametrize(
    ("ours", "options", "message"),
    [
        (lambda: rates.exp3(metric="task/{task}/los"), {}, "rates wait for 'task/long/los'.*Did you mean"),
        (lambda: rates.exp3(metric="validation/task/{task}/rouge"), {}, "'validation/task/long/rouge'"),
        (lambda: rates.exp3(metric=VALIDATION), {}, "rates wait for 'validation/task/tiny/loss'"),
        (lambda: rates.exp3(metric=VALIDATION), {"evaluation": None}, "nothing is evaluated"),
        (rates.exp3, {"data": {"prefetch": 2}}, "lag 3 is too short.*at least 4"),
        (rates.exp3, {"observe_every": 0}, "observe_every must be at least 1"),
        (lambda: rates.excess_loss(reference={"long": 1.0}), {}, "'short'"),
        (lambda: rates.explicit({"lang": 1.0}), {}, "Did you mean 'long'"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(ours, options, message, fit, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(ours(), **options)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_split_that_no_task_has_is_named(fit):
    with pytest.raises(ValueError, match="None of the 3 tasks has a split 'test'"):
        fit(rates.exp3(), evaluation=train.Evaluation(every=5, split="test"))


class _Recorder:
    """A stream that writes down what it is shown."""

    watched = ("train/loss",)

    def __init__(self):
        self.seen = []

    def observe(self, step, metrics):
        self.seen.append((step, metrics["train/loss"]))


def _metrics(loss):
    per_task = TaskSums(*np.array([[loss, 0.0], [0, 0], [0, 0], [1.0, 0.0]], np.float32))
    total = TaskSums(*np.array([loss, 0, 0, 1.0], np.float32))
    return StepMetrics(per_task, total, *np.zeros(2, np.float32), np.True_, {}, {}, {})


@pytest.mark.parametrize("stop", range(1, 7))
def test_feedback_looks_one_step_back_and_keeps_an_open_window(stop):
    table = TaskTable(("a", "b"), ("f", "f"))
    losses = [0.1, 0.7, 1e8, 3.3, 1e-8, 5.1, 2.2]

    def feed(told, steps):
        seen = []
        for step in steps:
            told.add(step + 1, _metrics(losses[step]))
            seen.append(len(told.stream.seen))
        return seen

    straight = feedback.Feedback(_Recorder(), table, every=3)
    assert feed(straight, range(7)) == [0, 0, 0, 1, 1, 1, 2]  # shown when the next step is under way
    one, two = (feedback.Feedback(_Recorder(), table, every=3) for _ in range(2))
    feed(one, range(stop))
    two.restore(json.loads(json.dumps(one.state())))
    feed(two, range(stop, 7))
    assert one.stream.seen + two.stream.seen == straight.stream.seen
    assert [step for step, _ in straight.stream.seen] == [3, 6]
