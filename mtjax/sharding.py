"""The device mesh, ordered (path regex, PartitionSpec) rules, and global arrays.

Nothing here names a model: a rule says over which mesh axes a parameter of that path is cut, written for one
layer. jax then partitions the computation.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mtjax import tree
from mtjax.types import Array, Batch, Params, PyTree

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("slice", "data", "fsdp", "sequence", "expert", "model")
ROW_AXES = ("slice", "data", "fsdp", "expert")  # a batch's rows are cut over these

PARAMETER_RULES: Rules = (
    (r"(.*/)?token_embedder/embedding", P("model", "fsdp")),
    (r".*/(query|key|value)/kernel", P("fsdp", "model")),
    (r".*/(attention|self_attention|encoder_decoder_attention)/out/kernel", P("model", "fsdp")),
    (r".*/mlp/expert/wi(_\d+)?/kernel", P("expert", "fsdp", "model")),
    (r".*/mlp/expert/wo/kernel", P("expert", "model", "fsdp")),
    (r".*/mlp/(extra/)?wi(_\d+)?/kernel", P("fsdp", "model")),
    (r".*/mlp/(extra/)?wo/kernel", P("model", "fsdp")),
    (r".*/mlp/router/router_weights/w/kernel", P("fsdp")),
    (r".*/mlp/router/.*", P()),
    (r".*/logits_dense/kernel", P("fsdp", "model")),
    # Heads need not divide the model axis where their joined width does, and this is tiny.
    (r".*relpos_bias/rel_embedding", P()),
    (r".*/scale", P()),
    (r"task_heads/task_kernel", P()),
)
"""T5's parameters: matrices over 'fsdp' along the model width and over 'model' along the other dim."""

ACTIVATION_RULES: Rules = (
    # Looked up with the width cut as the table's, then exchanged for rows: gathering either is dearer.
    (r"embedding/lookup", P(("slice", "data"), "sequence", ("fsdp", "expert"))),  # [B, L, D]
    (r"residual", P(ROW_AXES, "sequence")),  # [B, L, D]
    (r"attention/query", P(ROW_AXES, "model", "sequence")),  # [B, H, L, K]
    (r"attention/(key|value)", P(ROW_AXES, "model")),  # [B, H, S, K]: a query sees keys of the whole row
    (r"mlp/hidden", P(ROW_AXES, "sequence", "model")),  # [B, L, F]
    (r"logits", P(ROW_AXES, "sequence", "model")),  # [B, L, V]
)
"""Activations, named where the models call `constrain`: rows and lengths as in a batch, heads and widths over
'model'."""


# --- Mesh -------------------------------------------------------------------------------------------------


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _axis_sizes(shape: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Complete a mesh shape to the size of every axis in AXES."""
    for name, size in shape.items():
        if name not in AXES:
            raise tree.unknown_name("mesh axis", name, AXES)
        if size != -1 and size < 1:
            raise ValueError(f"Mesh axis {name!r} has size {size}; give a positive size, or -1 for the rest.")
    rest = [name for name, size in shape.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"Only one mesh axis can be -1 (the rest of the devices), got {rest}.")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if num_devices % fixed or (not rest and fixed != num_devices):
        raise ValueError(
            f"The mesh {dict(shape)} needs {'a multiple of ' if rest else ''}{fixed} devices, but there are "
            f"{num_devices}. The sizes must multiply to {num_devices}: use sizes out of "
            f"{_divisors(num_devices)}, and -1 for one axis that takes the rest."
        )
    return tuple(num_devices // fixed if shape.get(name) == -1 else shape.get(name, 1) for name in AXES)


def make_mesh(shape: Mapping[str, int] | None = None, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh of all devices, by default {'data': -1}.

    One axis may be -1, the rest of the devices; absent axes have size 1, but 'slice' the number of TPU slices
    (pods joined by the data-centre network), whose index it is. Warns where an axis has to split a physical
    one. Raises ValueError for an unknown axis and for sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = {getattr(device, "slice_index", None) or 0 for device in devices if device.platform == "tpu"}
    num_slices = max(len(slices), 1)
    shape = {"slice": num_slices, **({"data": -1} if shape is None else shape)}
    if num_slices > 1 and shape["slice"] != num_slices:
        raise ValueError(
            f"These devices form {num_slices} slices; set the mesh axis 'slice' to {num_slices}."
        )
    sizes = _axis_sizes(shape, len(devices))
    # Some shapes, such as 4 x 128 on a cube of 8 x 8 x 8, need a physical axis in two logical ones.
    if num_slices > 1:
        across = (num_slices,) + (1,) * (len(AXES) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *sizes[1:]), across, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if split := split_axes(mesh):
        warnings.warn(
            f"The mesh axes {split} of {dict(zip(AXES, sizes, strict=True))} each take only a part of a physical "
            f"axis of this slice, {_torus(mesh)}: their rings are open, so their collectives may take twice as "
            "long. Sizes that are products of whole physical axes avoid it.",
            stacklevel=2,
        )
    return mesh


def physical_positions(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Return where a mesh's TPU devices lie in their slice, [*mesh, D], and the slice's sizes [D].

    The last of the D physical dims is the core on a chip.
    """
    places = np.array([(*device.coords, device.core_on_chip) for device in mesh.devices.flat])
    return places.reshape(*mesh.devices.shape, -1), 1 + places.max(axis=0)


def _torus(mesh: Mesh) -> str:
    """Describe the physical axes of a TPU slice, as in '4 x 4'."""
    return " x ".join(str(size) for size in physical_positions(mesh)[1] if size > 1)


def split_axes(mesh: Mesh) -> list[str]:
    """List the mesh axes that take only a part of a TPU slice's physical axis; none on other platforms."""
    if not hasattr(mesh.devices.flat[0], "coords"):
        return []
    positions, sizes = physical_positions(mesh)
    split = []
    for dim, axis in enumerate(mesh.axis_names):
        if axis == "slice" or mesh.shape[axis] == 1:
            continue
        line = np.moveaxis(positions, dim, 0).reshape(mesh.shape[axis], -1, len(sizes))
        varies = (line != line[:1]).any(axis=(0, 1))
        if sizes[varies].prod() != mesh.shape[axis]:
            split.append(axis)
    return split


class _Traced(NamedTuple):
    """What a function under `on_mesh` is traced for."""

    mesh: Mesh
    rules: Rules


_TRACED: contextvars.ContextVar[_Traced | None] = contextvars.ContextVar("traced", default=None)


@contextlib.contextmanager
def tracing(mesh: Mesh, rules: Rules = ACTIVATION_RULES) -> Iterator[None]:
    """Make a mesh and the rules of activations visible to what is traced in the body."""
    token = _TRACED.set(_Traced(mesh, rules))
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _TRACED.reset(token)


def on_mesh(function: Callable[..., Any], mesh: Mesh, rules: Rules = ACTIVATION_RULES) -> Callable[..., Any]:
    """Wrap a function that is going to be jitted, so that its body sees the mesh."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with tracing(mesh, rules):
            return function(*args, **kwargs)

    return wrapped


def current_mesh() -> Mesh | None:
    """Return the mesh that the running trace is for; None outside of `tracing` and `on_mesh`."""
    traced = _TRACED.get()
    return None if traced is None else traced.mesh


def platform() -> str:
    """Return the platform the running trace is for: 'cpu', 'gpu' or 'tpu', present here or not."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def constrain(x: Array, name: str) -> Array:
    """Lay out an activation as the rule for its name says; without a mesh, or on one device, return x.

    A dim that its axes do not divide (one decoded position, an odd number of heads) is left to the compiler.
    Raises ValueError for a name without a rule, and a rule for more dims than x has.
    """
    traced = _TRACED.get()
    if traced is None or traced.mesh.size == 1:
        return x
    spec = tuple(tree.lookup(traced.rules, name, what="activation"))
    if len(spec) > x.ndim:
        raise ValueError(f"The rule {spec} for activation {name!r} has more dims than its shape {x.shape}.")
    spec += (None,) * (x.ndim - len(spec))
    sizes = [math.prod(traced.mesh.shape[axis] for axis in _axes_of(entry)) for entry in spec]
    fitting = [
        P.UNCONSTRAINED if size % parts else entry
        for size, parts, entry in zip(x.shape, sizes, spec, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(traced.mesh, P(*fitting)))


def abstract_mesh(shape: Mapping[str, int], num_devices: int) -> AbstractMesh:
    """Build the mesh of devices that are not here, for a dry run."""
    return AbstractMesh(_axis_sizes(shape, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Count the parts that a batch's rows are cut into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_divides(
    mesh: Mesh | AbstractMesh, batch_size: int, *, lengths: Mapping[str, int] | None = None
) -> None:
    """Raise ValueError where the mesh does not divide a batch's rows, or its lengths by feature."""
    shards = num_row_shards(mesh)
    if batch_size % shards:
        sizes = {axis: mesh.shape[axis] for axis in ROW_AXES if mesh.shape[axis] > 1}
        near = [n for n in (batch_size // shards * shards, -(-batch_size // shards) * shards) if n]
        raise ValueError(
            f"{batch_size} rows cannot be cut into {shards} equal parts, the mesh's {sizes}. Use "
            f"{' or '.join(map(str, near))} rows, or a mesh whose {ROW_AXES} multiply to one of "
            f"{_divisors(batch_size)}."
        )
    for feature, length in (lengths or {}).items():
        if length % mesh.shape["sequence"]:
            raise ValueError(
                f"The length {length} of {feature!r} is not a multiple of the mesh axis 'sequence' "
                f"({mesh.shape['sequence']}); it fits {_divisors(length)}."
            )


# --- Parameters and state ---------------------------------------------------------------------------------


def _axes_of(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check_spec(mesh: Mesh | AbstractMesh, path: str, shape: Sequence[int], spec: Sequence[Any]) -> None:
    for dim, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        axes = _axes_of(entry)
        for axis in axes:
            if axis not in mesh.shape:
                raise tree.unknown_name(f"mesh axis in the rule for {path}:", axis, list(mesh.shape))
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"Parameter {path} {tuple(shape)}: dim {dim} of size {size} is not divisible by mesh axis "
                f"{' x '.join(map(repr, axes))} of size {parts}. Sizes that fit: {_divisors(size)}. Change the "
                "mesh, or give this path a rule of its own."
            )


def _parameter_spec(mesh: Mesh | AbstractMesh, rules: Rules, path: str, shape: Sequence[int]) -> tuple:
    """Return one entry per dim: None for layer dims, then the rule's, then None."""
    rule = tuple(tree.lookup(rules, path))
    layers = tree.num_layer_dims(path)
    if layers + len(rule) > len(shape):
        raise ValueError(
            f"Parameter {path} {tuple(shape)}: its rule {rule} is for {len(rule)} dims"
            f"{f' after {layers} of layers' if layers else ''}; write one for {len(shape) - layers}."
        )
    spec = (None,) * layers + rule + (None,) * (len(shape) - layers - len(rule))
    _check_spec(mesh, path, shape, spec)
    return spec


def parameter_shardings(mesh: Mesh | AbstractMesh, rules: Rules, abstract_params: Params) -> Params:
    """Map every parameter to the NamedSharding of the first rule that matches its path.

    Rules are written for one layer; stacked layers (tree.num_layer_dims) get a leading None. Raises
    ValueError for a path without a rule, an axis the mesh lacks, and a dim its axis does not divide.
    """
    return tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, P(*_parameter_spec(mesh, rules, path, leaf.shape))),
        abstract_params,
    )


def _followed_spec(path: str, leaf: Sequence[int], shape: Sequence[int], spec: tuple) -> tuple:
    """Return the spec of a state's leaf that belongs to a parameter of this shape and spec.

    The leaf is as large as the parameter, or has further leading dims (one gradient a group), or lacks one
    dim (Adafactor's v_row and v_col); anything else is replicated.
    """
    extra = len(leaf) - len(shape)
    if extra >= 0 and tuple(leaf[extra:]) == tuple(shape):
        return (None,) * extra + spec
    missing = [d for d in range(len(shape)) if tuple(shape[:d]) + tuple(shape[d + 1 :]) == tuple(leaf)]
    if not missing:
        return ()
    # Of a square matrix v_row lacks the last dim and v_col the one before.
    dim = missing[-1] if "v_row" in path.split("/") else missing[0]
    return spec[:dim] + spec[dim + 1 :]


def state_shardings(
    mesh: Mesh | AbstractMesh, rules: Rules, abstract_state: PyTree, abstract_params: Params
) -> PyTree:
    """Map every leaf of an optimizer's or balancer's state to a NamedSharding.

    A leaf whose path ends with a parameter's path follows that parameter; everything else is replicated.
    """
    shapes = {path: leaf.shape for path, leaf in tree.flatten(abstract_params).items()}
    specs = {path: _parameter_spec(mesh, rules, path, shape) for path, shape in shapes.items()}

    def one(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
        name = next((suffix for suffix in suffixes if suffix in specs), None)
        spec = () if name is None else _followed_spec(path, leaf.shape, shapes[name], specs[name])
        return NamedSharding(mesh, P(*spec))

    return tree.map_with_path(one, abstract_state)


def bytes_per_device(abstract: PyTree, shardings: PyTree) -> int:
    """Sum the bytes that one device holds of a tree."""
    sizes = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        abstract,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


# --- Batches ----------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of a [B, L] feature: rows over ROW_AXES, length over 'sequence'."""
    return NamedSharding(mesh, P(ROW_AXES, "sequence"))


def data_hosts(mesh: Mesh) -> tuple[int, int]:
    """Return (how many hosts read different rows, which of them this process is).

    Processes that share rows, because 'model' or 'sequence' spans them, get the same number and must feed
    the same rows. Raises ValueError where the rows of two hosts overlap in part.
    """
    rows = NamedSharding(mesh, P(ROW_AXES)).devices_indices_map((num_row_shards(mesh),))
    held: dict[int, set[int]] = {}
    for device, (index,) in rows.items():
        held.setdefault(device.process_index, set()).add(index.indices(num_row_shards(mesh))[0])
    groups = sorted({tuple(sorted(starts)) for starts in held.values()})
    if sum(map(len, groups)) != num_row_shards(mesh):
        raise ValueError(
            f"The rows of hosts overlap in part: {groups}. Choose axis sizes that divide each host's devices."
        )
    mine = held.get(jax.process_index())
    if mine is None:
        raise ValueError("This process has no device in the mesh; build the mesh of all devices.")
    return len(groups), groups.index(tuple(sorted(mine)))


def global_batch(mesh: Mesh, local: Mapping[str, np.ndarray]) -> Batch:
    """Assemble the rows of every host into global arrays, sharded as `batch_sharding` says.

    `local` holds this host's rows [B / hosts, L] (or [B / hosts] per-row features).
    """
    spec = batch_sharding(mesh).spec
    return {
        name: jax.make_array_from_process_local_data(NamedSharding(mesh, P(*spec[: x.ndim])), x)
        for name, x in local.items()
    }
