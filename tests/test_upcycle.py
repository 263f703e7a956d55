"""Sparse upcycling: the mixture of experts gives the dense model's outputs, and trains from a recipe."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import convert, tree
from mtjax.launch import config as gin_config
from mtjax.launch import convert as launch_convert
from mtjax.launch import main
from mtjax.models import configs, moe, routers, t5

DENSE = t5.T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=4,
)
NORMALISED = routers.TopK(normalize_weights=True)
GATED = routers.TopK(normalize_weights=True, gate=routers.TaskEmbedding(4))


def sparse(encoder_router=GATED, decoder_router=NORMALISED, **changes):
    moe_config = moe.MoeConfig(
        **{"num_experts": 4, "every": 2, "num_tasks": 3, **changes},
        encoder_router=encoder_router,
        decoder_router=decoder_router,
    )
    return dataclasses.replace(DENSE, moe=moe_config)


@pytest.fixture(scope="module")
def weights():
    params = jax.jit(t5.t5(DENSE).init)(jax.random.key(0))
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    return convert.Weights(DENSE, leaves, {})


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = {
        name: rng.integers(1, 64, (2, 10)) for name in ("encoder_input", "decoder_input", "decoder_target")
    }
    found = {f"{name}_tokens": jnp.asarray(ids, jnp.int32) for name, ids in tokens.items()}
    found["encoder_task_ids"] = found["decoder_task_ids"] = jnp.asarray(
        rng.integers(-1, 3, (2, 10)), jnp.int32
    )
    return found


def logits(weights, batch):
    params = tree.unflatten({path: jnp.asarray(leaf) for path, leaf in weights.leaves.items()})
    return jax.jit(t5.t5(weights.config).apply)(params, batch).logits_BLV


@pytest.mark.parametrize(
    "routers_of",
    [
        (GATED, NORMALISED),
        (routers.TaskLevel(width=6, hidden=5), routers.DSelectK()),
        (None, routers.Hash()),
    ],
)
def test_outputs_are_those_of_the_dense_model(weights, batch, routers_of):
    made = convert.upcycle(weights, sparse(*routers_of))
    experts = [leaf for path, leaf in made.leaves.items() if "/expert/" in path]
    assert len(experts) == 3 * sum(n for r, n in zip(routers_of, (1, 2), strict=True) if r is not None)
    assert {leaf.shape[0] for leaf in experts} == {4}
    np.testing.assert_allclose(logits(made, batch), logits(weights, batch), atol=2e-5)


def test_routers_of_layers_differ_and_seeds_matter(weights):
    kernels = [
        leaf
        for seed in (0, 1)
        for path, leaf in convert.upcycle(weights, sparse(), seed=seed).leaves.items()
        if path.endswith("router_weights/w/kernel")
    ]
    assert len(kernels) == 6
    assert len({kernel.tobytes() for kernel in kernels}) == 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (sparse(routers.Switch()), r"Under Switch\(.*weights do not sum to 1"),
        (sparse(routers.ExpertsChoose()), "do not sum to 1"),
        (sparse(routers.DSelectK(), num_experts=3), "do not sum to 1"),
        (sparse(dispatch="capacity"), "'capacity' drops tokens"),
        (sparse(extra_mlp=True), "leave MoeConfig.extra_mlp False"),
        (
            dataclasses.replace(sparse(), mlp_dim=32),
            r"differ in more than their experts: mlp_dim: 24 -> 32\.",
        ),
        (DENSE, "needs the `moe`"),
    ],
)
def test_what_would_not_be_the_dense_model_is_refused(weights, config, message):
    with pytest.raises(ValueError, match=message):
        convert.upcycle(weights, config)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_model_directory_is_upcycled_by_a_recipe(weights, batch, scan_layers, tmp_path, capsys):
    convert.write_model_directory(weights, tmp_path / "dense")
    wanted = dataclasses.replace(sparse(), scan_layers=scan_layers)
    (tmp_path / "model.gin").write_text(
        launch_convert.model_gin(wanted).replace("NUM_TASKS = 3", "NUM_TASKS = %gin.REQUIRED")
    )
    flags = [
        f"--from={tmp_path / 'dense'}",
        f"--to={tmp_path / 'sparse'}",
        f"--upcycle={tmp_path / 'model.gin'}",
    ]
    assert main.main(["convert", *flags]) == 2
    assert "NUM_TASKS" in capsys.readouterr().err
    assert main.main(["convert", *flags, "--gin.NUM_TASKS=3"]) == 0
    made = convert.read_model_directory(tmp_path / "sparse")
    assert made.config == wanted
    np.testing.assert_allclose(
        logits(made._replace(config=sparse()), batch), logits(weights, batch), atol=2e-5
    )
    # What was written is a recipe's model too.
    from mtjax import train
    from mtjax.launch import prepare

    parsed = gin_config.parse([str(tmp_path / "sparse" / "config.gin")], roots=[prepare.mixture, train.fit])
    assert parsed.arguments(train.fit, only=["model"])["model"].config == wanted


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        sparse(),
        sparse(routers.Soft(2), routers.Switch(gate=routers.Descriptions({"a": "b c", "d": "e"}))),
    ],
)
def test_a_configuration_comes_back_from_json(config):
    assert configs.build(json.loads(json.dumps(configs.describe(config)))) == config


def test_unknown_fields_of_a_configuration_are_refused():
    described = configs.describe(sparse())
    described["moe"]["num_expert"] = 3
    with pytest.raises(ValueError, match=r"field of MoeConfig 'num_expert'. Did you mean 'num_experts'"):
        configs.build(described)
