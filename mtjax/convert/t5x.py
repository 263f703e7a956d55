"""T5X checkpoints: legacy ones (msgpack beside zarr arrays) and Orbax ones, of its T5 examples.

Parameters, step and Adafactor's moments are read and written; convert/t5x_layout has both networks' trees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

from mtjax import checkpoint, lazy, tree
from mtjax.convert import t5x_layout
from mtjax.convert.weights import Weights, check_plain_decoder, checked
from mtjax.lazy import LazyArray, Leaf
from mtjax.models import t5

_NDARRAY, _NUMPY_SCALAR = 1, 3  # flax's msgpack extension codes
_FILE = "checkpoint"
_MIN_VERSION = 2
_DECODING = {"normaliser": "t5x", "stopping": "t5x", "alpha": 0.6}  # of t5x.decoding.beam_search


def read(directory: str | pathlib.Path, *, max_distance: int = 128, activation: str = "gelu") -> Weights:
    """Open `checkpoint_<step>`, or the last one in a model directory: parameters, and Adafactor's moments.

    T5X keeps the configuration in a gin file, so sizes are read off the shapes; max_distance of the relative
    bias and the gated block's activation are not visible there. Raises ValueError naming what does not fit.
    """
    folder = find(directory)
    is_orbax = (folder / "state").is_dir() or (folder / "_CHECKPOINT_METADATA").is_file()
    arrays = _open_orbax(folder) if is_orbax else _open_legacy(folder)
    target, states = _under(arrays, "target/"), _under(arrays, "state/param_states/")
    leaves = t5x_layout.parameters(target)
    config = _config(leaves, max_distance=max_distance, activation=activation)
    weights = Weights(
        dataclasses.replace(config, scan_layers=t5x_layout.is_scanned(target)),
        leaves,
        {"format": "t5x", "name": f"{folder.parent.name}/{folder.name}"},
        step=int(folder.name.rpartition("_")[2]),
        optimizer=t5x_layout.moments(states, target),
        decoding=_DECODING,
    )
    return checked(weights, source=repr(str(folder)))


def _under(arrays: Mapping[str, Leaf], prefix: str) -> dict[str, Leaf]:
    return {path.removeprefix(prefix): leaf for path, leaf in arrays.items() if path.startswith(prefix)}


def find(directory: str | pathlib.Path) -> pathlib.Path:
    """Return the folder checkpoint_<step> that a path means: itself, or the last one in it."""
    directory = pathlib.Path(directory)
    if re.fullmatch(r"checkpoint_\d+", directory.name) and directory.is_dir():
        return directory
    found = [path for path in directory.glob("checkpoint_*") if path.name[11:].isdigit() and path.is_dir()]
    if not found:
        raise ValueError(
            f"{str(directory)!r} is no T5X checkpoint: it is no checkpoint_<step> and holds none."
        )
    return max(found, key=lambda path: int(path.name[11:]))


# --- Legacy -----------------------------------------------------------------------------------------------


def _open_legacy(folder: pathlib.Path) -> dict[str, Leaf]:
    """Open the arrays of a legacy checkpoint, by path under `target` and `state`."""
    path = folder / _FILE
    try:
        contents = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False)
        version, optimizer = contents.get("version", 0), contents["optimizer"]
        leaves = {"target": optimizer["target"], "state": optimizer.get("state", {})}
    except (OSError, ValueError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"{str(path)!r} is no T5X checkpoint, or damaged: {error!r}") from error
    if version < _MIN_VERSION:
        raise ValueError(f"{str(path)!r} has version {version}; {_MIN_VERSION} and later are read.")
    return {name: _open(leaf, folder, name) for name, leaf in _leaves(leaves)}


def _extension(code: int, data: bytes) -> Any:
    if code == _NDARRAY:
        shape, dtype, buffer = msgpack.unpackb(data, raw=True)
        name = dtype.decode()
        kind = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
        return np.frombuffer(buffer, kind).reshape(shape)
    if code == _NUMPY_SCALAR:
        return _extension(_NDARRAY, data)[()]
    raise ValueError(f"unknown msgpack extension {code}")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree of dicts: arrays, and specifications of tensorstore arrays."""
    if isinstance(node, Mapping) and "driver" not in node:
        for name, child in node.items():
            yield from _leaves(child, f"{prefix}/{name}" if prefix else name)
    else:
        yield prefix, node


def _open(leaf: Any, folder: pathlib.Path, name: str) -> Leaf:
    """Return an inline array, or open the zarr array in the checkpoint's folder, wherever it was written."""
    if not isinstance(leaf, Mapping):
        return np.asarray(leaf)
    stored = leaf.get("kvstore", {}).get("path") or leaf.get("path")
    if not stored:
        raise ValueError(f"Tensor {name!r} of {str(folder)!r} has no path: {dict(leaf)}.")
    path = folder / pathlib.PurePosixPath(stored.rstrip("/")).name
    with _naming(name, path):
        if json.loads((path / ".zarray").read_text("utf-8")).get("dtype") == "<u2":
            raise ValueError("it is uint16, an old way to write bfloat16 that is not read")
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "fill_missing_data_reads": False,  # a lost chunk would be zeros
        }
        opened = ts.open(spec, open=True, read=True).result()
    stored = LazyArray(opened.shape, opened.dtype.numpy_dtype, lambda: opened.read().result())
    return LazyArray(stored.shape, stored.dtype, functools.partial(_read, stored, name, path))


@contextlib.contextmanager
def _naming(name: str, path: pathlib.Path) -> Iterator[None]:
    """Turn what goes wrong in reading a tensor into a ValueError that names it and its file."""
    try:
        yield
    except (ValueError, OSError) as error:
        name = name.removeprefix("target/")
        raise ValueError(f"Tensor {name!r}: cannot read {str(path)!r}: {str(error)[:300]}") from error


# --- Orbax ------------------------------------------------------------------------------------------------


def _open_orbax(folder: pathlib.Path) -> dict[str, Leaf]:
    """Open the arrays of an Orbax checkpoint, by path under `target` and `state`."""
    state = epath.Path(folder.absolute()) / "state"
    with _naming("all", folder):
        try:
            entries = json.loads((state / "_METADATA").read_text())["tree_metadata"].values()
        except KeyError as error:
            raise ValueError(f"its _METADATA has no {error}") from error
        paths = ["/".join(str(part["key"]) for part in entry["key_metadata"]) for entry in entries]
        names = [path for path in paths if path.startswith(("target/", "state/param_states/"))]
        stored = checkpoint.stored_arrays(state, names)
    return {
        name: LazyArray(leaf.shape, leaf.dtype, functools.partial(_read, leaf, name, folder))
        for name, leaf in stored.items()
    }


def _read(stored: LazyArray, name: str, path: pathlib.Path) -> np.ndarray:
    with _naming(name, path):
        return stored.read()


# --- The configuration ------------------------------------------------------------------------------------


def _config(leaves: Mapping[str, Leaf], *, max_distance: int, activation: str) -> t5.T5Config:
    """Read the sizes off the shapes."""

    def count(stack: str) -> int:
        found = {path.split("/")[1] for path in leaves if path.startswith(f"{stack}/layers_")}
        return len(found)

    def shape(pattern: str) -> tuple[int, ...]:
        for path in sorted(leaves):
            if re.fullmatch(pattern, path):
                return leaves[path].shape
        raise ValueError(f"No tensor matches {pattern!r}; is this a checkpoint of T5X's T5?")

    vocab_size, emb_dim = shape("token_embedder/embedding")
    num_heads, num_buckets = shape("encoder/(layers_0/)?relpos_bias/rel_embedding")
    is_gated = any(path.endswith("/mlp/wi_0/kernel") for path in leaves)
    return t5.T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=shape("encoder/layers_0/attention/query/kernel")[1] // num_heads,
        mlp_dim=shape("encoder/layers_0/mlp/wo/kernel")[0],
        num_encoder_layers=count("encoder"),
        num_decoder_layers=count("decoder"),
        mlp_activations=(activation, "linear") if is_gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in leaves,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
        relative_bias_per_layer=any("/layers_" in path and "relpos_bias" in path for path in leaves),
    )


# --- Writing ----------------------------------------------------------------------------------------------


def write(weights: Weights, directory: str | pathlib.Path) -> None:
    """Write checkpoint_<step> in T5X's legacy format: parameters, step and Adafactor's moments, where known.

    The tree is that of t5x.examples.t5; of scalable_t5, with scanned layers where ours are, where every layer
    has its own relative bias.
    """
    if weights.config.decoder_kv_heads not in (None, weights.config.num_heads):
        raise ValueError("T5X's T5 has no grouped queries (decoder_kv_heads).")
    check_plain_decoder(weights.config, "T5X's T5")
    if weights.config.moe is not None:
        raise ValueError(
            "A mixture of experts is not written in T5X's format; hf:DIR takes Switch Transformers."
        )
    if weights.config.encoder_attention != "full":
        raise ValueError(f"T5X's T5 has no {weights.config.encoder_attention} attention (encoder_attention).")
    folder = pathlib.Path(directory) / f"checkpoint_{weights.step}"
    target = t5x_layout.t5x_parameters(weights.config, weights.leaves)
    states = t5x_layout.t5x_moments(weights.config, weights.optimizer, weights.leaves)
    arrays = {f"target/{path}": leaf for path, leaf in target.items()}
    arrays |= {f"state/param_states/{path}": leaf for path, leaf in states.items()}
    folder.mkdir(parents=True)
    specs = {name: _stored(name, arrays[name], folder) for name in lazy.in_order(arrays)}
    optimizer = tree.unflatten({name: specs[name] for name in arrays})
    optimizer.setdefault("state", {}).setdefault("param_states", {})
    optimizer["state"]["step"] = _ndarray(np.array(weights.step, np.int32))
    (folder / _FILE).write_bytes(_packed({"version": 3, "optimizer": optimizer}))


def _stored(name: str, leaf: Leaf, folder: pathlib.Path) -> Any:
    """Write an array beside the msgpack file and return what that holds of it; placeholders stay inline."""
    if leaf.shape == (1,):
        return _ndarray(np.asarray(leaf))
    stored = name.replace("/", ".")
    metadata = {
        "shape": list(leaf.shape),
        "chunks": list(leaf.shape),
        "compressor": {"id": "gzip", "level": 1},
    }
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder / stored}/"},
        "metadata": metadata,
    }
    store = ts.open(spec, create=True, open=True, dtype=ts.dtype(leaf.dtype.name)).result()
    store.write(np.ascontiguousarray(leaf)).result()
    return {
        "driver": "zarr",
        "dtype": leaf.dtype.name,
        "kvstore": {"driver": "file", "path": f"{stored}/"},
        "metadata": metadata,
    }


def _ndarray(array: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(_NDARRAY, _packed((array.shape, array.dtype.name, array.tobytes())))


def _packed(value: Any) -> bytes:
    packed: Any = msgpack.packb(value)
    return packed
