"""Starting from a checkpoint with other tasks: rows move by name."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mtjax import checkpoint, optim, sharding, start, train, tree
from mtjax.data import pipeline
from mtjax.models import moe, routers, t5
from tests import small_cache

ROWS = "encoder/layers/mlp/router/task_embedding"  # [2 layers, T, 4]
UNSTACKED = "decoder/mlp/router/router_weights/task_z"  # [T, 4]
PLAIN = "decoder/mlp/wi/kernel"


def save(folder, tasks, num_rows):
    params = {
        ROWS: jnp.arange(2 * num_rows * 4, dtype=jnp.float32).reshape(2, num_rows, 4),
        UNSTACKED: jnp.arange(num_rows * 4, dtype=jnp.float32).reshape(num_rows, 4),
        PLAIN: jnp.ones((3, 4)),
    }
    with contextlib.closing(checkpoint.Checkpointer(folder, asynchronous=False)) as checkpointer:
        checkpointer.save(1, {"params": tree.unflatten(params)}, host={}, meta={"tasks": tasks})
    return jax.device_get(params)


def read(folder, tasks, num_rows):
    where = NamedSharding(sharding.make_mesh(None), PartitionSpec())
    shapes = {ROWS: (2, num_rows, 4), UNSTACKED: (num_rows, 4), PLAIN: (3, 4)}
    abstract = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for path, shape in shapes.items()
    }
    return jax.device_get(
        tree.flatten(start.initial_parameters(str(folder), tree.unflatten(abstract), tasks))
    )


def test_rows_of_tasks_move_by_name(tmp_path):
    saved = save(tmp_path, ["a", "b", "c"], 3)
    found = read(tmp_path, ("d", "c", "a", "e"), 4)
    for path, dim in ((ROWS, 1), (UNSTACKED, 0)):
        mean = saved[path].mean(dim)
        wanted = [mean, saved[path].take(2, dim), saved[path].take(0, dim), mean]
        np.testing.assert_allclose(found[path], np.stack(wanted, dim), rtol=1e-6)
    np.testing.assert_array_equal(found[PLAIN], saved[PLAIN])
    # The same number of tasks in another order, too; and the same tasks stay.
    swapped = read(tmp_path, ("c", "b", "a"), 3)
    np.testing.assert_array_equal(swapped[UNSTACKED], saved[UNSTACKED][::-1])
    np.testing.assert_array_equal(read(tmp_path, ("a", "b", "c"), 3)[ROWS], saved[ROWS])


def test_rows_without_names_are_read_in_order_or_refused(tmp_path):
    saved = save(tmp_path / "unnamed", [], 3)
    np.testing.assert_array_equal(read(tmp_path / "unnamed", ("x", "y", "z"), 3)[ROWS], saved[ROWS])
    with pytest.raises(
        ValueError, match=r"names no tasks, and .*task_\w+ has shape .* Convert it with as many"
    ):
        read(tmp_path / "unnamed", ("x", "y"), 2)
    save(tmp_path / "other", ["a", "b"], 3)
    with pytest.raises(ValueError, match="has 3 rows, but the checkpoint names 2 tasks"):
        read(tmp_path / "other", ("a", "c"), 2)


def test_rows_that_differ_in_more_than_tasks_are_refused(tmp_path):
    save(tmp_path, ["a", "b"], 2)
    where = NamedSharding(sharding.make_mesh(None), PartitionSpec())
    wider = {ROWS: (2, 2, 4), UNSTACKED: (2, 9), PLAIN: (3, 4)}
    abstract = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for path, shape in wider.items()
    }
    with pytest.raises(ValueError, match=r"task_z .*has shape \(2, 4\), but the run's has \(2, 9\)"):
        start.initial_parameters(str(tmp_path), tree.unflatten(abstract), ("b", "a"))


def test_a_sparse_run_starts_from_one_with_other_tasks(tmp_path, capsys):
    router = routers.TopK(normalize_weights=True, gate=routers.TaskEmbedding(4))
    sparse = moe.MoeConfig(2, 1, encoder_router=router, decoder_router=None, num_tasks=2)
    sizes = {"vocab_size": 384, "emb_dim": 8, "num_heads": 1, "head_dim": 8, "mlp_dim": 8}
    config = t5.T5Config(**sizes, num_encoder_layers=1, num_decoder_layers=1, moe=sparse)
    for name in "abc":
        small_cache.write_task(tmp_path / "cache", name, {"train": [([5, 6], [7, 8]), ([9], [10])]})
    kept = []
    for names, initial in (("ab", None), ("bc", str(tmp_path / "ab"))):
        small_cache.write_mixture(tmp_path / "cache", names, {name: 1.0 for name in names})
        train.fit(
            model_dir=str(tmp_path / names),
            model=t5.t5(config),
            data=pipeline.TrainData(names, {"inputs": 8, "targets": 8}, 2, (str(tmp_path / "cache"),)),
            optimizer=optim.transformation("sgd", 0.0),
            train_steps=1,
            initial_checkpoint=initial,
        )
        found = checkpoint.parameter_shapes(tmp_path / names)
        path = next(path for path in found if path.endswith("task_embedding"))
        saved = checkpoint.restore_parameters(tmp_path / names, tree.unflatten(found))
        kept.append(np.asarray(tree.flatten(saved)[path]))
    with pytest.raises(
        ValueError, match=r"INITIAL_STATE='optimizer': .*task_embedding has a row for every task"
    ):
        train.fit(
            model_dir=str(tmp_path / "third"),
            model=t5.t5(config),
            data=pipeline.TrainData("bc", {"inputs": 8, "targets": 8}, 2, (str(tmp_path / "cache"),)),
            optimizer=optim.transformation("sgd", 0.0),
            train_steps=2,
            initial_checkpoint=str(tmp_path / "ab"),
            initial_state="optimizer",
        )
    first, second = kept
    np.testing.assert_allclose(second, [first[1], first.mean(0)], rtol=1e-6)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "1 kept by name; 1 added, as the mean of all: c; 1 dropped: a." in said
