"""Checkpoints: one holds everything a run needs to go on, in <model_dir>/checkpoints/<step>.

Orbax's CheckpointManager writes them: into a temporary folder, renamed when complete, so a checkpoint that
has a number for a name is whole. Every array's sum is stored beside it and compared when it is read.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import time
import warnings
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtjax import hosts, lazy, tree
from mtjax.lazy import LazyArray
from mtjax.types import Array, Params, PyTree

FOLDER = "checkpoints"
DAMAGED = "damaged_checkpoints"  # where those go that a run has fallen back from
_TEMPORARY = ".orbax-checkpoint-tmp"
# orbax is imported in functions: its import takes as long as jax's, and most commands read no checkpoint.


# --- Leaves -----------------------------------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """Return the array that stands for a leaf on disk: a random key's words, anything else itself."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_abstract(leaf: Any, saved: Any = None) -> jax.ShapeDtypeStruct:
    """Return what to read for a leaf: its shape, its dtype or that of what was saved, its sharding."""
    plain = jax.eval_shape(_plain, leaf)
    where = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, (saved or plain).dtype, sharding=where)


def _like(leaf: Any, array: Array) -> Array:
    """Return an array read from disk as what `leaf` is."""
    if not _is_key(leaf):
        return array
    found: list[Any] = []
    jax.eval_shape(lambda key: (found.append(jax.random.key_impl(key)), key)[1], leaf)
    return jax.random.wrap_key_data(array, impl=found[0])


def _mixed(words: Any) -> Any:
    """Scatter the bits of 32-bit words, one to one, so that changes of several words do not cancel in a sum.

    A multiply and xorshift hash (Wellons 2018, https://nullprogram.com/blog/2018/07/31/).
    """
    words = (words ^ (words >> 16)) * np.uint32(0x7FEB352D)
    return (words ^ (words >> 15)) * np.uint32(0x846CA68B)


@jax.jit
def _device_sum(x: Array) -> Array:
    """Add up the mixed bits of an array as unsigned words, modulo 2^32."""
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    return jnp.sum(_mixed(words.astype(jnp.uint32)), dtype=jnp.uint32)


def _bit_sum(x: Any) -> int:
    """Add up an array's mixed bits modulo 2^32: no flipped bit leaves it alone, no sharding changes it."""
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable and next(iter(x.devices())).platform == "cpu"
    ):
        return int(_device_sum(x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x))
    shards = [s.data for s in x.addressable_shards if s.replica_id == 0] if isinstance(x, jax.Array) else [x]
    total, chunk = 0, 2**16  # words that stay in the cores' cache
    for shard in shards:
        flat = np.ascontiguousarray(shard).reshape(-1)
        words = flat.view(f"uint{8 * min(flat.dtype.itemsize, 4)}")
        for start in range(0, len(words), chunk):
            mixed = _mixed(words[start : start + chunk].astype(np.uint32))
            total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32


# --- Folders ----------------------------------------------------------------------------------------------


def checkpoint_steps(model_dir: Any) -> list[int]:
    """Return the steps of the complete checkpoints of a model directory, ascending; [] where it has none."""
    folder = epath.Path(model_dir) / FOLDER
    if not folder.exists():
        return []
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit() and _is_whole(child))


def _is_whole(folder: epath.Path) -> bool:
    """Tell whether a checkpoint was written to its end; without renames, on GCS, a file says so."""
    return not str(folder).startswith("gs://") or (folder / "commit_success.txt").exists()


def _steps_message(steps: list[int]) -> str:
    return f"Its checkpoints: {', '.join(map(str, steps[-10:]))}." if steps else "It has no checkpoint yet."


def find(path: Any) -> epath.Path:
    """Return the folder of the one checkpoint that a path means.

    The path is a model directory (its latest checkpoint), <model_dir>/checkpoints, or one checkpoint:
    <model_dir>/checkpoints/<step>, or T5X's spelling <model_dir>/checkpoint_<step>. Raises ValueError where
    there is none.
    """
    path = epath.Path(str(path).rstrip("/")).absolute()
    if path.name.isdigit() and path.parent.name == FOLDER:
        model_dir, step = path.parent.parent, int(path.name)
    elif path.name.startswith("checkpoint_") and path.name[11:].isdigit() and not path.exists():
        model_dir, step = path.parent, int(path.name[11:])
    else:
        model_dir, step = (path.parent if path.name == FOLDER else path), None
    steps = checkpoint_steps(model_dir)
    if not steps:
        raise ValueError(
            f"{str(path)!r} holds no checkpoint. Give a model directory, or one of its checkpoints/<step>."
        )
    if step is not None and step not in steps:
        raise ValueError(f"{str(model_dir)!r} has no checkpoint of step {step}. {_steps_message(steps)}")
    return model_dir / FOLDER / str(steps[-1] if step is None else step)


def wait_for_new_checkpoint(
    model_dir: Any, seen: Container[int], *, timeout: float, poll: float = 5.0
) -> int | None:
    """Return the first step that is not in `seen`, waiting up to `timeout` seconds for it; else None."""
    end = time.monotonic() + timeout
    while True:
        if new := [step for step in checkpoint_steps(model_dir) if step not in seen]:
            return new[0]
        if (left := end - time.monotonic()) <= 0:
            return None
        time.sleep(min(poll, left))


# --- Reading ----------------------------------------------------------------------------------------------


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


@contextlib.contextmanager
def _reading(folder: epath.Path) -> Iterator[None]:
    """Turn whatever goes wrong below into a DamagedError that names the checkpoint."""
    try:
        yield
    except Exception as error:  # tensorstore and orbax raise many kinds
        steps = [step for step in checkpoint_steps(folder.parent.parent) if str(step) != folder.name]
        others = f"Other checkpoints beside it: {steps[-10:]}." if steps else "There is no other beside it."
        raise DamagedError(
            f"The checkpoint {str(folder)!r} is damaged or incomplete: {type(error).__name__}: "
            f"{str(error)[:500]}\n{others} Resume with --gin.train.Saving.fall_back=True, or delete this folder, "
            "to go on from the newest whole one."
        ) from error


def _sealed(value: Any) -> dict[str, Any]:
    """Put a JSON value beside the checksum of its text."""
    return {"value": value, "crc32": zlib.crc32(json.dumps(value, sort_keys=True).encode())}


def _replace(file: epath.Path, text: str) -> None:
    """Write a file in one piece."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def _read_json(folder: epath.Path, item: str) -> dict[str, Any]:
    with _reading(folder):
        file = folder / item / "metadata"
        sealed = json.loads(file.read_text())
        if sealed != _sealed(sealed["value"]):
            raise OSError(f"{str(file)!r} has other contents than were written")
        return sealed["value"]


def read_meta(path: Any) -> dict[str, Any]:
    """Return the `meta` that was saved with the checkpoint at `path` (see `find`)."""
    return _read_json(find(path), "meta")


def _saved(folder: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {path: shape and dtype} of every array of a checkpoint; reads no array."""
    arrays = _read_json(folder, "arrays")
    with _reading(folder):
        return {path: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for path, x in arrays.items()}


def _read(folder: epath.Path, leaves: Mapping[str, Any]) -> dict[str, Array]:
    """Read only these arrays of a checkpoint, straight into their shardings, and check their sums."""
    import orbax.checkpoint as ocp

    item = tree.unflatten(leaves)
    saved = _read_json(folder, "arrays")
    with _reading(folder), contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        arguments = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        arrays, failure = {}, None
        try:
            arrays = tree.flatten(reader.restore(folder / "state", args=arguments))
        except Exception as error:  # each process reads its own parts; the sums below need them all
            failure = error
        if failures := [text for text in hosts.gather(failure and repr(failure)[:500]) if text]:
            raise failure or OSError(f"another process could not read it: {failures[0]}")
        if wrong := [path for path, x in arrays.items() if _bit_sum(x) != saved[path]["bits"]]:
            raise OSError(f"other bits than were written in {wrong[:5]} ({len(wrong)} arrays)")
    return arrays


def parameter_shapes(path: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {parameter: shape and dtype} of the checkpoint at `path` (see `find`); reads no array."""
    return {name: saved for name, (_, saved) in _parameters(find(path)).items()}


def item_bytes(path: Any) -> dict[str, int]:
    """Return the bytes of each part of the checkpoint at `path`: params, opt, average, ..."""
    found: dict[str, int] = {}
    for name, saved in _saved(find(path)).items():
        part = name.split("/")[0]
        found[part] = found.get(part, 0) + math.prod(saved.shape) * saved.dtype.itemsize
    return found


def arrays(path: Any, *, parts: Sequence[str]) -> dict[str, LazyArray]:
    """Return {PART/NAME: array} of some parts (params, opt, ...) of the checkpoint at `path` (see `find`).

    An array is read, and its sum checked, when it is asked for.
    """
    folder = find(path)
    sums = {name: x["bits"] for name, x in _read_json(folder, "arrays").items()}

    def read(name: str, stored: LazyArray) -> np.ndarray:
        with _reading(folder):
            array = stored.read()
            if _bit_sum(array) != sums[name]:
                raise OSError(f"other bits than were written in {name}")
        return array

    wanted = [name for name in sums if name.split("/")[0] in parts]
    with _reading(folder):
        stored = stored_arrays(folder / "state", wanted)
    return {
        name: LazyArray(leaf.shape, leaf.dtype, functools.partial(read, name, leaf))
        for name, leaf in stored.items()
    }


def stored_arrays(state: epath.Path, names: Sequence[str]) -> dict[str, LazyArray]:
    """Open arrays a/b/c of what an Orbax PyTreeCheckpointHandler wrote, without reading them.

    Orbax itself reads all metadata for every array it restores.
    """
    import tensorstore

    metadata = json.loads((state / "_METADATA").read_text())
    base = str(state) if "://" in str(state) else f"file://{state}"
    is_ocdbt, context = (state / "manifest.ocdbt").exists(), tensorstore.Context()

    def opened(name: str) -> LazyArray:
        key = name.replace("/", ".")
        spec = {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"{base}/", "path": f"{key}/"}
            if is_ocdbt
            else f"{base}/{key}/",
            # Where zeros are stored too, a chunk that is not there is lost.
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
        }
        array = tensorstore.open(spec, open=True, read=True, context=context).result()
        return LazyArray(array.shape, array.dtype.numpy_dtype, lambda: array.read().result())

    return {name: opened(name) for name in names}


def _parameters(folder: epath.Path) -> dict[str, tuple[str, jax.ShapeDtypeStruct]]:
    """Return {parameter: (its place in the checkpoint, what was saved)}; the average where there is one."""
    saved = _saved(folder)
    trained = "average/" if any(name.startswith("average/") for name in saved) else "params/"
    return {
        name.split("/", 1)[1]: (name, array)
        for name, array in saved.items()
        if name.startswith((trained, "frozen/"))
    }


def _check_same(
    folder: epath.Path, expected: Mapping[str, Any], found: Mapping[str, Any], *, what: str
) -> None:
    lines = tree.difference(tree.unflatten(expected), tree.unflatten(found))
    if lines:
        shown = "\n  ".join(lines[:40]) + (f"\n  ... {len(lines) - 40} more" if len(lines) > 40 else "")
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit the {what}: {len(lines)} differences.\n  {shown}\n"
            "Use the configuration that it was trained with."
        )


def restore_parameters(path: Any, abstract_params: Params) -> Params:
    """Read a model's parameters, and nothing else, from a checkpoint of mtjax.

    `path` is as in `find`; leaves of abstract_params are ShapeDtypeStructs, with the sharding to read into
    (else the first device) and the dtype to cast to. Where the run kept an average of its parameters, the
    average is read. Raises ValueError listing what is missing, extra or misshapen before any array is read.
    """
    folder = find(path)
    saved = _parameters(folder)
    wanted = tree.flatten(abstract_params)
    _check_same(folder, wanted, {name: array for name, (_, array) in saved.items()}, what="model")
    arrays = _read(
        folder, {saved[name][0]: _plain_abstract(leaf, saved[name][1]) for name, leaf in wanted.items()}
    )
    leaves = [arrays[saved[name][0]].astype(leaf.dtype) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves)


def restore_optimizer(path: Any, abstract_state: PyTree) -> PyTree:
    """Read an optimizer's state from a checkpoint of mtjax, its step with it; arguments as of restore_parameters.

    Raises ValueError where the checkpoint holds none, or another optimizer's.
    """
    folder = find(path)
    saved = {name: array for name, array in _saved(folder).items() if name.startswith("opt/")}
    wanted = {f"opt/{name}": _plain_abstract(leaf) for name, leaf in tree.flatten(abstract_state).items()}
    if not saved:
        raise ValueError(f"The checkpoint {str(folder)!r} holds no optimizer state, only parameters.")
    _check_same(folder, wanted, saved, what="run's optimizer")
    arrays = _read(folder, wanted)
    leaves = [arrays[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _remove_unfinished(folder: epath.Path) -> None:
    """Delete the folders that a save has not renamed; one process does."""
    if jax.process_index() == 0 and folder.exists():
        for child in folder.iterdir():
            if _TEMPORARY in child.name:
                child.rmtree()


def _type_handlers() -> Any:
    """Return Orbax's handlers of leaves, with one that has a single LazyArray in memory at a time."""
    import orbax.checkpoint as ocp

    class LazyHandler(ocp.type_handlers.NumpyHandler):
        async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
            order = lazy.in_order(dict(enumerate(values)))
            for i in order:
                await super()._background_serialize([np.asarray(values[i])], [infos[i]], [args[i]])

    types = (int, float, np.ndarray, jax.Array)
    return ocp.type_handlers.create_type_handler_registry(
        *((kind, ocp.type_handlers.get_type_handler(kind)) for kind in types),
        (LazyArray, LazyHandler(deepcopy_host_arrays=False)),
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Drop Orbax's warning about checkpoints between evaluations, which have no metric on purpose."""
    return "did not provide metrics" not in record.getMessage()


# --- Writing ----------------------------------------------------------------------------------------------


class Checkpointer:
    """Save and restore the checkpoints of one model directory.

    Kept are the last `keep_last`, every step that `keep_every` divides, and the `keep_best` best by
    `best_metric` ('min' or 'max'). With `asynchronous`, `save` returns when the arrays are copied to the
    host, and a failure is raised by the next `check`, `save`, `wait` or `close`.
    """

    def __init__(
        self,
        model_dir: Any,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: str = "min",
        asynchronous: bool = True,
    ):
        import orbax.checkpoint as ocp

        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}.")
        if best_mode not in ("min", "max"):
            raise tree.unknown_name("best_mode", best_mode, ["min", "max"])
        logging.getLogger("absl").addFilter(_is_news)
        self.model_dir = epath.Path(model_dir).absolute()
        self.folder = self.model_dir / FOLDER
        _remove_unfinished(self.folder)  # what a killed process left half written
        self.best_metric = best_metric
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep_last)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        if best_metric is not None:
            kept.append(
                policies.BestN(
                    get_metric_fn=self._metric,
                    reverse=best_mode == "min",
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=self._metric if best_metric is not None else None,
                best_mode=best_mode,
                enable_async_checkpointing=asynchronous,
            ),
            # Trained weights do not compress, and the training step wants the cores.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(
                    use_compression=False, type_handler_registry=_type_handlers()
                ),
                **{name: ocp.JsonCheckpointHandler() for name in ("host", "meta", "arrays")},
            },
        )

    def _metric(self, metrics: Mapping[str, float]) -> float:
        return metrics[str(self.best_metric)]

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, ascending."""
        return checkpoint_steps(self.model_dir)

    def latest(self) -> int | None:
        """Return the last step saved, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step of the best checkpoint by best_metric, or None."""
        self.manager.reload()
        return None if self.best_metric is None else self.manager.best_step()

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        host: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save a step; a step already saved is left as it is.

        `state` is any tree of arrays (LazyArrays too, which are read one by one) and random keys; `host` (data position, rates) and `meta` (task names,
        vocabulary, configuration) are JSON objects; `metrics` holds best_metric. Raises ValueError where it
        does not, and OSError where this save or the asynchronous one before it failed.
        """
        import orbax.checkpoint as ocp

        if metrics is not None and self.best_metric is not None and self.best_metric not in metrics:
            raise tree.unknown_name("metric of the best checkpoint:", self.best_metric, list(metrics))
        self.wait()
        if step in self.steps():
            return
        leaves = {path: _plain(leaf) for path, leaf in tree.flatten(state).items()}
        host, meta = json.loads(json.dumps(host)), json.loads(json.dumps(meta))
        arrays = {
            path: {"shape": list(x.shape), "dtype": x.dtype.name, "bits": _bit_sum(x)}
            for path, x in leaves.items()
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree.unflatten(leaves)),
            host=ocp.args.JsonSave(_sealed(host)),
            meta=ocp.args.JsonSave(_sealed(meta)),
            arrays=ocp.args.JsonSave(_sealed(arrays)),
        )
        with self._writing(step):
            self.manager.save(step, args=items, metrics=self._comparable(metrics), force=True)

    def _comparable(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        """Return the finite metrics, or None where best_metric is not among them."""
        finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        return finite if self.best_metric in finite else None

    def amend(self, step: int, *, host: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Replace `host` and add `metrics` to a saved step, which was evaluated later."""
        if jax.process_index() == 0:
            folder = self.folder / str(step)
            if comparable := self._comparable(metrics):
                _replace(folder / "metrics" / "metrics", json.dumps(comparable))
            _replace(folder / "host" / "metadata", json.dumps(_sealed(json.loads(json.dumps(host)))))
        hosts.wait(f"amended {step}")
        self.manager.reload()

    @contextlib.contextmanager
    def _writing(self, step: int | None = None) -> Iterator[None]:
        """Turn a failed save into an OSError, and free what it wrote."""
        try:
            yield
        except Exception as error:
            left = self.steps()
            _remove_unfinished(self.folder)
            raise OSError(
                f"Saving {'a checkpoint' if step is None else f'step {step}'} to {str(self.folder)!r} failed: "
                f"{type(error).__name__}: {str(error)[:500]}\nIs the disk full? "
                + (f"The checkpoints of steps {left} are whole." if left else "There is no checkpoint yet.")
            ) from error

    def check(self) -> None:
        """Raise OSError if the save under way has failed; does not wait."""
        if not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way; raises OSError if it failed."""
        with self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait and release threads; raises OSError if the save under way failed."""
        with self._writing():
            self.manager.close()

    def restore(self, abstract_state: PyTree, *, step: int | None = None) -> tuple[PyTree, dict, dict]:
        """Return (state, host, meta) of a step, by default the latest.

        Leaves of abstract_state are ShapeDtypeStructs with the shardings to read into, on any mesh. Raises
        ValueError listing what is missing, extra or misshapen before any array is read, and DamagedError
        where the checkpoint is damaged.
        """
        self.wait()
        folder = find(self.model_dir if step is None else self.folder / str(step))
        wanted = {path: _plain_abstract(leaf) for path, leaf in tree.flatten(abstract_state).items()}
        saved = _saved(folder)
        _check_same(folder, wanted, saved, what="run")
        if other := [path for path, leaf in wanted.items() if leaf.dtype != saved[path].dtype]:
            lines = [
                f"{path} expected {wanted[path].dtype}, found {saved[path].dtype}" for path in other[:10]
            ]
            raise ValueError(
                f"The checkpoint {str(folder)!r} has other dtypes than the run:\n  " + "\n  ".join(lines)
            )
        host, meta = _read_json(folder, "host"), _read_json(folder, "meta")
        arrays = _read(folder, wanted)
        leaves = [_like(leaf, arrays[path]) for path, leaf in tree.flatten(abstract_state).items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), host, meta

    def restore_whole(self, abstract_state: PyTree) -> tuple[PyTree, dict, dict]:
        """Return what `restore` does, of the newest checkpoint that is whole.

        Newer, damaged ones are moved to <model_dir>/damaged_checkpoints, with a warning: their steps will be
        saved again. Raises DamagedError where none is whole.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                found = self.restore(abstract_state, step=step)
            except DamagedError as error:
                damaged[step] = error
                continue
            for other, error in damaged.items():
                self._set_aside(other)
                warnings.warn(f"{error}\nFalling back to step {step}.", stacklevel=2)
            return found
        raise DamagedError("No checkpoint is whole.\n" + "\n".join(map(str, damaged.values())))

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self.model_dir / DAMAGED
            aside.mkdir(parents=True, exist_ok=True)
            taken = {path.name for path in aside.iterdir()}
            name = next(n for i in itertools.count() if (n := f"{step}.{i}" if i else str(step)) not in taken)
            (self.folder / str(step)).rename(aside / name)
        hosts.wait(f"set aside {step}")
        self.manager.reload()
