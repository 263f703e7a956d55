"""`mtjax compile`: would this recipe run on that slice, and how fast? Compiled for real, without the hardware."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtjax.launch import flags

EXAMPLES = """
examples:
  mtjax compile --gin_file=runs/pods/t5_1_1_xl_v5e_8x8.gin --topology=v5e:8x8
  mtjax compile --gin_file=models/t5_1_1_xxl.gin --gin_file=runs/pretrain.gin --topology=v5e:16x16 --num_slices=2 \\
      --gin.MESH="{'slice': 2, 'fsdp': -1}" --gin.BATCH_SIZE=2048
  mtjax compile --gin_file=models/t5_1_1_xl.gin --gin_file=runs/pretrain.gin --topology=v5e:8x8 --plan

--topology is a TPU's kind and the shape of its slice, in chips (v4:2x2x2, v5e:8x8, v5p:4x4x4, v6e:16x16,
tpu7x:2x2x1, where a chip counts as two), or cpu:8 for that many CPU devices. TPUs need libtpu, which any x86
machine can install: pip install mtjax[tpu].

--json prints one object (sizes in bytes and seconds, of one chip and one step):
  topology num_slices device_kind chips mesh split_axes    where; split axes take a part of a physical axis
  hbm_bytes peak_bytes fits margin                         memory: of a chip, needed, whether, what stays free
  parameter_bytes optimizer_bytes host_bytes temporary_bytes code_bytes
  flops_compiled flops_model                               products, loops counted in full; analytic
  memory_traffic_bytes collective_bytes collective_counts  moved to and from memory; sent by mesh axis; by kind
  roofline_s                                               the least time of products, memory and collectives
  compiler_s                                               the compiler's estimate; null where below the roof
  estimated_step_s estimated_mfu estimated_tokens_per_s_per_chip
  compile_s

The roofline assumes that products, memory traffic and collectives overlap in full, and full clock: a real step
takes longer. Use it to compare layouts and to see that a run fits.

--plan compiles several mesh shapes, microbatches and remat policies (minutes each), and ranks those that fit.
"""
# Nothing is read or written, so what names data and folders needs no value.
_DEFAULTS = {
    "MIXTURE_OR_TASK_NAME": "synthetic",
    "MODEL_DIR": "nowhere",
    "TRAIN_STEPS": 1,
    "INITIAL_CHECKPOINT_PATH": None,
}
NUM_TASKS = 64  # the tasks of a run are not known here; their number changes a step very little


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax compile`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--topology", required=True, metavar="KIND:SHAPE", help="the slice, such as v5p:8x8x8"
    )
    parser.add_argument(
        "--num_slices", type=int, default=1, metavar="N", help="slices (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--output", metavar="FILE", help="write the JSON here, too")
    parser.add_argument("--plan", action="store_true", help="try layouts and rank those that fit")
    parser.add_argument(
        "--max_compiles", type=int, default=12, metavar="N", help="of --plan (default: %(default)s)"
    )
    flags.add_gin(parser)
    flags.add_tasks(parser)


def run(args: argparse.Namespace) -> int:
    """Compile once, or plan; the exit code is 3 where nothing fits."""
    _prepare_platform(args.topology)
    from mtjax import aot

    if args.max_compiles < 1:
        raise ValueError(f"--max_compiles={args.max_compiles} must be at least 1.")
    devices = aot.devices(args.topology, num_slices=args.num_slices)
    if args.plan:
        return _plan(args, devices)
    report = _compile(args, devices)
    result = dataclasses.asdict(report)
    _write(args, result)
    if args.json:
        print(json.dumps(result))
    else:
        _print(report)
    return 3 if report.fits is False else 0


def _prepare_platform(topology: str) -> None:
    """Keep jax from this machine's accelerators, and make the CPU devices of cpu:N."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit():
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={shape}"


def _compile(args: argparse.Namespace, devices: Sequence[Any], bindings: Sequence[str] = ()) -> Any:
    """Build the recipe's Program on the devices and compile its step."""
    from mtjax import aot, sharding, train

    arguments = _arguments(args, bindings)
    mesh = sharding.make_mesh(arguments.get("mesh"), devices=devices)
    names = tuple(f"task_{i}" for i in range(NUM_TASKS))
    run = train.prepare(**{**arguments, "mesh": mesh}, tasks=train.TaskTable(names, names))
    report, _ = aot.compile_step(
        run,
        model=arguments["model"],
        data=arguments["data"],
        topology=args.topology,
        num_slices=args.num_slices,
    )
    return report


def _arguments(args: argparse.Namespace, bindings: Sequence[str] = ()) -> dict[str, Any]:
    """Return train.prepare's arguments from the configuration with more bindings."""
    from mtjax import train
    from mtjax.launch import train as launch_train

    changed = argparse.Namespace(**{**vars(args), "gin_bindings": [*args.gin_bindings, *bindings]})
    config = launch_train.configure(changed, defaults=_DEFAULTS)
    arguments = train.program_arguments(config.arguments(train.fit))
    if isinstance(arguments.get("group_by"), Mapping):
        arguments.pop("group_by")  # it maps the tasks of a real mixture
    return arguments


def _write(args: argparse.Namespace, result: Any) -> None:
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _print(report: Any) -> None:
    from mtjax.launch import screen

    def percent(part: float | None) -> str:
        return "unknown" if part is None else f"{part:.0%}"

    where = f"{report.topology}{f' x {report.num_slices} slices' if report.num_slices > 1 else ''}"
    print(f"{where}: {report.chips} x {report.device_kind}, mesh {report.mesh or 'one device'}")
    rows = [
        ("parameters", report.parameter_bytes),
        ("optimizer and balancer", report.optimizer_bytes),
        ("activations, gradients, gathered weights", report.temporary_bytes),
        ("code", report.code_bytes),
        ("peak", report.peak_bytes),
    ]
    if report.host_bytes:
        rows.insert(2, ("in host memory", report.host_bytes))
    for name, size in rows:
        print(f"  {name:<42}{screen.size(size)}")
    if report.hbm_bytes is not None:
        verdict = f"fits, {report.margin:.0%} stays free" if report.fits else "DOES NOT FIT"
        print(f"  {'memory of a chip':<42}{screen.size(report.hbm_bytes)}: {verdict}")
    recomputed = report.flops_compiled / report.flops_model
    print(f"products             {report.flops_compiled:.3g} FLOPs a chip, {recomputed:.2f} of the model's")
    for axes, size in sorted(report.collective_bytes.items(), key=lambda item: -item[1]):
        print(f"sent over {axes:<11}{screen.size(int(size))} a chip")
    if report.roofline_s is not None:
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in report.roofline_s.items())
        print(f"a step at best       {report.estimated_step_s * 1e3:.1f} ms ({parts})")
        said = "unknown" if report.compiler_s is None else f"{report.compiler_s * 1e3:.1f} ms"
        print(f"compiler's estimate  {said}")
        tokens = report.estimated_tokens_per_s_per_chip
        print(f"at most              {percent(report.estimated_mfu)} MFU, {tokens:,.0f} tokens/s a chip")
    print(f"compiled in          {report.compile_s:.1f} s")


# Plan ------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """One way to run a recipe."""

    mesh: dict[str, int]
    microbatches: int
    remat_policy: str


def meshes(num_chips: int, num_slices: int, *, num_experts: int = 1) -> Iterator[dict[str, int]]:
    """Yield mesh shapes to try, the usual first: all fsdp, then with more tensor or expert parallelism.

    Of a mixture of experts the expert axis is the largest power of two that divides the experts first.
    """
    each = num_chips // num_slices
    experts = [n for n in (1 << i for i in range(12)) if num_experts % n == 0 and each % n == 0]
    for model in (1, 2, 4, 8, 16):
        for expert in reversed(experts):
            if each % (model * expert) == 0:
                shape = {
                    "slice": num_slices,
                    "fsdp": each // model // expert,
                    "expert": expert,
                    "model": model,
                }
                yield {axis: size for axis, size in shape.items() if size > 1 or axis == "fsdp"}
    yield {axis: size for axis, size in {"slice": num_slices, "data": each}.items() if size > 1}


def _num_experts(config: Any) -> int:
    moe = getattr(config, "moe", None)
    return 1 if moe is None else moe.num_experts


def _plan(args: argparse.Namespace, devices: Sequence[Any]) -> int:
    from mtjax import aot, sharding
    from mtjax.launch import screen

    arguments = _arguments(args)
    config = arguments["model"].config
    selector = f"{type(config).__module__.rpartition('.')[2]}.{type(config).__name__}.remat_policy"
    shapes = list(meshes(len(devices), args.num_slices, num_experts=_num_experts(config)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table tells
        # A stable sort: meshes whose axes are whole physical ones are tried first.
        shapes.sort(key=lambda shape: bool(sharding.split_axes(sharding.make_mesh(shape, devices=devices))))
        found: list[tuple[Layout, Any]] = []
        failed: list[tuple[Layout, str]] = []
        left, not_tried = args.max_compiles, 0
        for shape in shapes:
            for layout in layouts(shape, arguments["data"].batch_size):
                if not left:
                    not_tried += 1
                    continue
                bindings = [
                    f"MESH={layout.mesh!r}",
                    f"MICROBATCHES={layout.microbatches}",
                    f"{selector}={layout.remat_policy}",
                ]
                print(f"{args.max_compiles - left + 1}/{args.max_compiles} {_name(layout)}", file=sys.stderr)
                try:
                    report = _compile(args, devices, bindings)
                except aot.DoesNotFit as error:
                    failed.append((layout, str(error)))
                except ValueError as error:  # this mesh does not divide this model or batch
                    failed.append((layout, str(error)))
                    break
                else:
                    if report.fits is not False:
                        found.append((layout, report))
                        left -= 1
                        break  # what recomputes more is slower
                    failed.append((layout, f"needs {screen.size(report.peak_bytes)}"))
                left -= 1
    found.sort(key=lambda pair: (pair[1].estimated_step_s or 0.0, len(pair[1].split_axes)))
    result = {
        "fits": [{**layout._asdict(), **dataclasses.asdict(report)} for layout, report in found],
        "does_not": [{**layout._asdict(), "why": why} for layout, why in failed],
        "not_tried": not_tried,
    }
    _write(args, result)
    if args.json:
        print(json.dumps(result))
    else:
        _print_plan(found, failed)
        if not_tried:
            print(f"{not_tried} layouts were not tried: --max_compiles={args.max_compiles}.")
    return 0 if found else 3


def layouts(mesh: Mapping[str, int], batch_size: int) -> Iterator[Layout]:
    """Yield layouts of one mesh, from the fastest that needs most memory to the most frugal."""
    shards = 1
    for axis, size in mesh.items():
        shards *= size if axis in ("slice", "data", "fsdp", "expert") else 1
    for policy, microbatches in (("none", 1), ("minimal", 1), ("minimal", 2), ("full", 1), ("full", 4)):
        if batch_size % (shards * microbatches) == 0:
            yield Layout(dict(mesh), microbatches, policy)


def _name(layout: Layout) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in layout.mesh.items())
    return f"{axes} microbatches={layout.microbatches} remat={layout.remat_policy}"


def _print_plan(found: Sequence[tuple[Layout, Any]], failed: Sequence[tuple[Layout, str]]) -> None:
    from mtjax.launch import screen

    rows = [
        (
            _name(layout),
            "unknown" if report.estimated_step_s is None else f"{report.estimated_step_s * 1e3:.1f} ms",
            "unknown" if report.estimated_mfu is None else f"{report.estimated_mfu:.0%}",
            screen.size(report.peak_bytes),
            "unknown" if report.margin is None else f"{report.margin:.0%}",
            ", ".join(report.split_axes) or "-",
        )
        for layout, report in found
    ]
    out = screen.console()
    out.print(
        screen.table("fits", ("layout", "step at best", "MFU at most", "peak", "free", "split axes"), rows)
    )
    if failed:
        out.print(
            screen.table("does not", ("layout", "why"), [(_name(layout), why) for layout, why in failed])
        )
