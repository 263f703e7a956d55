"""`mtjax study`: a recipe with a plan → runs, by any number of workers → tables, plots and one page."""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mtjax.launch import flags

EXAMPLES = """
examples:
  mtjax study plan studies/mini_scaling.gin --study_dir=DIR              what would run, its cost, what is refused
  mtjax study run studies/mini_scaling.gin --study_dir=DIR --workers=2   again after any interruption, on any machine
  mtjax study run ... --index=3 --count=8                                one of 8 jobs of an array, on one study_dir
  mtjax study status studies/mini_scaling.gin --study_dir=DIR
  mtjax study report studies/mini_scaling.gin --study_dir=DIR            DIR/NAME/report: index.html, CSVs, PNGs

DIR/runs/ID holds each run's model directory, results and errors; studies under one DIR share equal runs. Exit codes
of run: 0 all done, 1 some failed, 75 stopped by SIGTERM (repeat the command).
"""
# Of a recipe's text, what does not change a run: where things lie on this machine.
PLACES = frozenset(
    [
        "MODEL_DIR",
        "CACHE_DIRS",
        "VOCABULARY",
        "TFDS_DATA_DIR",
        "USE_CACHED_TASKS",
        "MODULES",
        "MIXTURE_OR_TASK_MODULE",
        "train.fit.model_dir",
        "pipeline.TrainData.cache_dirs",
    ]
)
PLACES_OF = "prepare.mixture."
RUN = "run.json"
DIED = 75  # EX_TEMPFAIL, as preemption.EXIT_CODE, which imports training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax study`."""
    from mtjax.studies.claims import EXPIRY_S

    parser.epilog = EXAMPLES
    parser.add_argument("action", choices=list(ACTIONS), help="what to do")
    parser.add_argument("study", metavar="STUDY.gin", help="recipe that binds studies.study")
    parser.add_argument(
        "--study_dir", required=True, metavar="DIR", help="folder of runs; studies may share it"
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes on this machine (default: 1)"
    )
    group.add_argument(
        "--index", type=int, default=0, metavar="I", help="which of --count array jobs this is"
    )
    group.add_argument("--count", type=int, default=1, metavar="N", help="array jobs on this study_dir")
    group.add_argument(
        "--retries", type=int, default=0, metavar="N", help="how often to try a failed run again (default: 0)"
    )
    group.add_argument(
        "--expiry",
        type=float,
        default=EXPIRY_S,
        metavar="SECONDS",
        help="a worker on another machine that is silent for so long is dead (default: %(default)g)",
    )
    group.add_argument(
        "--update", action="store_true", help="accept that the study's plan or recipe has changed"
    )
    group.add_argument(
        "--any_environment", action="store_true", help="work with other packages or devices than the study's"
    )
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--device", metavar="NAME", help="estimate time on this kind of chip, e.g. v5e or cpu-core"
    )
    group.add_argument("--chips", type=int, default=1, metavar="N", help="chips a run trains on (default: 1)")
    group.add_argument(
        "--utilisation", type=float, default=0.4, metavar="X", help="share of the chips' peak (default: 0.4)"
    )
    flags.add_gin(parser)
    flags.add_tasks(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, run, watch or report a study."""
    if args.workers < 1 or not 0 <= args.index < args.count or args.retries < 0 or args.expiry <= 0:
        raise ValueError(
            "Give --workers of at least 1, --index below --count, --retries of at least 0, --expiry above 0."
        )
    return ACTIONS[args.action](args)


class Opened(NamedTuple):
    """A study on this machine: its runs with their recipes, its data, and where it is kept."""

    study: Any
    tasks: list[Any]
    nodes: list[Any]
    texts: dict[str, str]  # resolved recipes, by run name
    arguments: dict[str, Any]  # of train.fit, by run name
    costs: dict[str, Any]
    fingerprints: dict[str, str]
    directory: Path
    base: dict[str, Any]  # arguments of train.fit without overrides

    @property
    def is_cached(self) -> bool:
        """Tell whether the data is there, so that the runs' ids are final."""
        return bool(self.fingerprints)

    @property
    def folder(self) -> Path:
        """Return the study's own folder."""
        return self.directory / self.study.name


def open_study(args: argparse.Namespace) -> Opened:
    """Plan the study over its cached mixture, and resolve every run's recipe.

    Only `plan` can do with a mixture that is not cached yet: then its registered tasks are planned with.
    Raises ValueError for whatever cannot run: names, overrides, targets, subsets.
    """
    from mtjax import studies, train
    from mtjax.data import cache, fingerprint
    from mtjax.launch import config as config_lib
    from mtjax.studies import costs, work
    from mtjax.studies import runs as runs_lib

    config = configure(args)
    if not config.is_bound(studies.study):
        raise ValueError(
            f"{args.study!r} binds nothing of studies.study, so it is no study; see studies/mini_scaling.gin."
        )
    study = studies.study(**config.arguments(studies.study))
    base = config.arguments(train.fit)
    data = base["data"]
    is_cached = data.mixture in [*cache.mixture_names(data.cache_dirs), *cache.task_names(data.cache_dirs)]
    if is_cached or args.action != "plan":
        cached = cache.open_mixture(data.cache_dirs, data.mixture).tasks
        tasks = [
            runs_lib.Task(task.name, task.family, task.num_examples("train"), tuple(task.splits))
            for task in cached
        ]
        fingerprints = {task.name: task.fingerprint for task in cached}
    else:
        tasks, fingerprints = _registered_tasks(args, config), {}
    runs = study.plan.runs(tasks)
    runs_lib.check(runs, tasks)
    texts, recipes, arguments = {}, {}, {}
    for planned in runs:
        with _of_run(planned.name):
            resolved = configure(args, overrides=_bindings(planned, start="START"))
            texts[planned.name] = resolved.text
            recipes[planned.name] = _identity(
                config_lib.statements(resolved.text), has_start=planned.start is not None
            )
            arguments[planned.name] = resolved.arguments(train.fit)
    counted = {name: costs.cost(given) for name, given in arguments.items()}
    ids = runs_lib.ids(runs, recipes, fingerprint.fingerprint(fingerprints))
    directory = Path(args.study_dir).absolute()
    return Opened(
        study=study,
        tasks=tasks,
        nodes=work.nodes(directory, runs, ids),
        texts=texts,
        arguments=arguments,
        costs=counted,
        fingerprints=fingerprints,
        directory=directory,
        base=base,
    )


def _registered_tasks(args: argparse.Namespace, config: Any) -> list[Any]:
    """Describe a mixture's tasks before it is cached: their sizes, and with them rates, are not known yet."""
    from mtjax.launch import prepare, registry
    from mtjax.studies import runs as runs_lib
    from mtjax.tasks.info import info

    asked = config.arguments(prepare.mixture)
    module = asked.get("module")
    flags.import_tasks(args, [module] if isinstance(module, str) else module or ())
    tasks = registry.tasks_of(registry.lookup(asked["name"]))
    return [runs_lib.Task(task.name, info(task.name).family, 1) for task in tasks]


def configure(args: argparse.Namespace, *, overrides: Sequence[str] = ()) -> Any:
    """Parse the study's recipe with the flags' bindings and then a run's."""
    from mtjax import studies
    from mtjax.launch import train

    changed = copy.copy(args)
    changed.gin_file = [args.study, *args.gin_file]
    changed.gin_bindings = [*args.gin_bindings, *overrides]
    return train.configure(changed, defaults={"MODEL_DIR": "run"}, also=[studies.study])


def _bindings(planned: Any, *, start: str, model_dir: str | None = None) -> list[str]:
    """Write a run's overrides, and its places, as bindings."""
    found = [f"{name}={_literal(value)}" for name, value in planned.overrides.items()]
    found += [f"INITIAL_CHECKPOINT_PATH={start!r}"] if planned.start is not None else []
    return [*found, *([f"MODEL_DIR={model_dir!r}"] if model_dir else [])]


def _literal(value: Any) -> str:
    return value if isinstance(value, str) and value[:1] in ("@", "%") else repr(value)


def _identity(statements: Mapping[str, str], *, has_start: bool) -> dict[str, str]:
    places = {*PLACES, *(["INITIAL_CHECKPOINT_PATH"] if has_start else [])}
    return {n: v for n, v in statements.items() if n not in places and not n.startswith(PLACES_OF)}


@contextmanager
def _of_run(name: str) -> Iterator[None]:
    """Name the run in whatever its recipe is wrong in."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Run {name!r}: {error}") from error


def check_recipes(opened: Opened) -> dict[str, int]:
    """Build every distinct program abstractly; return the parameters by run name.

    Raises ValueError, naming the run, for what could not train. Rates are asked for every run.
    """
    from mtjax import train
    from mtjax.launch import config as config_lib
    from mtjax.studies import execute
    from mtjax.studies import runs as runs_lib

    names = tuple(task.name for task in opened.tasks)
    table = train.TaskTable(names, tuple(task.family for task in opened.tasks))
    sizes = [float(task.num_examples) for task in opened.tasks]
    built: dict[str, int] = {}
    found: dict[str, int] = {}
    same = (runs_lib.RATE_GROUPS, runs_lib.RATE_WEIGHTS, "RANDOM_SEED", "INITIAL_CHECKPOINT_PATH")
    for node in opened.nodes:
        with _of_run(node.run.name):
            statements = config_lib.statements(opened.texts[node.run.name])
            key = json.dumps({name: value for name, value in statements.items() if name not in same})
            arguments = opened.arguments[node.run.name]
            if arguments["data"].rates is not None:
                arguments["data"].rates.init(sizes, names)
            if key not in built:
                built[key] = execute.check_recipe(arguments, tasks=None if opened.is_cached else table)
            found[node.run.name] = built[key]
    return found


# plan ------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> int:
    from mtjax.launch import screen
    from mtjax.studies import costs, guards

    device = args.device and costs.device(args.device, chips=args.chips, utilisation=args.utilisation)
    opened = open_study(args)
    if not opened.is_cached:
        print("The mixture is not cached yet: its tasks are those registered, ids and sizes are not known.")
    parameters = check_recipes(opened)
    screen.console().print(_plan_table(opened, parameters, device))
    _print_totals(opened, device)
    findings = check_guards(opened)
    rows = guards.as_rows(findings)
    screen.console().print(screen.table("guards", ("guard", "what was checked or found", ""), rows))
    guards.refuse(findings)
    return 0


def _plan_table(opened: Opened, parameters: Mapping[str, int], device: Any) -> Any:
    from mtjax.launch import screen

    rows, seen = [], set()
    for node in opened.nodes:
        cost = opened.costs[node.run.name]
        again = " (again)" if node.id in seen else ""
        seen.add(node.id)
        rows.append(
            (
                node.run.name,
                node.id + again if opened.is_cached else "",
                node.run.start or "",
                parameters[node.run.name],
                cost.steps,
                cost.positions,
                cost.flops,
                sum(len(targets.tasks) for targets in node.run.targets),
                *(
                    [screen.duration(device.seconds(cost.flops)), device.chip_hours(cost.flops)]
                    if device
                    else []
                ),
            )
        )
    columns = ("run", "id", "starts from", "parameters", "steps", "positions", "FLOPs", "targets")
    columns += ("time", "chip-hours") if device else ()
    return screen.table(f"{opened.study.name}: {opened.study.plan.question}", columns, rows)


def _print_totals(opened: Opened, device: Any) -> None:
    from mtjax.launch import screen

    distinct = {node.id: opened.costs[node.run.name] for node in opened.nodes}.values()
    flops = sum(cost.flops for cost in distinct)
    positions = sum(cost.positions for cost in distinct)
    print(
        f"{len(distinct)} distinct runs, {positions:,} positions (tokens and padding), {flops:.3g} FLOPs of training."
    )
    if device:
        print(
            f"On {device.chips} x {device.name} at {device.utilisation:.0%} of the peak, one run after the other: "
            f"{screen.duration(device.seconds(flops))}, {device.chip_hours(flops):,.4g} chip-hours, without compiling, "
            "evaluating and saving."
        )


def check_guards(opened: Opened) -> list[Any]:
    """Return what the study's guards checked and found."""
    from mtjax.data import cache
    from mtjax.launch import screen
    from mtjax.mixing import rates as mixing_rates
    from mtjax.studies import guards

    runs = [node.run for node in opened.nodes]
    data = opened.base["data"]
    mixture = cache.open_mixture(data.cache_dirs, data.mixture) if opened.is_cached else None
    names, sizes = [task.name for task in opened.tasks], [float(task.num_examples) for task in opened.tasks]
    drawn = {}
    for planned in runs:
        arguments = opened.arguments[planned.name]
        rates = arguments["data"].rates or (mixture and mixture.rates) or mixing_rates.equal()
        drawn[planned.name] = guards.drawn_tasks(rates, sizes, names, arguments["train_steps"])
    findings = [
        *guards.unreported(runs, opened.study.guards),
        *guards.trained_targets(runs, drawn, opened.study.guards),
    ]
    if mixture is None:
        return [
            *findings,
            guards.Finding("n-gram overlap", "not checked yet: the mixture is not cached", False),
        ]
    if any(finding.refused for finding in findings):  # n-grams of all texts take minutes
        return findings
    with screen.status("n-gram overlap") as tell:
        return findings + guards.overlaps(
            runs,
            drawn,
            {task.name: task for task in mixture.tasks},
            opened.study.guards,
            kept=Path(data.cache_dirs[0]) / "overlaps",
            progress=tell,
        )


# run -------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from mtjax import train
    from mtjax.launch import preemption
    from mtjax.studies import manifest

    manifest.open_directory(Path(args.study_dir).absolute())
    _keep_compiled(Path(args.study_dir).absolute() / "compiled")
    try:
        with preemption.notice() as notice:
            _cache(args)
            opened = open_study(args)
            _settle(opened, args)
            if args.workers > 1:
                return _run_workers(opened, args)
            return _work(opened, args, notice)
    except train.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return preemption.EXIT_CODE


def _keep_compiled(folder: Path) -> None:
    """Share compiled programs between runs and workers, unless the user shares them already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _cache(args: argparse.Namespace) -> None:
    from mtjax.launch import prepare

    config = configure(args)
    if config.is_bound(prepare.mixture):
        prepare.mixture(**config.arguments(prepare.mixture))


def _settle(opened: Opened, args: argparse.Namespace) -> dict[str, Any]:
    """Check a study before its first run, and write or compare its manifest."""
    from mtjax.launch import config as config_lib
    from mtjax.studies import guards, manifest

    old = manifest.read(opened.directory, opened.study.name)
    runs = [
        {
            "name": node.run.name,
            "id": node.id,
            "start": node.run.start,
            "seed": node.run.overrides.get("RANDOM_SEED"),
            "tags": dict(node.run.tags),
        }
        for node in opened.nodes
    ]
    text = Path(config_lib.find(args.study)).read_text("utf-8")
    new = manifest.build(study=opened.study.name, recipe=text, runs=runs, data=opened.fingerprints)
    if old is None or manifest.ids(old) != manifest.ids(new) or old["recipe"] != text:
        check_recipes(opened)
        findings = check_guards(opened)
        guards.refuse(findings)
        new["guards"] = guards.as_rows(findings)
    return manifest.settle(opened.directory, new, update=args.update, any_environment=args.any_environment)


def _options(args: argparse.Namespace, number: int) -> Any:
    from mtjax.studies import work

    return work.Options(retries=args.retries, expiry=args.expiry, first=number * args.index // args.count)


def _work(opened: Opened, args: argparse.Namespace, notice: Any) -> int:
    """Take runs in this process until none is left."""
    from mtjax import host_memory
    from mtjax.studies import work

    host_memory.keep()
    execute = _executor(opened, args, notice)
    states = work.work(opened.nodes, execute, _options(args, len(opened.nodes)), tell=_tell)
    return _summarise(opened, states)


def _tell(text: str) -> None:
    print(f"[{os.getpid()}] {text}", flush=True)


def _executor(opened: Opened, args: argparse.Namespace, notice: Any) -> Any:
    """Build what trains and evaluates a run in this process."""
    from mtjax import train
    from mtjax.data import publish
    from mtjax.launch import train as launch_train
    from mtjax.studies import execute, manifest

    by_name = {node.run.name: node for node in opened.nodes}

    def run_one(node: Any, check: Callable[[], None]) -> dict[str, Any]:
        def should_stop(step: int) -> bool:
            check()
            return notice.asked(step)

        start = (
            _checkpoint(by_name[node.run.start], node.run.start_step) if node.run.start is not None else ""
        )
        overrides = _bindings(node.run, start=start, model_dir=str(node.model_dir))
        config = configure(args, overrides=overrides)
        arguments = config.arguments(train.fit)
        description = {"study": opened.study.name, "id": node.id, **node.run._asdict()}
        description |= {"code": manifest.code_version(), "environment": manifest.environment()}
        publish.write_json(node.folder / RUN, description | {"recipe": config.text})
        launch_train.save(node.model_dir, config.text)
        try:
            results = execute.train(arguments, config_text=config.text, should_stop=should_stop)
        finally:
            notice.is_training = False  # from here on SIGTERM stops at once
        return results | {"targets": execute.measure(arguments, node.run.targets)}

    return run_one


def _checkpoint(node: Any, step: int | None) -> str:
    from mtjax import checkpoint

    return str(node.model_dir) if step is None else str(node.model_dir / checkpoint.FOLDER / str(step))


def _run_workers(opened: Opened, args: argparse.Namespace) -> int:
    """Start workers as processes of their own, pass SIGTERM on, and wait for them."""
    from mtjax import train
    from mtjax.studies import work

    total = args.workers * args.count
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "mtjax.launch.main", *args.arguments),
                *("--workers=1", f"--index={args.index * args.workers + i}", f"--count={total}"),
            ]
        )
        for i in range(args.workers)
    ]
    try:
        while any([worker.poll() is None for worker in workers]):  # all are asked: an unread exit looks alive
            time.sleep(0.2)
    except (train.Stopped, KeyboardInterrupt):
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.wait()
        raise
    codes = [worker.wait() for worker in workers]
    for worker, code in zip(workers, codes, strict=True):
        if code < 0:
            print(
                f"Worker {worker.pid} was killed by {signal.Signals(-code).name}; others took its run over."
            )
    if DIED in codes or 2 in codes:
        return DIED if DIED in codes else 2
    return _summarise(opened, work.states(opened.nodes, _options(args, len(opened.nodes))))


def _summarise(opened: Opened, states: Mapping[str, Any]) -> int:
    """Print how the runs ended; the exit code is 0 where all are done."""
    done = [name for name, state in states.items() if state.status == "done"]
    print(f"{opened.study.name}: {len(done)} of {len(states)} runs done.")
    for name, state in states.items():
        if state.status != "done":
            print(f"  {name}: {state.status}" + (f": {state.error}" if state.error else ""))
    if len(done) < len(states):
        return 1
    return 0


# status ----------------------------------------------------------------------------------------------------


def _status(args: argparse.Namespace) -> int:
    from mtjax.launch import screen, study_status
    from mtjax.studies import work

    opened = open_study(args)
    options = _options(args, len(opened.nodes))
    study_status.show(opened, lambda: work.states(opened.nodes, options), screen.console())
    return 0


def _report(args: argparse.Namespace) -> int:
    from mtjax.studies import manifest, report, work

    opened = open_study(args)
    recorded = manifest.read(opened.directory, opened.study.name)
    if recorded is None:
        raise ValueError(
            f"{str(opened.folder)!r} has no manifest: `mtjax study run` has not begun this study."
        )
    states = work.states(opened.nodes, _options(args, len(opened.nodes)))
    page = report.write(opened.study, opened.nodes, states, recorded, opened.folder / "report")
    print(f"Report: {page}, with its tables as CSV and plots as PNG beside it.")
    return 0


ACTIONS = {"plan": _plan, "run": _run, "status": _status, "report": _report}
