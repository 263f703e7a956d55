"""Compile a run's step for hardware that is not here, and read off what it would take.

libtpu compiles for any TPU slice on any x86 machine; jax hands it over through jax.experimental.topologies. The
time is a roofline: the largest of products over peak, memory traffic over bandwidth, and collectives over
links, each from the compiled module weighed by its loops (mtjax.hlo). The compiler's own estimate counts a
scanned layer once, so it is reported only where it is above that roof.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtjax import hardware, hlo, sharding
from mtjax.data import pipeline
from mtjax.program import Program
from mtjax.types import Model

# libtpu looks for a TPU's own services otherwise, and two processes that load it abort.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class DoesNotFit(ValueError):
    """The compiler found no way to run the step in a chip's memory."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step takes; bytes, operations and seconds of one chip and one step unless said otherwise."""

    topology: str
    num_slices: int
    device_kind: str
    chips: int
    mesh: dict[str, int]
    split_axes: list[str]  # mesh axes that take only a part of a physical axis
    hbm_bytes: int | None
    parameter_bytes: int
    optimizer_bytes: int
    host_bytes: int  # offloaded
    temporary_bytes: int  # activations, gradients, gathered weights
    code_bytes: int
    peak_bytes: int
    fits: bool | None
    margin: float | None  # the part of memory that stays free
    flops_compiled: float
    flops_model: float  # analytic; above it flops_compiled recomputes
    memory_traffic_bytes: float
    collective_bytes: dict[str, float]  # sent, by mesh axis ('fsdp', or 'data+fsdp' for both at once)
    collective_counts: dict[str, int]  # by kind
    roofline_s: dict[str, float] | None  # products, memory, collectives
    compiler_s: float | None  # the compiler's estimate; None where it is below the roof, and so wrong
    estimated_step_s: float | None
    estimated_mfu: float | None
    estimated_tokens_per_s_per_chip: float | None  # input and target positions
    compile_s: float


def devices(topology: str, *, num_slices: int = 1) -> list[Any]:
    """Return the devices of a topology such as v5p:4x4x4, or of cpu:8 this process's own.

    Raises ValueError where the topology does not exist, or libtpu or the CPU devices are missing.
    """
    kind = hardware.topology_kind(topology)
    if num_slices < 1:
        raise ValueError(f"num_slices must be at least 1, got {num_slices}.")
    if kind == "cpu":
        count = int(topology.partition(":")[2])
        if num_slices != 1 or len(jax.devices("cpu")) < count:
            raise ValueError(
                f"{topology} with {num_slices} slices needs {count} CPU devices in one slice, here are "
                f"{len(jax.devices('cpu'))}: set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
            )
        return jax.devices("cpu")[:count]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if kind == "TPU v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on a Cloud TPU
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        hint = (
            "pip install mtjax[tpu]"
            if "libtpu" in str(error)
            else "see cloud.google.com/tpu/docs for the shapes"
        )
        raise ValueError(f"No topology {topology!r} ({hint}): {str(error).splitlines()[0]}") from error
    return list(found.devices)


def abstract_batch(model: Model, data: pipeline.TrainData, mesh: Mesh, *, num_tasks: int) -> dict[str, Any]:
    """Return the shapes and shardings of a run's packed batch, without the batch."""
    row = pipeline.synthetic_batch(
        data.lengths, 1, model.config.vocab_size, num_tasks, seed=0, architecture=data.architecture
    )
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((data.batch_size, *x.shape[1:]), x.dtype, sharding=rows)
        for name, x in row.items()
    }


def compile_step(
    run: Program, *, model: Model, data: pipeline.TrainData, topology: str, num_slices: int = 1
) -> tuple[Report, hlo.Module]:
    """Compile a program's step for its mesh, whose devices may be absent, and report.

    Raises DoesNotFit where the compiler runs out of the chip's memory.
    """
    started = time.perf_counter()
    batch = abstract_batch(model, data, run.mesh, num_tasks=len(run.tasks.names))
    try:
        compiled = run.step.lower(run.abstract, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
        ) from error
    seconds = time.perf_counter() - started
    module = hlo.parse(compiled.as_text())
    return _report(run, compiled, module, model, data, topology, num_slices, seconds), module


def _report(
    run: Program,
    compiled: Any,
    module: hlo.Module,
    model: Model,
    data: pipeline.TrainData,
    topology: str,
    num_slices: int,
    seconds: float,
) -> Report:
    mesh = run.mesh
    chips, kind = mesh.size, mesh.devices.flat[0].device_kind
    chip = hardware.chip(kind)
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    sent = collective_bytes(module, mesh)
    counts: dict[str, int] = {}
    for collective in module.collectives:
        counts[collective.kind] = counts.get(collective.kind, 0) + collective.times
    flops_model = model.flops(data.batch_size, lengths=data.lengths) / chips
    roofs = None if chip is None else roofline(chip, mesh, module, sent)
    step = None if roofs is None else max(roofs.values())
    compiler = (compiled.cost_analysis() or {}).get("optimal_seconds")
    compiler = compiler if step is not None and compiler is not None and compiler >= step else None
    step = compiler or step
    positions = data.batch_size * sum(data.lengths.values())
    state = {
        name: sharding.bytes_per_device(getattr(run.abstract, name), getattr(run.shardings, name))
        for name in ("params", "frozen", "average", "opt", "balance")
    }
    return Report(
        topology=topology,
        num_slices=num_slices,
        device_kind=kind,
        chips=chips,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        split_axes=sharding.split_axes(mesh),
        hbm_bytes=chip and chip.hbm_bytes,
        parameter_bytes=state["params"] + state["frozen"] + state["average"],
        optimizer_bytes=state["opt"] + state["balance"],
        host_bytes=memory.host_argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=peak,
        fits=chip and peak <= chip.hbm_bytes,
        margin=chip and 1 - peak / chip.hbm_bytes,
        flops_compiled=module.flops,
        flops_model=flops_model,
        memory_traffic_bytes=module.hbm_bytes,
        collective_bytes=sent,
        collective_counts=counts,
        roofline_s=roofs,
        compiler_s=compiler,
        estimated_step_s=step,
        estimated_mfu=chip and step and flops_model / chip.flops / step,
        estimated_tokens_per_s_per_chip=step and positions / step / chips,
        compile_s=seconds,
    )


# --- Collectives on a mesh --------------------------------------------------------------------------------


def axes_of(groups: Sequence[Sequence[int]], mesh: Mesh) -> str:
    """Name the mesh axes along which the members of collective groups differ, joined by '+'."""
    places = [np.array(np.unravel_index(list(group), mesh.devices.shape)) for group in groups]
    varies = [
        any((place[dim] != place[dim][0]).any() for place in places) for dim in range(mesh.devices.ndim)
    ]
    return "+".join(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)


def collective_bytes(module: hlo.Module, mesh: Mesh) -> dict[str, float]:
    """Sum the bytes that a chip sends in a step, by mesh axes."""
    sent: dict[str, float] = {}
    for collective in module.collectives:
        axes = axes_of(collective.groups, mesh)
        sent[axes] = sent.get(axes, 0.0) + collective.sent
    return sent


def roofline(
    chip: hardware.Chip, mesh: Mesh, module: hlo.Module, sent: Mapping[str, float]
) -> dict[str, float]:
    """Return the least seconds of a step for its products, its memory traffic and its collectives.

    Collectives of one mesh axis after those of another; a ring around a torus goes both ways at once, along
    each physical axis that the mesh axis has.
    """
    seconds = 0.0
    for axes, size in sent.items():
        names = axes.split("+")
        if "slice" in names:
            seconds += size / chip.network_bandwidth
        else:
            seconds += size / _bandwidth(chip, mesh, names)
    return {
        "products": module.flops / chip.flops,
        "memory": module.hbm_bytes / chip.hbm_bandwidth,
        "collectives": seconds,
    }


def _bandwidth(chip: hardware.Chip, mesh: Mesh, axes: Sequence[str]) -> float:
    """Return the bytes a second that a chip can send along mesh axes."""
    positions, sizes = sharding.physical_positions(mesh)
    dims = [mesh.axis_names.index(axis) for axis in axes]
    line = np.moveaxis(positions, dims, range(len(dims))).reshape(
        int(np.prod([mesh.shape[axis] for axis in axes])), -1, len(sizes)
    )
    varies = (line != line[:1]).any(axis=(0, 1))
    rings = 0.0
    for dim in np.flatnonzero(varies):
        is_whole = len(np.unique(line[:, 0, dim])) == sizes[dim]
        rings += 2.0 if is_whole and sizes[dim] % chip.wraps_from == 0 else 1.0
    return max(rings, 1.0) * chip.link_bandwidth
