"""`mtjax bench train`: seconds to the first step, steps and tokens per second, memory, FLOPs, recompilations."""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from mtjax.launch import STARTED, bench_data, bench_decode, flags

EXAMPLES = """
example (T5 1.1 small on CPU, float32, batch 8):
  mtjax bench train --gin_file=models/t5_1_1_small.gin --gin_file=runs/pretrain.gin --gin.BATCH_SIZE=8 \\
      --gin.ACTIVATION_DTYPE=float32 --json

Steps run on synthetic rows, packed full. --json prints one object:
  import_s            seconds from the start of the process until everything is imported
  init_s              seconds to compile and run the initialisation of the state
  compile_s           seconds that tracing and compiling the step, in a thread beside it, took longer
  first_step_s        seconds from the start of the process until the first step has ended
  steps_per_s         median over --steps steps, after the first
  tokens_per_s        the same times the batch's input and target positions
  peak_rss_mb         peak memory of the process, MiB, up to the last timed step
  flops_compiled      of one step, as XLA counts them (the body of a scan once: bench with scan_layers=False)
  flops_model         of one step, analytic: matrix products with attention and logits, times 3
  recompiles          compilations after the first step
  task_loss_overhead  median step time with --num_tasks tasks over that with one task, minus 1
"""
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax bench`."""
    parser.epilog = EXAMPLES + bench_data.EXAMPLES + bench_decode.EXAMPLES
    parser.add_argument("what", choices=["train", "data", "decode"], help="what is measured")
    parser.add_argument(
        "--steps", type=int, default=12, metavar="N", help="timed steps (default: %(default)s)"
    )
    parser.add_argument(
        "--num_tasks",
        type=int,
        default=64,
        metavar="N",
        help="tasks the tokens belong to (default: %(default)s)",
    )
    parser.add_argument(
        "--skip_overhead", action="store_true", help="no second compilation: task_loss_overhead is null"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    bench_data.add_arguments(parser)
    bench_decode.add_arguments(parser)
    flags.add_gin(parser)
    flags.add_tasks(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.what == "decode":
        return _bench_decode(args)
    return bench_data.run(args) if args.what == "data" else _bench_train(args)


def _bench_decode(args: argparse.Namespace) -> int:
    from mtjax import train
    from mtjax.launch import train as launch_train

    config = launch_train.configure(args, defaults=_DEFAULTS)
    return bench_decode.run(args, config.arguments(train.fit, only=["model", "initial_checkpoint"]))


def _bench_train(args: argparse.Namespace) -> int:
    if args.steps < 1 or args.num_tasks < 1:
        raise ValueError(f"--steps={args.steps} and --num_tasks={args.num_tasks} must be at least 1.")
    from mtjax import host_memory

    host_memory.keep()
    from mtjax import train  # with everything that training imports
    from mtjax.launch import train as launch_train

    config = launch_train.configure(args, defaults=_DEFAULTS)
    import_s = time.perf_counter() - STARTED
    needed = list(inspect.signature(train.prepare).parameters)
    arguments = config.arguments(train.fit, only=needed)
    compiles = _count_compiles()
    many, measured, step_times = _measure(arguments, args.steps, num_tasks=args.num_tasks, compiles=compiles)
    result = {"import_s": import_s, **measured, "task_loss_overhead": None}
    if not args.skip_overhead:
        result["task_loss_overhead"] = _overhead(many, _start(arguments, num_tasks=1), args.steps)
    if args.json:
        print(json.dumps(result))
    else:
        _print(result, step_times)
    return 0


# Nothing is read or written, so what names data and folders needs no value.
_DEFAULTS = {
    "MIXTURE_OR_TASK_NAME": "synthetic",
    "MODEL_DIR": "nowhere",
    "TRAIN_STEPS": 1,
    "INITIAL_CHECKPOINT_PATH": None,
}


class _Run(NamedTuple):
    program: Any
    state: Any
    batch: Mapping[str, Any]
    init_s: float
    compile_s: float  # beyond init_s


def _count_compiles() -> list[float]:
    """Return a list that grows by the seconds of every compilation from now on."""
    import jax

    seconds: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: seconds.append(duration) if event == COMPILE_EVENT else None
    )
    return seconds


def _start(arguments: Mapping[str, Any], *, num_tasks: int) -> _Run:
    import jax

    from mtjax import program, sharding, train
    from mtjax.data import pipeline

    names = tuple(f"task_{i}" for i in range(num_tasks))
    arguments = dict(arguments)
    if isinstance(arguments.get("group_by"), Mapping):
        arguments.pop("group_by")  # it maps the tasks of a real mixture
    built = train.prepare(**arguments, tasks=train.TaskTable(names, names))
    data = arguments["data"]
    batch = pipeline.synthetic_batch(
        data.lengths,
        data.batch_size,
        arguments["model"].config.vocab_size,
        num_tasks,
        seed=0,
        architecture=data.architecture,
    )
    batch = sharding.global_batch(built.mesh, batch)
    started = time.perf_counter()
    with program.compiling(built, batch):  # as in training
        state = jax.block_until_ready(built.init(jax.random.key(0)))
        initialised = time.perf_counter()
    return _Run(built, state, batch, initialised - started, time.perf_counter() - initialised)


def _measure(
    arguments: Mapping[str, Any], steps: int, *, num_tasks: int, compiles: list[float]
) -> tuple[_Run, dict[str, Any], list[float]]:
    """Return the run after its steps, the results, and the seconds of each step."""
    import jax

    from mtjax import host_memory

    run = _start(arguments, num_tasks=num_tasks)
    compiled = run.program.step.lower(run.program.abstract, run.batch).compile()  # from jax's own cache
    host_memory.settle(run.state, trim=True)
    flops = (compiled.cost_analysis() or {}).get("flops")
    state, metrics = jax.block_until_ready(run.program.step(run.state, run.batch))
    first_step_s = time.perf_counter() - STARTED
    before = len(compiles)
    for _ in range(3):  # as in training
        host_memory.settle(state, trim=True)
        state, metrics = jax.block_until_ready(run.program.step(state, run.batch))
    times = []
    for _ in range(steps):
        host_memory.settle(state)
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(run.program.step(state, run.batch))
        times.append(time.perf_counter() - start)
    recompiles = len(compiles) - before
    if not bool(metrics.is_finite):
        print("warning: the loss or gradient is not finite", file=sys.stderr)
    data = arguments["data"]
    seconds = statistics.median(times)
    positions = data.batch_size * sum(data.lengths.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    results = {
        "init_s": run.init_s,
        "compile_s": run.compile_s,
        "first_step_s": first_step_s,
        "steps_per_s": 1 / seconds,
        "tokens_per_s": positions / seconds,
        "peak_rss_mb": peak / (1 << 20 if sys.platform == "darwin" else 1 << 10),
        "flops_compiled": flops,
        "flops_model": arguments["model"].flops(data.batch_size, lengths=data.lengths),
        "recompiles": recompiles,
    }
    return run._replace(state=state), results, times


def _overhead(many: _Run, one: _Run, steps: int) -> float:
    """Compare step times with many tasks and with one, alternating, so that both see the same machine."""
    import jax

    runs = [many, one]
    states = [run.state for run in runs]
    times: list[list[float]] = [[], []]
    for round_ in range(steps + 1):
        for i in (0, 1) if round_ % 2 else (1, 0):
            start = time.perf_counter()
            states[i], _ = jax.block_until_ready(runs[i].program.step(states[i], runs[i].batch))
            times[i].append(time.perf_counter() - start)
    with_many, with_one = (statistics.median(values[1:]) for values in times)  # the first ones compile
    return with_many / with_one - 1


def _print(result: Mapping[str, Any], times: list[float]) -> None:
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    ratio = result["flops_compiled"] and result["flops_compiled"] / result["flops_model"]
    overhead = result["task_loss_overhead"]
    parts = f"import {result['import_s']:.1f}, init {result['init_s']:.1f}, compile {result['compile_s']:.1f}"
    spread = f"{quartiles[0] * 1e3:.0f} to {quartiles[2] * 1e3:.0f}"
    print(f"to the first step   {result['first_step_s']:.1f} s: {parts}")
    print(f"a step              {statistics.median(times) * 1e3:.0f} ms, half of them {spread} ms")
    print(f"steps per second    {result['steps_per_s']:.3f}")
    print(f"tokens per second   {result['tokens_per_s']:,.0f} (input and target positions)")
    print(f"peak memory         {result['peak_rss_mb']:,.0f} MiB")
    print(f"compiled FLOPs      {ratio:.3f} of the model's" if ratio else "compiled FLOPs      unknown here")
    print(f"recompilations      {result['recompiles']}")
    if overhead is not None:
        print(f"losses per task     {overhead:+.1%} of a step")
