"""Checkpoints: what is read is bit for bit what was written, or a clear error; failures lose nothing."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtjax import checkpoint, tree
from mtjax.train import Stopped


class State(NamedTuple):
    """As the training loop's: empty parts, tuples and random keys included."""

    step: Any
    params: Any
    frozen: Any
    opt: Any
    average: Any
    key: Any


def make_state(seed=0, *, width=8, average=False):
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {"layers_0": {"kernel": jnp.asarray(rng.standard_normal((4, width)), jnp.float32)}},
        "scale": jnp.asarray(rng.standard_normal(4), jnp.bfloat16),
    }
    moments = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    return State(
        step=jnp.int32(seed),
        params=params,
        frozen={},
        opt=(jnp.int32(seed), {"v": moments}, jnp.bool_(True)),
        average=jax.tree.map(lambda p: p + 1, params) if average else {},
        key=jax.random.key(seed),
    )


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, w in tree.flatten(want).items():
        g = tree.flatten(got)[path]
        assert g.dtype == w.dtype and g.shape == w.shape, path
        g, w = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (g, w))
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), path


def save(model_dir, step, state, *, metrics=None, **options):
    saver = checkpoint.Checkpointer(model_dir, **options)
    saver.save(step, state, host={"position": [step, 2.5]}, meta={"tasks": ["a", "b"]}, metrics=metrics)
    saver.close()


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_, np.uint32]


@st.composite
def arrays(draw):
    """Draw arrays of any bits: NaNs with payloads, negative zeros, denormals, empty and scalar shapes."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=4))
    if dtype == np.bool_:
        return draw(hnp.arrays(np.bool_, shape))
    return draw(hnp.arrays(f"uint{8 * dtype.itemsize}", shape)).view(dtype)


@hypothesis.given(
    leaves=st.dictionaries(st.sampled_from(["a", "b/c", "b/d/0", "layers/x"]), arrays(), min_size=1),
    seed=st.integers(0, 2**32 - 1),
    implementation=st.sampled_from(["threefry2x32", "rbg"]),
)
@hypothesis.settings(deadline=None, max_examples=15)
def test_what_is_restored_is_what_was_saved(leaves, seed, implementation):
    state = {
        "arrays": tree.unflatten({path: jnp.asarray(x) for path, x in leaves.items()}),
        "keys": jax.random.split(jax.random.key(seed, impl=implementation), 3),
    }
    host = {"position": seed, "rates": [0.1, 1e-300], "name": "ü"}
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Checkpointer(folder)
        saver.save(7, state, host=host, meta={"config": "x = 1\n"})
        got, got_host, got_meta = saver.restore(abstract(state))
        saver.close()
    assert_same_bits(got, state)
    assert got_host == host and got_meta == {"config": "x = 1\n"}
    assert jax.random.key_impl(got["keys"]) == implementation


def test_an_asynchronous_save_holds_the_values_of_its_call(tmp_path):
    """The step donates its buffers while the save is under way."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    saver = checkpoint.Checkpointer(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        params = {str(i): jnp.full((512, 512), float(step + i)) for i in range(8)}
        saver.save(step, params, host={}, meta={})
        params = overwrite(params)
        jax.block_until_ready(overwrite(params))
    saver.wait()
    for step in (1, 2, 3):
        got, _, _ = saver.restore(
            {str(i): jax.ShapeDtypeStruct((512, 512), "float32") for i in range(8)}, step=step
        )
        assert all(np.all(np.asarray(got[str(i)]) == step + i) for i in range(8))
    saver.close()


def test_which_checkpoints_are_kept(tmp_path):
    saver = checkpoint.Checkpointer(
        tmp_path, keep_last=2, keep_every=4, keep_best=1, best_metric="accuracy", best_mode="max"
    )
    assert saver.latest() is None and saver.best() is None and saver.steps() == []
    accuracies = {3: 0.9, 5: float("nan"), 6: 0.5}
    for step in range(1, 10):
        metrics = {"accuracy": accuracies[step]} if step in accuracies else None
        saver.save(step, make_state(step), host={}, meta={}, metrics=metrics)
    saver.close()
    assert saver.steps() == [3, 4, 8, 9] and saver.latest() == 9
    again = checkpoint.Checkpointer(tmp_path, best_metric="accuracy", best_mode="max")
    assert again.best() == 3
    again.close()


def test_a_saved_step_is_not_written_again(tmp_path):
    save(tmp_path, 3, make_state(0))
    save(tmp_path, 3, make_state(1))
    saver = checkpoint.Checkpointer(tmp_path)
    assert_same_bits(saver.restore(abstract(make_state()))[0], make_state(0))
    saver.close()


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown best_mode 'mni'.*'min'"):
        checkpoint.Checkpointer(tmp_path, best_mode="mni")
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        checkpoint.Checkpointer(tmp_path, keep_last=0)
    saver = checkpoint.Checkpointer(tmp_path, best_metric="validation/los")
    with pytest.raises(ValueError, match=r"'validation/los'.*'validation/loss'"):
        saver.save(1, make_state(), host={}, meta={}, metrics={"validation/loss": 1.0})
    saver.close()


def drop_arrays(folder):
    """Delete every array of a checkpoint, but not the description of them."""
    for data in pathlib.Path(folder).rglob("d"):
        shutil.rmtree(data)


def test_another_architecture_is_refused_before_any_array_is_read(tmp_path):
    save(tmp_path, 1, make_state(width=8))
    drop_arrays(tmp_path / "checkpoints/1")
    other = abstract(make_state(width=9))
    other.params["extra"] = jax.ShapeDtypeStruct((2,), "float32")
    del other.params["scale"]
    saver = checkpoint.Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="does not fit the run: 4 differences") as error:
        saver.restore(other)
    message = str(error.value)
    assert "missing    params/extra (2,)" in message and "extra      params/scale (4,)" in message
    assert "misshapen  params/encoder/layers_0/kernel expected (4, 9), found (4, 8)" in message
    with pytest.raises(ValueError, match=r"does not fit the model: 3 differences.*\n  extra      scale"):
        checkpoint.restore_parameters(tmp_path, other.params)
    wide = abstract(make_state())
    wide.params["scale"] = jax.ShapeDtypeStruct((4,), "float32")
    with pytest.raises(
        ValueError, match="other dtypes than the run:\n  params/scale expected float32, found bf"
    ):
        saver.restore(wide)
    saver.close()


def test_parameters_alone(tmp_path):
    state = make_state(5)._replace(frozen={"encoder": {"layers_0": {"lora": jnp.ones(3)}}})
    save(tmp_path, 5, state)
    model = tree.combine(state.params, state.frozen)
    wanted = abstract(model)
    assert_same_bits(checkpoint.restore_parameters(tmp_path, wanted), model)
    wanted["scale"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    got = checkpoint.restore_parameters(tmp_path, wanted)
    assert got["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(got["scale"], model["scale"].astype(jnp.float32))


def test_parameters_are_the_average_where_there_is_one(tmp_path):
    state = make_state(5, average=True)
    save(tmp_path, 5, state)
    assert_same_bits(checkpoint.restore_parameters(tmp_path, abstract(state.params)), state.average)


def flip(folder, pattern, *, offset=0):
    """Flip one bit where a checkpoint's files hold these bytes, which they do once."""
    places = [
        (f, data.index(pattern))
        for f in folder.rglob("*")
        if f.is_file() and pattern in (data := f.read_bytes())
    ]
    assert len(places) == 1
    file, start = places[0]
    data = bytearray(file.read_bytes())
    data[start + offset] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_found_and_only_what_is_asked_for_is_read(tmp_path):
    state = make_state(1, width=512)
    save(tmp_path, 1, state)
    moment = np.asarray(state.opt[1]["v"]["encoder"]["layers_0"]["kernel"])
    flip(tmp_path / "checkpoints/1/state", moment.tobytes()[:64], offset=13)
    saver = checkpoint.Checkpointer(tmp_path)
    with pytest.raises(
        ValueError, match=r"checkpoints/1' is damaged.*other bits.*opt/1/v/encoder/layers_0/kernel"
    ):
        saver.restore(abstract(state))
    assert_same_bits(checkpoint.restore_parameters(tmp_path, abstract(state.params)), state.params)
    saver.close()


@pytest.mark.parametrize("item", ["host", "meta"])
def test_a_changed_digit_of_the_data_position_is_found(tmp_path, item):
    save(tmp_path, 12345, make_state())
    save(tmp_path, 12346, make_state())
    file = tmp_path / f"checkpoints/12346/{item}/metadata"
    file.write_text(file.read_text().replace("12346", "12345").replace('"b"', '"c"'))
    saver = checkpoint.Checkpointer(tmp_path)
    with pytest.raises(ValueError, match=r"damaged.*other contents.*\n.*\[12345\]"):
        saver.restore(abstract(make_state()))
    saver.restore(abstract(make_state()), step=12345)
    saver.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # futures of orbax's reads
@pytest.mark.parametrize("damage", ["delete", "truncate", "empty", "flip", "noise"])
def test_whatever_is_damaged_nothing_wrong_is_read(tmp_path, damage):
    """Every file in turn: a ValueError naming the checkpoint, or (a file that is not needed) the same bits."""
    state = make_state(3)
    save(tmp_path / "good", 3, state)
    root = tmp_path / "good/checkpoints/3"
    errors, noise = 0, np.random.default_rng(0)
    files = sorted(f.relative_to(root) for f in root.rglob("*") if f.is_file())
    for i, name in enumerate(files):
        shutil.copytree(tmp_path / "good", tmp_path / str(i))
        file = tmp_path / str(i) / "checkpoints/3" / name
        data = bytearray(file.read_bytes())
        if damage == "delete":
            file.unlink()
        elif damage == "flip":
            if data:
                data[len(data) // 2] ^= 4
                file.write_bytes(data)
        elif damage == "noise":
            for place in noise.integers(0, max(len(data), 1), min(len(data), 3)):
                data[place] ^= int(noise.integers(1, 256))
            file.write_bytes(data)
        else:
            file.write_bytes(data[: len(data) // 2 if damage == "truncate" else 0])
        saver = checkpoint.Checkpointer(tmp_path / str(i))
        try:
            got, host, meta = saver.restore(abstract(state))
        except ValueError as error:
            assert f"{i}/checkpoints/3" in str(error), name
            errors += 1
        else:
            assert_same_bits(got, state)
            assert host == {"position": [3, 2.5]} and meta == {"tasks": ["a", "b"]}
        saver.close()
    assert errors >= 5, "most files matter"


def test_changes_that_cancel_in_a_plain_sum_are_found(tmp_path):
    state = {"x": jnp.arange(1000, 2000, dtype=jnp.uint32)}
    save(tmp_path, 1, state)
    flip(tmp_path / "checkpoints/1/state", np.uint32([1500, 1501]).tobytes())  # 1500 to 1501
    flip(tmp_path / "checkpoints/1/state", np.uint32([1601, 1602]).tobytes())  # 1601 to 1600
    saver = checkpoint.Checkpointer(tmp_path)
    with pytest.raises(checkpoint.DamagedError, match="other bits than were written in"):
        saver.restore(abstract(state))
    saver.close()


def test_falling_back_to_the_newest_whole_checkpoint(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, make_state(step), keep_last=9)
    drop_arrays(tmp_path / "checkpoints/4")
    shutil.rmtree(tmp_path / "checkpoints/3/host")
    saver = checkpoint.Checkpointer(tmp_path, keep_last=9)
    with pytest.raises(checkpoint.DamagedError, match="checkpoints/4' is damaged"):
        saver.restore(abstract(make_state()))
    with pytest.warns(UserWarning, match=r"checkpoints/[34]' is damaged(.|\n)*back to step 2") as warned:
        got, host, _ = saver.restore_whole(abstract(make_state()))
    assert len(warned) == 2
    assert_same_bits(got, make_state(2))
    assert host == {"position": [2, 2.5]}
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["3", "4"]
    for step in (3, 4):  # the run takes these steps again
        saver.save(step, make_state(step + 10), host={}, meta={})
    saver.wait()
    assert saver.steps() == [1, 2, 3, 4]
    assert_same_bits(saver.restore_whole(abstract(make_state()))[0], make_state(14))
    saver.close()
    for step in saver.steps():
        shutil.rmtree(tmp_path / f"checkpoints/{step}/meta")
    with pytest.raises(checkpoint.DamagedError, match=r"No checkpoint is whole(.|\n)*checkpoints/1'"):
        saver.restore_whole(abstract(make_state()))
    assert saver.steps() == [1, 2, 3, 4]


def test_being_stopped_while_reading_damages_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, make_state(step), keep_last=9)

    def stop(*args, **kwargs):
        raise Stopped("Stopped before the first step")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", stop)
    with contextlib.closing(checkpoint.Checkpointer(tmp_path, keep_last=9)) as saver:
        with pytest.raises(Stopped):
            saver.restore_whole(abstract(make_state()))
        assert saver.steps() == [1, 2]


def test_paths_to_checkpoints(tmp_path):
    for step in (2, 10):
        save(tmp_path / "run", step, make_state(step))
    root = tmp_path / "run"
    assert checkpoint.checkpoint_steps(root) == [2, 10]
    for path, step in [
        ("", 10),
        ("checkpoints", 10),
        ("checkpoints/2", 2),
        ("checkpoint_2", 2),
        ("checkpoints/2/", 2),
    ]:
        assert checkpoint.find(f"{root}/{path}").name == str(step)
    assert checkpoint.read_meta(root) == {"tasks": ["a", "b"]}
    with pytest.raises(ValueError, match=r"has no checkpoint of step 3. Its checkpoints: 2, 10"):
        checkpoint.find(root / "checkpoints/3")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.restore_parameters(tmp_path, {})
    saver = checkpoint.Checkpointer(root)
    with pytest.raises(ValueError, match="has no checkpoint of step 7"):
        saver.restore(abstract(make_state()), step=7)
    saver.close()


def test_half_written_checkpoints_are_ignored_and_cleaned_up(tmp_path):
    save(tmp_path, 1, make_state())
    whole, half = tmp_path / "checkpoints/1", tmp_path / "checkpoints/2.orbax-checkpoint-tmp-17"
    shutil.copytree(whole, half)
    assert checkpoint.checkpoint_steps(tmp_path) == [1]
    saver = checkpoint.Checkpointer(tmp_path)
    assert saver.latest() == 1
    saver.save(2, make_state(), host={}, meta={})
    saver.close()
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_waiting_for_new_checkpoints(tmp_path):
    assert checkpoint.wait_for_new_checkpoint(tmp_path, (), timeout=0) is None
    save(tmp_path, 1, make_state())
    save(tmp_path, 2, make_state())
    assert checkpoint.wait_for_new_checkpoint(tmp_path, {1}, timeout=0) == 2
    assert checkpoint.wait_for_new_checkpoint(tmp_path, {1, 2}, timeout=0.05, poll=0.01) is None
    thread = threading.Timer(0.2, save, (tmp_path, 3, make_state()))
    thread.start()
    assert checkpoint.wait_for_new_checkpoint(tmp_path, {1, 2}, timeout=60, poll=0.02) == 3
    thread.join()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, asynchronous):
    """No file may grow beyond 200 kB, a limit of the process that a full disk resembles."""
    code = f"""
        import pathlib, resource, time, jax, jax.numpy as jnp
        from mtjax import checkpoint
        small, large = ({{"x": jnp.arange(n, dtype=jnp.float32)}} for n in (10, 10**6))
        saver = checkpoint.Checkpointer({str(tmp_path)!r}, keep_last=1, asynchronous={asynchronous})
        saver.save(1, small, host={{}}, meta={{}})
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        try:
            saver.save(2, large, host={{}}, meta={{}})
            for step in range({"10**4" if asynchronous else "0"}):  # as the training loop does, at every step
                saver.check()
                time.sleep(0.01)
        except OSError as error:
            message = str(error)
            assert "checkpoints' failed" in message and "Is the disk full?" in message, message
            assert "The checkpoints of steps [1] are whole." in message, message
        else:
            raise SystemExit("a save that cannot fit reported success")
        assert saver.latest() == 1
        left = [f.name for f in (pathlib.Path({str(tmp_path)!r}) / "checkpoints").iterdir()]
        assert left == ["1"], left
        got, _, _ = checkpoint.Checkpointer({str(tmp_path)!r}).restore(jax.eval_shape(lambda: small))
        assert jnp.array_equal(got["x"], small["x"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_process_leaves_only_whole_checkpoints(tmp_path):
    code = f"""
        import jax.numpy as jnp
        from mtjax import checkpoint
        saver = checkpoint.Checkpointer({str(tmp_path)!r}, keep_last=2)
        for step in range(1, 10000):
            arrays = {{str(i): jnp.full((300, 300), float(step + i)) for i in range(20)}}
            saver.save(step, arrays, host={{"step": step}}, meta={{}})
            print(step, flush=True)
    """
    wanted = {str(i): jax.ShapeDtypeStruct((300, 300), "float32") for i in range(20)}
    for delay in (0.0, 0.013, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
        )
        while int(process.stdout.readline()) < 3:
            pass
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = checkpoint.checkpoint_steps(tmp_path)
        saver = checkpoint.Checkpointer(tmp_path)
        got, host, _ = saver.restore(wanted)
        assert host == {"step": steps[-1]}
        assert all(np.all(np.asarray(got[str(i)]) == steps[-1] + i) for i in range(20))
        saver.close()
        assert [f.name for f in (tmp_path / "checkpoints").iterdir() if not f.name.isdigit()] == []
        shutil.rmtree(tmp_path / "checkpoints")


@pytest.mark.slow
def test_restoring_on_another_mesh(tmp_path, eight_devices):
    eight_devices(f"""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mtjax import checkpoint, sharding, tree
rng = np.random.default_rng(0)
params = {{"encoder": {{"layers": {{"mlp": {{"wi": {{"kernel": rng.standard_normal((2, 8, 16)).astype("float32")}}}}}}}},
          "token_embedder": {{"embedding": rng.standard_normal((16, 8)).astype("float32")}}}}

def place(mesh):
    where = sharding.parameter_shardings(mesh, sharding.PARAMETER_RULES, params)
    everywhere = NamedSharding(mesh, P())
    return {{"params": where, "key": everywhere, "step": everywhere}}

first = sharding.make_mesh({{"fsdp": 8}})
state = {{"params": params, "key": jax.random.key(3), "step": jnp.int32(4)}}
state = jax.device_put(state, place(first))
saver = checkpoint.Checkpointer({str(tmp_path)!r})
saver.save(4, state, host={{}}, meta={{}})
for mesh in [first, sharding.make_mesh({{"fsdp": 2, "model": 4}}), sharding.make_mesh(devices=jax.devices()[:1])]:
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, place(mesh))
    got, _, _ = saver.restore(target)
    for path, leaf in tree.flatten(got).items():
        want = tree.flatten(state)[path]
        assert leaf.sharding.is_equivalent_to(tree.flatten(target)[path].sharding, leaf.ndim), path
        if path == "key":
            leaf, want = jax.random.key_data(leaf), jax.random.key_data(want)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want))
    alone = checkpoint.restore_parameters({str(tmp_path)!r}, target["params"])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), alone, params)
saver.close()
""")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_share_a_checkpoint_and_a_batch(tmp_path):
    code = f"""
        import sys
        import jax, jax.numpy as jnp, numpy as np
        rank, port = int(sys.argv[1]), sys.argv[2]
        jax.distributed.initialize("localhost:" + port, 2, rank)
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mtjax import checkpoint, sharding
        mesh = sharding.make_mesh({{"data": 2, "fsdp": -1}})
        assert sharding.data_hosts(mesh) == (2, rank)
        batch = sharding.global_batch(mesh, {{"x": np.full((4, 2), rank, np.int32)}})
        assert batch["x"].shape == (8, 2) and int(jax.jit(jnp.sum)(batch["x"])) == 8

        make = lambda: {{"x": jnp.arange(64.0).reshape(16, 4), "key": jax.random.key(1)}}
        where = {{"x": NamedSharding(mesh, P(("data", "fsdp"))), "key": NamedSharding(mesh, P())}}
        state = jax.jit(make, out_shardings=where)()
        saver = checkpoint.Checkpointer({str(tmp_path)!r})
        saver.save(1, state, host={{"position": 1}}, meta={{}})
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        got, host, _ = saver.restore(like)
        saver.close()
        assert host == {{"position": 1}}
        for shard in got["x"].addressable_shards:
            assert np.array_equal(shard.data, np.arange(64.0).reshape(16, 4)[shard.index])
        assert len(got["x"].addressable_shards) == 2
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(rank), port],
            env={**os.environ, **flags},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(e[-3000:] for e in errors)
