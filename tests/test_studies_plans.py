"""Plans of studies (counts, nesting, equal data and compute) and what they read, by numbers computed by hand."""

import itertools
import math

import numpy as np
import pytest

from mtjax.mixing import rates
from mtjax.studies import (
    curation,
    efficiency,
    mixing,
    ratio,
    reading,
    runs,
    scaling,
    stages,
    statistics,
    transfer,
)
from mtjax.studies.runs import RATE_GROUPS, RATE_WEIGHTS, Run, Targets, Task

TASKS = [
    *(
        Task(f"{family}_{i}", family, 10 * (i + 1))
        for family in ("qa", "nli", "parsing", "goal")
        for i in range(4)
    ),
    Task("bb_x", "qa", 5),
    Task("text", "lm", 1000),
]
NAMES = [task.name for task in TASKS]
COMMON = {"targets": ["goal/*"], "unsupervised": ["text"], "exclude": ["bb_*"]}


def drawn(run: Run) -> dict[str, float]:
    """Return the shares that a run's overrides draw, by the rates that recipes bind."""
    mixed = rates.ratio(run.overrides[RATE_WEIGHTS], run.overrides[RATE_GROUPS])
    state = mixed.init([float(task.num_examples) for task in TASKS], NAMES)
    return {n: s for n, s in zip(NAMES, rates.shares(mixed.rates(state, 0), NAMES), strict=True) if s > 0}


def line(
    task: str, bits: float, score: float | None = None, *, split: str = "test", family: str | None = None
):
    scores = {} if score is None else {"accuracy": score}
    family = family or next(t.family for t in TASKS if t.name == task)
    return {
        **{"task": task, "family": family, "split": split, "scores": scores, "bits_per_byte": bits},
        **{"loss": bits, "num_examples": 10, "num_tokens": 20},
    }


def planned(plan) -> list[Run]:
    found = plan.runs(TASKS)
    runs.check(found, TASKS)
    return found


def rows(table) -> list[dict]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_scaling_nests_and_holds_out():
    found = planned(scaling(counts=[0, 3, 7, "all"], seeds=[(0, 0), (1, 1)], **COMMON))
    assert len(found) == 8
    for seed in (0, 1):
        mine = [run for run in found if run.tags["seed"] == seed]
        assert [run.tags["tasks"] for run in mine] == [0, 3, 7, 12]
        sets = [set(drawn(run)) - {"text"} for run in mine]
        assert [len(s) for s in sets] == [0, 3, 7, 12]
        assert all(small < large for small, large in itertools.pairwise(sets))
        assert not any(name.startswith(("goal", "bb_")) for s in sets for name in s)
        assert drawn(mine[0]) == {"text": 1.0}
        assert drawn(mine[1])["text"] == pytest.approx(2 / 3)
    assert drawn(found[1]).keys() != drawn(found[5]).keys()  # another subset
    assert found[0].targets[0].tasks == ("goal_0", "goal_1", "goal_2", "goal_3")
    # Without any or with all tasks the subset's seed means nothing: such runs are planned once.
    assert len(planned(scaling(counts=[0, 3, "all"], seeds=[(0, 0), (1, 0)], **COMMON))) == 4


def test_scaling_fine_tunes_on_the_targets_alone():
    found = planned(scaling(counts=[0, 3], seeds=[(0, 0)], fine_tune={"TRAIN_STEPS": 5}, **COMMON))
    children = [run for run in found if run.start]
    assert [run.start for run in children] == ["tasks=0/seed=0", "tasks=3/subset=0/seed=0"]
    assert all(set(drawn(run)) == {f"goal_{i}" for i in range(4)} for run in children)
    assert all(not run.targets for run in found if not run.start)
    assert children[0].overrides["TRAIN_STEPS"] == 5 and children[0].targets[0].tuned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": [0, 13]}, "A subset of 13 tasks cannot be drawn: 12 tasks are left"),
        ({"counts": [3, 2]}, "nest only in ascending order"),
        (
            {"subsets": [["qa/*"], ["nli/*"]]},
            "do not nest: 'qa_0' .4 such. is in number 1 but not in number 2",
        ),
        ({"counts": [0], "targets": ["gaol_1"]}, "Unknown target 'gaol_1'. Did you mean 'goal_1'"),
        ({}, "either counts or subsets"),
    ],
)
def test_scaling_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        scaling(**{**COMMON, **arguments}).runs(TASKS)


def test_ratio_draws_what_it_says():
    found = planned(ratio(ratios=[0, 0.5, 4, "unsupervised only"], seeds=[0], **COMMON))
    shares = [drawn(run).get("text", 0) for run in found]
    assert shares == pytest.approx([0, 1 / 3, 4 / 5, 1])
    with pytest.raises(ValueError, match="different and not negative"):
        ratio(ratios=[1, -1], **COMMON)


def test_transfer_has_equal_data_and_equal_compute():
    found = planned(transfer(families=["qa", "nli", "parsing"], steps=20, exclude=["bb_*"]))
    assert len(found) == 3 * 2 + 3
    pair = next(run for run in found if run.tags["families"] == ["qa", "nli"])
    half, full = (
        next(r for r in found if r.tags["families"] == ["qa"] and r.tags["budget"] == b)
        for b in ("equal data", "equal compute")
    )
    steps = [run.overrides["TRAIN_STEPS"] for run in (pair, half, full)]
    assert steps == [20, 10, 20]
    share = sum(s for name, s in drawn(pair).items() if name.startswith("qa"))
    assert share * steps[0] == pytest.approx(
        steps[1]
    )  # as many examples of the family as alone in half the steps
    assert drawn(half) == drawn(full) and set(drawn(full)) == {f"qa_{i}" for i in range(4)}
    assert not pair.targets[0].held_out
    with pytest.raises(ValueError, match=r"share the tasks .'qa_1'"):
        transfer(families={"a": ["qa/*"], "b": ["qa_1"]}, steps=4).runs(TASKS)
    with pytest.raises(ValueError, match="must be even"):
        transfer(families=["qa", "nli"], steps=5)


def test_transfer_reads_gains_by_hand():
    plan = transfer(families={"a": ["qa_0"], "b": ["nli_0"]}, steps=2)
    bits = {
        "a/steps=1": [3.0],
        "a/steps=2": [2.0],
        "b/steps=1": [5.0],
        "b/steps=2": [4.0],
        "a+b/steps=2": [2.5, 4.5],
    }
    found = planned(plan)
    results = {
        run.name: {
            "targets": [line(t, b) for t, b in zip(run.targets[0].tasks, bits[run.name[:-7]], strict=True)]
        }
        for run in found
    }
    tables = plan.read(found, results)
    gains = {(r["budget"], r["source"], r["target"]): r["gain"] for r in rows(tables["matrix"])}
    assert gains == {
        ("equal data", "a", "b"): 0.5,  # together 4.5, alone for half the steps 5.0: fewer bits are better
        ("equal data", "b", "a"): 0.5,
        ("equal compute", "a", "b"): -0.5,
        ("equal compute", "b", "a"): -0.5,
    }
    assert tables["negative"].rows == [
        ("bits per byte", "equal data", 0, 2),
        ("bits per byte", "equal compute", 2, 2),
    ]
    assert all(r["low"] is None and r["seeds"] == 1 for r in rows(tables["matrix"]))
    assert "no interval" in " ".join(tables["matrix"].notes)


def test_stages_spend_equal_steps():
    found = {run.name: run for run in planned(stages(steps=10, prefinetune_steps=4, seeds=[0], **COMMON))}
    steps = {name: run.overrides["TRAIN_STEPS"] for name, run in found.items()}
    second = found["pre-finetuned/seed=0"]
    assert (
        steps[second.name] + steps[second.start]
        == steps["vanilla/seed=0"]
        == steps["multi-task/seed=0"]
        == 10
    )
    assert drawn(found[second.start]) == drawn(found["vanilla/seed=0"]) == {"text": 1.0}
    assert "text" not in drawn(second) and drawn(found["multi-task/seed=0"])["text"] == pytest.approx(2 / 3)


def test_curation_draws_as_many_random_tasks():
    found = {r.tags["arm"]: r for r in planned(curation(curated=["qa/*", "nli_0"], seeds=[0], **COMMON))}
    assert {arm: run.tags["tasks"] for arm, run in found.items()} == {
        "curated": 5,
        "random": 5,
        "all": 12,
        "vanilla": 0,
    }
    assert set(drawn(found["random"])) != set(drawn(found["curated"]))
    assert set(drawn(found["random"])) <= set(drawn(found["all"]))


def test_efficiency_tunes_every_checkpoint():
    found = planned(efficiency(steps=6, every=2, fine_tune={"TRAIN_STEPS": 3}, **COMMON))
    tuned = [(run.start, run.start_step) for run in found if run.start]
    assert tuned == [(f"{arm}/seed=0", step) for arm in ("vanilla", "multi-task") for step in (2, 4, 6)]
    assert found[0].overrides["train.Saving.keep_every"] == 2
    assert not set(drawn(found[4])) & {f"goal_{i}" for i in range(4)}


def test_mixing_chooses_its_baseline_on_another_split():
    plan = mixing(
        static={"low": {}, "high": {}}, schedules={"annealed": {}}, targets=["goal/*"], seeds=[0, 1]
    )
    found = planned(plan)
    assert {t.split for t in found[0].targets} == {"validation", "test"}
    assert "goal_0" in drawn(found[0])  # trained on, not held out
    bits = {"low": (2.0, 5.0), "high": (3.0, 1.0), "annealed": (9.0, 4.0)}
    results = {
        run.name: {
            "targets": [
                line("goal_0", bits[run.tags["arm"]][0], split="validation"),
                line("goal_0", bits[run.tags["arm"]][1] + run.tags["seed"], split="test"),
            ]
        }
        for run in found
    }
    table = plan.read(found, results)["differences"]
    assert "Baseline: low" in table.notes[0]  # best on validation, though worst on test
    differences = {
        r["arm"]: (r["difference"], r["low"], r["high"]) for r in rows(table) if r["family"] == "all"
    }
    assert differences == {"high": (-4.0, -4.0, -4.0), "annealed": (-1.0, -1.0, -1.0)}


def test_means_are_of_families_and_leave_out_what_is_missing():
    found = [Run(f"r{i}", {}, targets=(Targets(("qa_0",)),), tags={"arm": "x", "seed": i}) for i in range(3)]
    one = {"targets": [line("qa_0", 1.0, 50.0), line("qa_1", 3.0), line("nli_0", 6.0, 80.0)]}
    two = {"targets": [line("qa_0", 2.0, 70.0), line("qa_1", 4.0), line("nli_0", 9.0, 60.0)]}
    table = rows(reading.means("t", found, {"r0": one, "r1": two, "r2": None}, by=("arm",)))
    by = {(r["measure"], r["family"]): r for r in table}
    assert by["bits per byte", "qa"]["mean"] == 2.5
    assert by["bits per byte", "all"]["mean"] == ((2 + 6) / 2 + (3 + 9) / 2) / 2  # families count alike
    assert by["score", "all"]["mean"] == (65 + 65) / 2
    assert {(r["runs"], r["missing"]) for r in table} == {(2, 1)}


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        e = statistics.estimate(rng.normal(size=40), samples=1000, seed=trial)
        hits += e.low < 0 < e.high
    assert 180 <= hits <= 199  # 95 % of 200, within three standard errors of 190
    assert statistics.estimate([1.0]) == statistics.Estimate(1.0, None, None, 1)
    with pytest.raises(ValueError, match="finite"):
        statistics.estimate([1.0, math.nan])
    assert statistics.paired({1: 5.0, 2: 6.0, 3: 9.0}, {1: 4.0, 2: 5.0}).mean == 1.0
    assert statistics.paired({1: 5.0}, {2: 1.0}) is None


def test_ids_are_of_recipe_data_targets_and_parents():
    first, second = Run("a", {}), Run("b", {}, start="a")
    recipes = {"a": {"x": "1"}, "b": {"x": "2"}}
    base = runs.ids([first, second], recipes, "data")
    assert runs.ids([first._replace(tags={"y": 1}), second], recipes, "data") == base  # tags are no recipe
    assert runs.ids([first, second], recipes, "other data").keys() == base.keys()
    assert not set(runs.ids([first, second], recipes, "other data").values()) & set(base.values())
    changed = runs.ids([first, second], {**recipes, "a": {"x": "3"}}, "data")
    assert changed["a"] != base["a"] and changed["b"] != base["b"]  # the parent's change is the child's
    aimed = runs.ids([first, second._replace(targets=(Targets(("t",)),))], recipes, "data")
    assert aimed["a"] == base["a"] and aimed["b"] != base["b"]


def test_runs_must_fit_together():
    with pytest.raises(ValueError, match="Two runs of the study are named 'a'"):
        runs.check([Run("a", {}), Run("a", {})], TASKS)
    with pytest.raises(ValueError, match="Unknown run that 'b' starts from"):
        runs.check([Run("b", {}, start="c")], TASKS)
    with pytest.raises(ValueError, match=r"Unknown target 'goal_9'. Did you mean"):
        runs.check([Run("a", {}, targets=(Targets(("goal_9",)),))], TASKS)
    with pytest.raises(ValueError, match="Unknown split of target 'text'"):
        runs.check([Run("a", {}, targets=(Targets(("text",), "tset"),))], TASKS)
