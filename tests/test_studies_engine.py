"""The engine of studies: claims, retries, blocked runs, full disks, guards, and the page in a browser."""

import errno
import json
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import small_cache

from mtjax.mixing import rates
from mtjax.studies import claims, guards, manifest, report, runs, transfer, work
from mtjax.studies.runs import Guards, Run, Targets

LONG = 100.0


def nodes(folder, planned):
    return work.nodes(
        folder, planned, runs.ids(planned, {run.name: {"name": run.name} for run in planned}, "data")
    )


def test_one_of_many_workers_gets_a_run(tmp_path):
    got = []
    start = threading.Barrier(8)

    def take():
        start.wait()
        got.append(claims.take(tmp_path / "run", step=0, expiry=LONG))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n for n in got if n) == [1]
    assert claims.state(tmp_path / "run", retries=0, expiry=LONG).status == "running"


def test_a_silent_claim_is_taken_over_and_its_owner_notices(tmp_path):
    folder = tmp_path / "run"
    assert claims.take(folder, step=0, expiry=LONG) == 1
    assert claims.take(folder, step=0, expiry=LONG) is None
    old = claims.now(folder) - 2 * LONG  # nobody has touched it for so long
    os.utime(folder / "claim.1", (old, old))
    claims.check(folder, 1)
    assert claims.take(folder, step=4, expiry=LONG) == 2
    with pytest.raises(claims.Lost):
        claims.check(folder, 1)
    claims.check(folder, 2)
    claims.release(folder, 2)
    assert claims.state(folder, retries=0, expiry=LONG).status == "free"
    assert sorted(p.name for p in folder.iterdir()) == ["claim.1", "claim.2", "released.2"]


def test_heartbeats_keep_a_claim(tmp_path):
    assert claims.take(tmp_path, step=0, expiry=0.2) == 1
    with claims.heartbeat(tmp_path, 1, expiry=0.2):
        threading.Event().wait(0.6)
        assert claims.last_attempt(tmp_path, expiry=0.2).ended == ""
    threading.Event().wait(0.4)
    assert claims.last_attempt(tmp_path, expiry=0.2).ended == "dead"


def test_a_dead_process_of_this_machine_frees_its_run_at_once(tmp_path):
    assert claims.take(tmp_path, step=0, expiry=LONG) == 1
    gone = subprocess.Popen(["true"])
    gone.wait()
    claim = tmp_path / "claim.1"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid": gone.pid}))
    assert claims.last_attempt(tmp_path, expiry=LONG).ended == "dead"
    elsewhere = {**json.loads(claim.read_text()), "host": "another"}
    claim.write_text(json.dumps(elsewhere))  # its process ids mean nothing here
    assert claims.last_attempt(tmp_path, expiry=LONG).ended == ""


def test_runs_that_kill_every_worker_are_given_up(tmp_path):
    for number in range(1, claims.DEATHS + 1):
        (tmp_path / f"claim.{number}").write_text(json.dumps({"step": 8}))
        os.utime(tmp_path / f"claim.{number}", (0, 0))
    state = claims.state(tmp_path, retries=0, expiry=LONG)
    assert state.status == "failed" and "died behind step 8" in state.error
    (tmp_path / f"claim.{claims.DEATHS}").write_text(json.dumps({"step": 9}))  # it got further
    os.utime(tmp_path / f"claim.{claims.DEATHS}", (0, 0))
    assert claims.state(tmp_path, retries=0, expiry=LONG).status == "free"


def test_failures_are_retried_recorded_and_block_what_depends_on_them(tmp_path):
    aim = (Targets(("t",)),)
    planned = [
        Run("good", {}, targets=aim, tags={"arm": "x"}),
        Run("bad", {}, targets=aim, tags={"arm": "x"}),
        Run("child", {}, start="bad", targets=aim, tags={"arm": "x"}),
        Run("shaky", {}, targets=aim, tags={"arm": "x"}),
    ]
    found, tries = nodes(tmp_path, planned), []

    def execute(node, check):
        tries.append(node.run.name)
        if node.run.name == "bad" or (node.run.name == "shaky" and tries.count("shaky") == 1):
            raise RuntimeError(f"no luck with {node.run.name}")
        return {"targets": [{"task": "t", "family": "f", "split": "s", "scores": {}, "bits_per_byte": 1.0}]}

    states = work.work(found, execute, work.Options(retries=1, expiry=LONG), tell=lambda text: None)
    assert {name: s.status for name, s in states.items()} == {
        **{"good": "done", "shaky": "done", "bad": "failed", "child": "blocked"}
    }
    assert states["bad"].failures == 2 and "no luck with bad" in states["bad"].error
    assert sorted(tries) == ["bad", "bad", "good", "shaky", "shaky"]
    record = json.loads((found[1].folder / "failed.2.json").read_text())
    assert "RuntimeError: no luck" in record["traceback"]
    results = work.read_results(found)
    assert results["bad"] is None and results["child"] is None
    table = report.runs_table(found, states, tmp_path / "report")
    assert [row[:2] for row in table.rows[:2]] == [("bad", "failed"), ("child", "blocked")]  # failures first
    # More retries open it again.
    assert work.states(found, work.Options(retries=2, expiry=LONG))["bad"].status == "ready"


def test_a_full_disk_stops_the_worker_and_fails_no_run(tmp_path):
    found = nodes(tmp_path, [Run("one", {})])

    def execute(node, check):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match=r"no space left in .*run one.*Free some") as error:
        work.work(found, execute, work.Options(expiry=LONG), tell=lambda text: None)
    assert error.value.errno == errno.ENOSPC
    assert not list(found[0].folder.glob("failed.*"))
    claims.release(found[0].folder, 1)
    assert work.states(found, work.Options(expiry=LONG))["one"].status == "ready"


def test_a_lost_run_writes_nothing(tmp_path):
    found = nodes(tmp_path, [Run("one", {})])

    def execute(node, check):
        check()
        (node.folder / "claim.2").write_text("{}")
        check()
        raise AssertionError("went on although another worker owns the run")

    assert work._take(found[0], execute, work.Options(expiry=LONG), lambda text: None)
    assert sorted(p.name for p in found[0].folder.iterdir()) == ["claim.1", "claim.2"]


def test_array_jobs_begin_at_different_places(tmp_path):
    found, order = nodes(tmp_path, [Run(name, {}) for name in "abcd"]), []

    def execute(node, check):
        order.append(node.run.name)
        return {"targets": []}

    work.work(found, execute, work.Options(expiry=LONG, first=2), tell=lambda text: None)
    assert order == ["c", "d", "a", "b"]


# The manifest ----------------------------------------------------------------------------------------------


def test_manifest_refuses_other_packages_and_other_studies(tmp_path):
    entries = [{"name": "a", "id": "1"}]
    directory = tmp_path / "studies"
    manifest.open_directory(directory)
    new = manifest.build(study="s", recipe="text", runs=entries, data={"task": "f"})
    options = {"update": False, "any_environment": False}
    assert manifest.settle(directory, new, **options) == new
    assert manifest.settle(directory, new, **options) == new
    packages = {**new["environment"]["packages"], "jax": "0.0.1"}
    other = {**new, "environment": {**new["environment"], "packages": packages}}
    with pytest.raises(ValueError, match=r"package jax: the study has .*, this worker 0\.0\.1"):
        manifest.settle(directory, other, **options)
    assert manifest.settle(directory, other, update=False, any_environment=True) == new
    changed = {**new, "runs": [{"name": "a", "id": "2"}, {"name": "b", "id": "3"}]}
    with pytest.raises(
        ValueError, match=r"another study named 's': 1 runs are new, e\.g\. 'b'; 1 runs have another"
    ):
        manifest.settle(directory, changed, **options)
    assert manifest.settle(directory, changed, update=True, any_environment=False) == changed
    assert len(list((directory / "s").glob("study*.json"))) == 2  # the old one is kept
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="no study directory"):
        manifest.open_directory(tmp_path / "full")


# Guards ----------------------------------------------------------------------------------------------------


def test_guards_see_what_rates_draw_at_any_step():
    late = rates.staged([(0, rates.explicit({"a": 1.0}, default=0.0)), (50, rates.equal())])
    assert guards.drawn_tasks(late, [1.0, 1.0], ["a", "b"], 40) == {"a"}
    assert guards.drawn_tasks(late, [1.0, 1.0], ["a", "b"], 100) == {"a", "b"}


def test_guards_refuse_trained_targets_but_not_fine_tuning():
    aim = Targets(("goal",), "test")
    planned = [
        Run("first", {}),
        Run("tuned", {}, start="first", targets=(aim._replace(tuned=True),)),
        Run("direct", {}, targets=(aim,)),
        Run("own", {}, targets=(aim._replace(held_out=False),)),
    ]
    drawn = {"first": {"a"}, "tuned": {"goal"}, "direct": {"a"}, "own": {"goal"}}
    guards.refuse(guards.trained_targets(planned, drawn, Guards()))
    for name in ("first", "direct"):
        bad = {**drawn, name: {"a", "goal"}}
        with pytest.raises(ValueError, match=f"run '{name}' pretrains on the target 'goal'"):
            guards.refuse(guards.trained_targets(planned, bad, Guards()))
        allowed = guards.trained_targets(planned, bad, Guards(allowed=("goal",)))
        guards.refuse(allowed)
        assert any(name in finding.what for finding in allowed)  # allowed, and still reported


def test_guards_refuse_scores_that_must_not_be_reported():
    planned = [Run("r", {}, targets=(Targets(("bb_x", "fine")),))]
    with pytest.raises(ValueError, match="bb_x is marked by"):
        guards.refuse(guards.unreported(planned, Guards(unreported=("bb_*",))))
    guards.refuse(guards.unreported(planned, Guards(unreported=("bb_*",), allowed=("bb_x",))))
    guards.refuse(guards.unreported(planned, Guards()))


def test_guards_count_examples_that_share_an_ngram(tmp_path):
    rng = np.random.default_rng(0)

    def words(count):  # of the byte vocabulary: letters are their code and 3
        return [ord(c) + 3 for _ in range(count) for c in [*rng.choice(list("abcdefgh"), 6), " "]]

    held = [[words(5), words(2)] for _ in range(10)]
    train = [[words(5), words(2)] for _ in range(40)]
    train[3][0] = held[7][0]  # one example leaks
    common = words(4)
    train = [[[*common, *inputs], targets] for inputs, targets in train]
    held = [[[*common, *inputs], targets] for inputs, targets in held]  # a prompt that all share is no leak
    goal = small_cache.write_task(tmp_path, "goal", {"test": held, "train": held})
    task = small_cache.write_task(tmp_path, "task", {"train": train})
    looked = guards.HeldOut([goal], "test", 4)
    assert guards.shared(task, looked, kept=tmp_path / "kept") == {"goal": 0.1}
    assert guards.shared(goal, looked, kept=tmp_path / "kept") == {"goal": 1.0}
    planned = [Run("r", {}, targets=(Targets(("goal",), "test"),))]
    tasks, drawn = {"goal": goal, "task": task}, {"r": {"task"}}
    options = {"kept": tmp_path / "kept"}
    guards.refuse(guards.overlaps(planned, drawn, tasks, Guards(overlap=0.2, ngram=4), **options))
    with pytest.raises(ValueError, match=r"10\.0% of goal:test share a 4-gram with task"):
        guards.refuse(guards.overlaps(planned, drawn, tasks, Guards(overlap=0.05, ngram=4), **options))
    assert len(list((tmp_path / "kept").glob("*.json"))) == 2  # counted once a pair


# The page --------------------------------------------------------------------------------------------------

TRY = """
<script>
const said = {};
const cells = (id, n) => [...document.querySelectorAll(`#${id} tbody tr`)].map(r => r.children[n].textContent);
const type = (box, text) => { box.value = text; box.dispatchEvent(new Event("input")); };
said.runs = cells("table-runs", 1);
const gain = [...document.querySelectorAll("#table-matrix th")].find(th => th.textContent === "gain");
gain.click(); said.up = cells("table-matrix", 6).map(Number);
gain.click(); said.down = cells("table-matrix", 6).map(Number);
type(document.querySelector("[aria-label='search targets']"), "nli_0 a+");
type(document.querySelector("[aria-label='search targets']"), "nli_0 compute");
said.found = cells("table-targets", 0);
type(document.querySelector("#search-tasks"), "qa");
said.curves = document.querySelector("#losses").data.map(trace => trace.name);
const rows = [...document.querySelectorAll("#matrix select")].find(box => box.parentElement.textContent.startsWith("rows by"));
rows.value = "mean"; rows.dispatchEvent(new Event("change"));
said.order = document.querySelector("#matrix .js-plotly-plot").data[0].y;
said.plots = document.querySelectorAll(".js-plotly-plot .main-svg").length;
said.requests = performance.getEntriesByType("resource").map(entry => entry.name);
document.title = "said" + JSON.stringify(said) + "said";
</script></body>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Write the report of a transfer study with one failed run and a logged one."""
    folder = tmp_path_factory.mktemp("report")
    tasks = [runs.Task(f"{family}_0", family, 10) for family in ("qa", "nli", "math")]
    study = runs.study(name="looked_at", plan=transfer(families=["qa", "nli", "math"], steps=2))
    planned = study.plan.runs(tasks)
    found = nodes(folder, planned)

    def execute(node, check):
        if node.run.name == "qa+math/steps=2/seed=0":
            raise RuntimeError("</script> & no luck")
        model = node.model_dir
        model.mkdir()
        lines = [
            {"step": s, "train/loss": 3 / s, "task/qa_0/loss": 2 / s, "task/nli_0/loss": 1.0} for s in (1, 2)
        ]
        (model / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        number = len(node.run.name) / 10
        scores = [
            {
                "task": t,
                "family": t[:-2],
                "split": "test",
                "scores": {"accuracy": 50 + number},
                "bits_per_byte": number,
            }
            | {"num_examples": 5, "num_tokens": 7}
            for t in node.run.targets[0].tasks
        ]
        return {"step": 2, "positions": 10, "loss": 1.0, "targets": scores}

    states = work.work(found, execute, work.Options(expiry=LONG), tell=lambda text: None)
    written = manifest.build(study="looked_at", recipe="", runs=[], data={}) | {
        "guards": [["g", "checked", ""]]
    }
    return report.write(study, found, states, written, folder / "looked_at" / "report")


def test_report_has_tables_and_plots_as_files(page):
    matrix = (page.parent / "matrix.csv").read_text().splitlines()
    assert any(line.startswith("# gain: ") for line in matrix)
    assert "measure,budget,source,target,together,alone,gain,low,high,seeds" in matrix
    failed = (page.parent / "runs.csv").read_text().splitlines()[3]
    assert failed.startswith("qa+math/steps=2/seed=0,failed,1,")
    assert (page.parent / "matrix-score-equal_data.png").stat().st_size > 5000
    text = page.read_text()
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", text)


def test_report_works_in_a_browser(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    tried = page.with_name("tried.html")
    tried.write_text(page.read_text().replace("</body>", TRY))
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom", tried.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console
    said = json.loads(re.search(r"<title>said(.*)said</title>", done.stdout)[1].replace("&amp;", "&"))
    assert said["runs"][0] == "failed" and set(said["runs"][1:]) == {"done"}
    assert said["up"] == sorted(said["up"]) and said["down"] == said["up"][::-1] and len(set(said["up"])) > 1
    assert set(said["found"]) == {"nli_0"}
    assert said["curves"] == ["qa_0"]
    assert sorted(said["order"]) == ["math", "nli", "qa"]
    assert said["plots"] >= 2
    assert said["requests"] == []
