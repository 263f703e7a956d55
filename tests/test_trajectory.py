"""Train beside T5X: the recorded trajectories, step by step, through the real train step."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mtjax import optim, program, tree
from mtjax.losses import LossConfig
from mtjax.models import functional, t5

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden" / "t5x_training"
STRIDES = {
    ("traj_t5_1_1", 1): 5,
    ("traj_t5_1_1", 20): 1,
    ("traj_t5_1_1_packed", 1): 7,
    ("traj_t5_1_1_packed", 5): 7,
    ("traj_t5_1_0_tied", 1): 7,
    ("traj_t5_1_0_tied", 5): 7,
}


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def config(folder: str, *, scan_layers: bool = False) -> t5.T5Config:
    is_tied = folder == "traj_t5_1_0_tied"
    return t5.T5Config(
        vocab_size=384,
        emb_dim=128,
        num_heads=4,
        head_dim=32,
        mlp_dim=256,
        num_encoder_layers=2,
        num_decoder_layers=2,
        mlp_activations=("relu",) if is_tied else ("gelu", "linear"),
        logits_via_embedding=is_tied,
        scan_layers=scan_layers,
    )


def load(folder: str, name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / folder / name) as file:
        return dict(file)


def initial(folder: str):
    home = "traj_t5_1_1" if folder.endswith("packed") else folder
    return tree.unflatten(load(home, "params_initial.npz"))


def batches(folder: str):
    stacked = load(folder, "batches.npz")
    for step in range(len(stacked["decoder_target_tokens"])):
        batch = {name: x[step] for name, x in stacked.items()}
        task_ids = np.arange(8)[:, None] % 2
        batch["decoder_task_ids"] = np.broadcast_to(task_ids, batch["decoder_target_tokens"].shape).astype(
            np.int32
        )
        yield batch


def build(folder: str, **options) -> program.Program:
    base, warmup = (0.05, 2) if folder == "traj_t5_1_0_tied" else (1.0, 1000)
    rate = optim.learning_rate(base_learning_rate=base, warmup_steps=warmup)
    return program.program(
        model=t5.t5(config(folder, scan_layers=options.pop("scan_layers", False))),
        optimizer=optim.adafactor(rate),
        tasks=program.TaskTable(("even", "odd"), ("rows", "rows")),
        batch_size=8,
        loss=LossConfig(z_loss=1e-4, normalizing_factor=1.0),
        mesh={"data": 1},
        **options,
    )


def train(run: program.Program, params, folder: str):
    state, losses = run.start_from(jax.random.key(0), params), []
    for batch in batches(folder):
        state, metrics = run.step(state, batch)
        losses.append(jax.device_get(metrics))
        yield state, losses


def thin(path_leaf: np.ndarray, stride: int) -> np.ndarray:
    return path_leaf.reshape(-1)[::stride] if path_leaf.size >= 4096 and stride > 1 else path_leaf


def assert_params(state, folder: str, step: int, atol: float):
    expected = load(folder, f"params_step_{step:04d}.npz")
    found = tree.flatten(jax.device_get(state.params))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(
            thin(leaf, STRIDES[folder, step]), expected[path], rtol=0, atol=atol, err_msg=path
        )


def assert_optimizer(state, folder: str, step: int):
    expected = load(folder, f"optimizer_state_step_{step:04d}.npz")
    assert int(state.opt.step) == int(expected.pop("step"))
    found = {
        f"{path}/{moment}": leaf
        for moment in ("v", "v_row", "v_col")
        for path, leaf in tree.flatten(jax.device_get(getattr(state.opt, moment))).items()
    }
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        limit = 1e-4 * np.abs(expected[path]).max()
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=limit, err_msg=path)


@pytest.mark.parametrize("folder", ["traj_t5_1_1", "traj_t5_1_1_packed", "traj_t5_1_0_tied"])
def test_trajectory_is_that_of_t5x(folder):
    """Loss within 1e-5 relative at every step; parameters within 2e-5; optimizer state within 1e-4 of its largest value."""
    run = build(folder)
    expected = load(folder, "metrics.npz")
    for step, (state, said) in enumerate(train(run, initial(folder), folder), start=1):
        total = said[-1].total
        np.testing.assert_allclose(total.loss_T, expected["loss"][step - 1], rtol=1e-5)
        np.testing.assert_allclose(total.z_loss_T, expected["z_loss"][step - 1], rtol=1e-4)
        np.testing.assert_allclose(
            said[-1].gradient_norm, expected["weight_gradient_norm"][step - 1], rtol=5e-5
        )
        np.testing.assert_allclose(said[-1].learning_rate, expected["learning_rate"][step - 1], rtol=1e-6)
        accuracy = total.correct_T / total.tokens_T
        np.testing.assert_allclose(accuracy, expected["accuracy"][step - 1], atol=1e-6)
        np.testing.assert_allclose(sum(said[-1].tasks.loss_T), total.loss_T, rtol=1e-6)
        if (folder, step) in STRIDES:
            assert_params(state, folder, step, atol=2e-5)
    assert_optimizer(state, folder, step)


def test_scanned_layers_train_alike():
    """The stacked model follows the same trajectory."""
    folder = "traj_t5_1_1_packed"
    run = build(folder, scan_layers=True)
    expected = load(folder, "metrics.npz")
    *_, (state, said) = train(run, functional.stack_layers(initial(folder)), folder)
    np.testing.assert_allclose([s.total.loss_T for s in said], expected["loss"], rtol=1e-5)
    assert_params(state._replace(params=functional.unstack_layers(state.params)), folder, 5, atol=2e-5)


def test_microbatches_train_alike():
    """Four microbatches of two rows follow the same trajectory."""
    folder = "traj_t5_1_1_packed"
    *_, (state, said) = train(build(folder, microbatches=4), initial(folder), folder)
    np.testing.assert_allclose([s.total.loss_T for s in said], load(folder, "metrics.npz")["loss"], rtol=1e-5)
    assert_params(state, folder, 5, atol=2e-5)
