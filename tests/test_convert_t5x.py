"""T5X's checkpoints: its outputs from each of them, the way back bit for bit, and its training that goes on here."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import tarfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import checkpoint, convert, decode, losses, start, tree
from mtjax.convert import t5x
from mtjax.data import vocabulary
from mtjax.models import t5
from tests import test_trajectory

GOLDEN = pathlib.Path(__file__).parent / "golden"
CHECKPOINTS = {
    "t5_1_1_legacy": "t5_1_1",
    "t5_1_1_orbax": "t5_1_1",
    "t5_1_1_bf16_legacy": "t5_1_1_bf16",
    "t5_1_0_tied_legacy": "t5_1_0_tied",
    "t5_1_0_tied_legacy_gcsref": "t5_1_0_tied",
    "t5_1_1_factored_legacy": "t5_1_1_factored",
    "scalable_scan_legacy": "scalable_scan",
    "scalable_scan_orbax": "scalable_scan",
    "scalable_noscan_legacy": "scalable_noscan",
}


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Return a function that unpacks a checkpoint once."""

    @functools.cache
    def unpack(name):
        folder = tmp_path_factory.mktemp(name)
        with tarfile.open(GOLDEN / "t5x_checkpoints" / f"{name}.tar.gz") as file:
            file.extractall(folder, filter="data")
        return folder

    return unpack


def contents(folder):
    """Return every array of a checkpoint by T5X's own path."""
    found = t5x.find(folder)
    arrays = t5x._open_orbax(found) if (found / "state").is_dir() else t5x._open_legacy(found)
    return {path: np.asarray(array) for path, array in arrays.items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.shape == b[name].shape, name
        assert x.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_comes_back_bit_for_bit_with_its_optimizer(name, unpacked, tmp_path):
    weights = t5x.read(unpacked(name))
    assert weights.step == 2
    assert weights.config.scan_layers == ("_scan" in name)
    convert.write_model_directory(weights, tmp_path / "ours")
    again = convert.read_model_directory(tmp_path / "ours")
    assert again.config == weights.config and again.decoding == weights.decoding
    t5x.write(again, tmp_path / "back")
    wanted, found = contents(unpacked(name)), contents(tmp_path / "back")
    assert any(path.endswith("/v") and x.shape != (1,) for path, x in wanted.items())
    assert found.pop("state/step") == wanted.pop("state/step", 2)
    same_bits(found, wanted)


@pytest.mark.parametrize(
    "name", ["t5_1_1_legacy", "t5_1_1_orbax", "t5_1_1_bf16_legacy", "t5_1_0_tied_legacy"]
)
def test_parameters_and_architecture_are_those_of_t5x(name, unpacked):
    weights, golden = t5x.read(unpacked(name)), GOLDEN / "t5x" / CHECKPOINTS[name]
    with np.load(golden / "params.npz") as saved:
        wanted = {path: saved[path] for path in saved}
    same_bits({path: np.asarray(x).astype(np.float32) for path, x in weights.leaves.items()}, wanted)
    dtype = "bfloat16" if "bf16" in name else "float32"
    assert {leaf.dtype.name for leaf in weights.leaves.values()} == {dtype}
    config = json.loads((golden / "config.json").read_text())
    found = dataclasses.asdict(weights.config)
    assert {key: found[key] for key in config} == config | {
        "mlp_activations": tuple(config["mlp_activations"])
    }


@pytest.mark.parametrize("name", ["scalable_scan_legacy", "scalable_noscan_legacy"])
def test_a_checkpoint_gives_t5x_outputs(name, unpacked):
    """The other ones hold the parameters of test_fidelity_t5x, bit for bit (see above)."""
    weights = t5x.read(unpacked(name))
    with np.load(GOLDEN / "t5x" / CHECKPOINTS[name] / "expected.npz") as file:
        expected = dict(file)
    batch, packed = (
        {key.removeprefix(prefix): jnp.asarray(x) for key, x in expected.items() if key.startswith(prefix)}
        for prefix in ("in/", "packed_in/")
    )
    model = t5.t5(weights.config)
    params = jax.tree.map(jnp.asarray, convert.weights.stacked(weights.config, weights.leaves))

    @jax.jit
    def outputs(params):
        logits_BLV = model.apply(params, batch).logits_BLV
        sums = losses.task_sums(lambda x: x, logits_BLV, batch, num_tasks=1, config=losses.LossConfig())[1]
        search = functools.partial(decode.beam_search, model, params, batch, max_length=12)
        return (
            logits_BLV,
            sums,
            decode.score(model, params, batch),
            decode.greedy(model, params, batch, max_length=12),
            search(normaliser=decode.t5x_length(0.6), stopping=decode.t5x_stopping()),
            model.apply(params, packed).logits_BLV,
        )

    logits_BLV, sums, score_B, greedy, beams, packed_BLV = outputs(params)
    for found, wanted, targets in [
        (logits_BLV, expected["logits"], batch["decoder_target_tokens"]),
        (packed_BLV, expected["packed_logits"], packed["decoder_target_tokens"]),
    ]:
        is_target = np.asarray(targets) > 0
        np.testing.assert_allclose(found[is_target], wanted[is_target], atol=1e-4)
    np.testing.assert_allclose(sums.loss_T, expected["loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(sums.z_loss_T, expected["z_loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(score_B, expected["score_batch"], rtol=1e-5)
    np.testing.assert_array_equal(greedy.tokens, expected["greedy_tokens"])
    np.testing.assert_array_equal(beams.tokens, expected["beam4_tokens"][:, ::-1])  # T5X: best beam last
    np.testing.assert_allclose(beams.scores, expected["beam4_scores"][:, ::-1], rtol=1e-5)


def through_t5x(state, run, folder):
    """Write a state as a checkpoint of ours, convert it to T5X and back, and return ours."""
    model = {"name": "T5Config", **dataclasses.asdict(test_trajectory.config("traj_t5_1_0_tied"))}
    first = checkpoint.Checkpointer(folder / "first", asynchronous=False)
    first.save(int(state.step), state, host={}, meta={"model": model})
    first.close()
    t5x.write(convert.read_model_directory(folder / "first"), folder / "t5x")
    weights = t5x.read(folder / "t5x")._replace(vocabulary=vocabulary.byte(100))
    convert.write_model_directory(weights, folder / "ours")
    return folder / "ours"


@pytest.mark.slow
def test_t5x_training_goes_on_here(tmp_path):
    """T5X's parameters, step, schedule and moments: its recorded steps 3 to 5 follow from a checkpoint of step 2."""
    folder = "traj_t5_1_0_tied"  # its learning rate changes with every step
    run, recorded = test_trajectory.build(folder), test_trajectory.load(folder, "metrics.npz")
    batches = list(test_trajectory.batches(folder))
    state = run.start_from(jax.random.key(0), test_trajectory.initial(folder))
    for batch in batches[:2]:
        state, _ = run.step(state, batch)
    path = str(through_t5x(state, run, tmp_path))
    checkpointer = checkpoint.Checkpointer(tmp_path / "second", asynchronous=False)
    begin = functools.partial(
        start.state, run, checkpointer, seed=1, initial_checkpoint=path, meta={"vocabulary": {}}
    )
    state, host, meta = begin(initial_state="optimizer")
    assert host is None and meta["origin"]["format"] == "t5x"
    for step in (2, 3, 4):
        assert int(state.step) == step
        state, said = run.step(state, batches[step])
        np.testing.assert_allclose(said.total.loss_T, recorded["loss"][step], rtol=1e-5)
        np.testing.assert_allclose(said.learning_rate, recorded["learning_rate"][step], rtol=1e-6)
    test_trajectory.assert_params(state, folder, 5, atol=2e-5)
    test_trajectory.assert_optimizer(state, folder, 5)

    fresh, _, _ = begin()  # parameters alone: another step, no moments
    assert int(fresh.step) == int(fresh.opt.step) == 0
    with pytest.raises(ValueError, match=r"initial_state 'optimiser'.*Did you mean 'optimizer'"):
        begin(initial_state="optimiser")
    checkpointer.close()


def test_recorded_moments_of_t5x_pass_through_its_format(tmp_path):
    """What T5X recorded after 20 steps, put into its layout, is what our optimizer then holds."""
    recorded = test_trajectory.load("traj_t5_1_1", "optimizer_state_step_0020.npz")
    step = int(recorded.pop("step"))
    leaves = test_trajectory.load("traj_t5_1_1", "params_step_0020.npz")
    weights = convert.Weights(
        test_trajectory.config("traj_t5_1_1"), leaves, {}, vocabulary.byte(100), step, recorded
    )
    t5x.write(weights, tmp_path / "t5x")
    convert.write_model_directory(t5x.read(tmp_path / "t5x"), tmp_path / "ours")
    run = test_trajectory.build("traj_t5_1_1", scan_layers=False)
    state = checkpoint.restore_optimizer(tmp_path / "ours", run.abstract.opt)
    assert int(state.step) == 20
    found = {
        f"{path}/{slot}": np.asarray(x)
        for slot in ("v", "v_row", "v_col")
        for path, x in tree.flatten(getattr(state, slot)).items()
    }
    same_bits(found, recorded)
    with pytest.raises(ValueError, match="does not fit the run's optimizer"):
        sgd = {"step": jax.ShapeDtypeStruct((), jnp.int32), "inner": jax.ShapeDtypeStruct((2,), jnp.float32)}
        checkpoint.restore_optimizer(tmp_path / "ours", sgd)
    convert.write_model_directory(weights._replace(optimizer={}), tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no optimizer state"):
        checkpoint.restore_optimizer(tmp_path / "bare", run.abstract.opt)


def test_what_is_written_is_what_t5x_reads(unpacked, tmp_path):
    t5x.write(t5x.read(unpacked("scalable_scan_legacy")), tmp_path)
    written = flax.serialization.msgpack_restore((tmp_path / "checkpoint_2" / "checkpoint").read_bytes())
    state = written["optimizer"]["state"]
    assert state["step"] == 2 and written["version"] == 3
    kernel = lambda at: at["encoder"]["encoder"]["attention"]["out"]["kernel"]  # noqa: E731
    spec = kernel(written["optimizer"]["target"])
    assert spec["kvstore"]["path"] == "target.encoder.encoder.attention.out.kernel/"
    assert spec["metadata"]["shape"] == [4, 2, 8, 32]
    moments = kernel(state["param_states"])
    assert moments["v_col"]["metadata"]["shape"] == [4, 2, 8]
    assert moments["v"].shape == moments["m"].shape == (1,)


def test_a_kernel_that_t5x_would_factor_is_named(unpacked, tmp_path):
    weights = t5x.read(unpacked("scalable_noscan_legacy"))
    kernel = "encoder/layers_0/attention/query/kernel"
    moments = {path: x for path, x in weights.optimizer.items() if not path.startswith(kernel)}
    moments[f"{kernel}/v"] = np.zeros(weights.leaves[kernel].shape, np.float32)
    with pytest.raises(ValueError, match=rf"T5X factors the second moment of {kernel} \(32, 32\)"):
        t5x.write(weights._replace(optimizer=moments), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_tensor_is_named(unpacked, tmp_path):
    with tarfile.open(GOLDEN / "t5x_checkpoints" / "t5_1_1_bf16_legacy.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    lost = tmp_path / "checkpoint_2" / "target.encoder.layers_0.mlp.wo.kernel"
    path, message = "encoder/layers_0/mlp/wo/kernel", r"encoder/layers_0/mlp/wo/kernel.*wo\.kernel"
    (lost / "0.0").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=message):
        np.asarray(t5x.read(tmp_path).leaves[path])
    (lost / "0.0").unlink()  # would read as zeros
    with pytest.raises(ValueError, match=message):
        np.asarray(t5x.read(tmp_path).leaves[path])
    (lost / ".zarray").unlink()
    with pytest.raises(ValueError, match=message):
        t5x.read(tmp_path)
    with pytest.raises(ValueError, match="no T5X checkpoint"):
        t5x.read(GOLDEN)
