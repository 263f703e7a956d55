"""Read a compiled XLA module's text: loops with their trip counts, products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once and knows no mesh. Here every computation is weighed by
how often a step runs it, so a scanned stack costs what an unrolled one does. All figures are of one device.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # others end with their number of bits
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NOT_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
    "copy-done", "slice-done", "dynamic-slice-done", "all-gather-done", "all-reduce-done", "domain",
    "collective-permute-done", "send-done", "recv-done",
}  # fmt: skip


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def size(self) -> int:
        """Return the bytes."""
        width = _BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return math.prod(self.shape) * width // 8

    @property
    def is_in_hbm(self) -> bool:
        """Tell whether the array lies in main memory; S(n) in a layout names another space (on TPU VMEM)."""
        return "S(" not in self.layout


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str  # what follows the operands: attributes and metadata; a constant's value before them
    is_root: bool

    def attribute(self, name: str) -> str:
        """Return the text of an attribute such as calls=%fusion, '' where it is absent."""
        found = re.search(rf"[ ,]{name}=(\{{\{{.*?\}}\}}|\{{[^}}]*\}}|\"[^\"]*\"|[^\s,]+)", self.text)
        return found.group(1).strip('"') if found else ""

    @property
    def source(self) -> str:
        """Return the path of the jax operation that this came from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""

    @property
    def size(self) -> int:
        """Return the bytes of the result."""
        return sum(array.size for array in self.arrays)


class Collective(NamedTuple):
    """One collective operation, as one device takes part in it."""

    kind: str
    size: int  # bytes of the whole array: what a gather ends with, what a reduction or exchange starts with
    groups: tuple[tuple[int, ...], ...]  # device positions that take part together; pairs of a permutation
    times: int  # in a step
    source: str
    name: str

    @property
    def sent(self) -> float:
        """Return the bytes that a device sends in a step, by ring algorithms."""
        members = max((len(group) for group in self.groups), default=1)
        share = (members - 1) / members
        per_call = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.size * per_call


class Module:
    """A parsed module; see parse."""

    def __init__(self, computations: dict[str, dict[str, Instruction]], entry: str) -> None:
        self.computations = computations
        self.entry = entry

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """Return how often a step runs each computation that is not part of a fused instruction.

        Raises ValueError for a loop whose number of turns cannot be read.
        """
        times: dict[str, int] = {}
        stack = [(self.entry, 1)]
        while stack:
            name, count = stack.pop()
            times[name] = times.get(name, 0) + count
            for instruction in self.computations[name].values():
                stack += [(callee, count * turns) for callee, turns in self._calls(name, instruction)]
        return times

    def _calls(self, computation: str, instruction: Instruction) -> Iterator[tuple[str, int]]:
        if instruction.opcode == "while":
            yield instruction.attribute("body").lstrip("%"), self.trip_count(computation, instruction)
        elif instruction.opcode == "conditional":  # every branch once: an upper bound
            branches = instruction.attribute("branch_computations").strip("{}").split(", ")
            branches = [
                *branches,
                instruction.attribute("true_computation"),
                instruction.attribute("false_computation"),
            ]
            yield from ((branch.lstrip("%"), 1) for branch in branches if branch)
        elif instruction.opcode in ("call", "async-start"):
            callee = instruction.attribute("to_apply") or instruction.attribute("calls")
            yield callee.lstrip("%"), 1

    def trip_count(self, computation: str, loop: Instruction) -> int:
        """Return a while loop's number of turns, as XLA says it or from its counter."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known.group(1))
        condition, body = (self.computations[loop.attribute(a).lstrip("%")] for a in ("condition", "body"))
        counter = next((i for i in condition.values() if i.opcode == "get-tuple-element"), None)
        turns = None
        if counter is not None:
            index = int(counter.attribute("index"))
            root = _root(body)
            at = lambda values, name, x: self._evaluate(values, name, {("gte", index): x})  # noqa: E731
            start = None
            state = self.computations[computation].get(loop.operands[0])
            if state is not None and state.opcode == "tuple":
                start = at(self.computations[computation], state.operands[index], 0)
            step = at(body, root.operands[index], 0) if root.opcode == "tuple" else None
            turns = self._count(condition, index, start or 0, step)
        if turns is None:
            raise ValueError(
                f"Cannot read how often the loop {loop.name} ({loop.source}) runs, so no total can be told."
            )
        return turns

    def _count(
        self, condition: dict[str, Instruction], index: int, start: int, step: int | None
    ) -> int | None:
        if not step:
            return None
        for turns in range(1 << 20):
            goes_on = self._evaluate(condition, _root(condition).name, {("gte", index): start + turns * step})
            if goes_on is None:
                return None
            if not goes_on:
                return turns
        return None

    def _evaluate(self, values: dict[str, Instruction], name: str, known: dict) -> int | None:
        """Compute a scalar of a loop's counter, None where it depends on anything else."""
        if name in known:
            return known[name]
        instruction = values.get(name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            value = instruction.text.partition(")")[0]
            return int(value) if re.fullmatch(r"-?\d+", value) else None
        if instruction.opcode == "get-tuple-element":
            return known.get(("gte", int(instruction.attribute("index"))))
        operands = [self._evaluate(values, operand, known) for operand in instruction.operands]
        if any(operand is None for operand in operands):
            return None
        if instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
            return operands[0]
        if instruction.opcode in ("fusion", "call"):
            callee = instruction.attribute("calls") or instruction.attribute("to_apply")
            inside = self.computations[callee.lstrip("%")]
            parameters = {
                i.name: operands[int(i.text.partition(")")[0])]
                for i in inside.values()
                if i.opcode == "parameter"
            }
            return self._evaluate(inside, _root(inside).name, parameters)
        a, b = [*operands, 0, 0][:2]
        return {
            "add": lambda: a + b,
            "subtract": lambda: a - b,
            "compare": lambda: int({"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "NE": a != b, "EQ": a == b}[instruction.attribute("direction")]),
        }.get(instruction.opcode, lambda: None)()  # fmt: skip

    def inside(self, computation: str) -> Iterator[tuple[str, Instruction]]:
        """Yield (computation, instruction) of a computation and of what is fused into it."""
        for instruction in self.computations[computation].values():
            yield computation, instruction
            if instruction.opcode == "fusion":
                yield from self.inside(instruction.attribute("calls").lstrip("%"))

    # What a step costs -------------------------------------------------------------------------------------

    @functools.cached_property
    def flops(self) -> float:
        """Return the operations of all products in a step (2 a multiply-add)."""
        return sum(
            times * _flops(self.computations[where], instruction)
            for name, times in self.times.items()
            for where, instruction in self.inside(name)
        )

    @functools.cached_property
    def hbm_bytes(self) -> float:
        """Return the bytes that a step moves to and from main memory.

        Every instruction reads its operands and writes its result once; of an array that is only sliced the
        slice is read, of one that is updated in place the update is written.
        """
        return sum(
            times * self._traffic(self.computations[name], instruction)
            for name, times in self.times.items()
            for instruction in self.computations[name].values()
        )

    def _traffic(self, values: dict[str, Instruction], instruction: Instruction) -> int:
        if instruction.opcode in _NOT_TRAFFIC:
            return 0
        if instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            moved = min(array.size for array in instruction.arrays[:2])  # of a slice's operand a part
            return sum(moved for array in instruction.arrays[:2] if array.is_in_hbm)
        inside = None
        if instruction.opcode == "fusion":
            inside = self.computations[instruction.attribute("calls").lstrip("%")]
        return _read(values, instruction, inside) + _written(values, instruction, inside)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """List the collectives of a step, the parts of one that is spread over fusions once."""
        found, seen = [], set()
        for name, times in self.times.items():
            for where, instruction in self.inside(name):
                kind = instruction.opcode.removesuffix("-start")
                channel = (name, instruction.attribute("channel_id") or instruction.name)
                if kind not in COLLECTIVES or channel in seen:
                    continue
                seen.add(channel)
                if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # a TPU's, fused with the slice that a device keeps
                found.append(_collective(kind, instruction, times))
        return [collective for collective in found if any(len(group) > 1 for group in collective.groups)]


def parse(text: str) -> Module:
    """Parse the text of a compiled module, jax's `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head.group(1), {})
                entry = head.group(1) if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("This is no text of an XLA module: it has no ENTRY computation.")
    return Module(computations, entry)


def _balanced(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    left, separator, right = line.strip().partition(" = ")
    if not separator:
        return None
    end = _balanced(right, 0) if right.startswith("(") else right.find(" ")
    arrays = tuple(
        Array(dtype, tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if n), layout or "")
        for dtype, dims, layout in _ARRAY.findall(right[:end])
    )
    opcode, _, _ = right[end:].strip().partition("(")
    start = right.find("(", end)
    close = _balanced(right, start)
    inner = right[start + 1 : close - 1]
    has_value = opcode in ("constant", "parameter")
    operands = () if has_value else tuple(re.findall(r"%([\w.\-]+)", inner))
    text = f"{inner}){right[close:]}" if has_value else right[close:]
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"), arrays, opcode, operands, text, left.startswith("ROOT ")
    )


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _flops(values: dict[str, Instruction], instruction: Instruction) -> float:
    """Count one instruction's multiply-adds, times 2; of a custom call what its author declared."""
    if instruction.opcode == "custom-call":
        declared = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.text)
        return float(declared.group(1)) if declared else 0.0
    if instruction.opcode not in ("dot", "convolution", "ragged-dot"):
        return 0.0
    left, right = (values[name].arrays[0].shape for name in instruction.operands[:2])
    out = math.prod(instruction.arrays[0].shape)
    if instruction.opcode != "convolution":
        return 2.0 * out * math.prod(left[d] for d in _numbers(instruction.attribute("lhs_contracting_dims")))
    return 2.0 * _convolution(left, right, instruction)


def _convolution(left: Sequence[int], right: Sequence[int], instruction: Instruction) -> float:
    """Count a convolution's multiply-adds: a product on TPU is one, batch dims its dilated spatial ones."""
    of_left, of_right, of_out = re.split(r"_|->", instruction.attribute("dim_labels"))
    out = instruction.arrays[0].shape
    total = out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    window = dict(part.split("=") for part in instruction.attribute("window").strip("{}").split())
    rank = sum(label.isdigit() for label in of_out)

    def each(name: str, default: str) -> list[str]:
        return window.get(name, "x".join([default] * rank)).split("x")

    for dim in range(rank):
        low = int(each("pad", "0_0")[dim].split("_")[0])
        stride, dilate_left, dilate_right = (
            int(each(name, "1")[dim]) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        size = left[of_left.index(str(dim))]
        at = np.arange(out[of_out.index(str(dim))])[:, None] * stride - low
        at = at + np.arange(right[of_right.index(str(dim))]) * dilate_right
        total *= int(((at >= 0) & (at <= (size - 1) * dilate_left) & (at % dilate_left == 0)).sum())
    return float(total)


def _read(
    values: dict[str, Instruction], instruction: Instruction, inside: dict[str, Instruction] | None
) -> int:
    total = 0
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return sum(array.size for array in instruction.arrays if array.is_in_hbm)
    for position, name in enumerate(instruction.operands):
        operand = values.get(name)
        if operand is None or (instruction.opcode == "dynamic-update-slice" and position == 0):
            continue
        size = sum(array.size for array in operand.arrays if array.is_in_hbm)
        if size and inside is not None:
            size = min(size, _fused_read(inside, position, size))
        total += size
    return total


def _fused_read(inside: dict[str, Instruction], position: int, size: int) -> int:
    """Return how much a fusion reads of the operand at a position."""
    parameter = next(
        i for i in inside.values() if i.opcode == "parameter" and int(i.text.partition(")")[0]) == position
    )
    users = [i for i in inside.values() if parameter.name in i.operands]
    if any(i.opcode == "dynamic-update-slice" and i.operands[0] == parameter.name for i in users):
        users = [i for i in users if i.opcode != "dynamic-update-slice"]
    if all(i.opcode in ("dynamic-slice", "slice", "gather") for i in users):
        return sum(i.size for i in users)
    return size


def _written(
    values: dict[str, Instruction], instruction: Instruction, inside: dict[str, Instruction] | None
) -> int:
    if instruction.opcode == "dynamic-update-slice":
        update = values.get(instruction.operands[1])
        return update.size if update is not None else 0
    size = sum(array.size for array in instruction.arrays if array.is_in_hbm)
    if inside is not None:
        for update in (i for i in inside.values() if i.opcode == "dynamic-update-slice"):
            size -= update.size - inside[update.operands[1]].size
    return max(size, 0)


def _collective(kind: str, instruction: Instruction, times: int) -> Collective:
    arrays = [
        array
        for array in instruction.arrays
        if array.dtype != "token" and (array.shape or kind == "all-reduce")
    ]
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
    if kind == "collective-permute":
        groups = _groups(instruction.attribute("source_target_pairs"))
        groups = tuple(pair for pair in groups if pair[0] != pair[1])
    else:
        found = re.search(r"replica_groups=(mesh\[.*?\].*? \{.*?\}|\{\{.*?\}\}|\S+?)(, |$)", instruction.text)
        groups = _groups(found.group(1) if found else "")
    size = sum(array.size for array in arrays)
    if instruction.opcode.startswith("reduce-scatter"):
        size *= max((len(group) for group in groups), default=1)
    return Collective(kind, size, groups, times, instruction.source, instruction.name)


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Read the groups of a collective in the ways that XLA writes them.

    {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0); mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, where 'b':(1)2 would be
    a part of an axis.
    """
    if text.startswith("{{"):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text))
    if found := re.fullmatch(r"\[([\d,]+)\]<=(.*)", text):
        return tuple(map(tuple, _tiled(found.group(2)).reshape(_numbers(found.group(1))).tolist()))
    if found := re.fullmatch(r"mesh\[([^\[\]]*)\](?:, device_ids=\((.*)\))? \{([^{}]*)\}", text):
        return _mesh_groups(*found.groups())
    raise ValueError(f"Cannot read the replica groups {text!r} of a collective.")


def _tiled(text: str) -> np.ndarray:
    """Return the devices of [2,2]T(1,0), counted in that shape and transposed, or of a plain list."""
    if found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, transpose = found.groups()
        devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
        return devices.transpose(_numbers(transpose)) if transpose else devices
    if re.fullmatch(r"[\d,]+", text):
        return np.array(_numbers(text))
    raise ValueError(f"Cannot read the devices {text!r} of a collective.")


def _mesh_groups(axes: str, order: str | None, chosen: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    dims: list[int] = []
    members: list[int] = []  # of dims, those that a group spans
    parts = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        part = part or size // before
        dims += [before, part, size // before // part]
        members += [len(dims) - 2]
    devices = np.arange(math.prod(dims)) if order is None else _tiled(order)
    devices = np.moveaxis(devices.reshape(dims), members, range(-len(members), 0))
    return tuple(map(tuple, devices.reshape(-1, math.prod(dims[dim] for dim in members)).tolist()))
