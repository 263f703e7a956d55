"""The mesh, rules to shardings, and global batches; what needs eight devices runs in a process of its own."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mtjax import optim, sharding, tree

SHAPES = {
    "token_embedder/embedding": (384, 128),
    "encoder/layers/attention/query/kernel": (2, 128, 256),
    "encoder/layers/attention/out/kernel": (2, 256, 128),
    "encoder/layers/mlp/wi_0/kernel": (2, 128, 512),
    "encoder/layers/mlp/wo/kernel": (2, 512, 128),
    "encoder/layers/pre_mlp_layer_norm/scale": (2, 128),
    "decoder/layers_0/self_attention/value/kernel": (128, 128),
    "decoder/relpos_bias/rel_embedding": (4, 32),
    "decoder/logits_dense/kernel": (128, 384),
}


def abstract(shapes=SHAPES):
    return tree.unflatten({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in shapes.items()})


def specs(shardings):
    return {path: s.spec for path, s in tree.flatten(shardings).items()}


def padded(spec, ndim):
    return tuple(spec) + (None,) * (ndim - len(spec))


def run_on_eight_devices(code):
    """Run a script in a process with eight host devices; it must end well."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_mesh_completes_sizes():
    mesh = sharding.abstract_mesh({"data": -1, "model": 4}, 32)
    assert dict(mesh.shape) == {"slice": 1, "data": 8, "fsdp": 1, "sequence": 1, "expert": 1, "model": 4}
    assert dict(sharding.make_mesh(devices=jax.devices()[:1]).shape)["data"] == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, r"needs 3 devices, but there are 8.*sizes out of \[1, 2, 4, 8\]"),
        ({"data": 4}, "needs 4 devices, but there are 8"),
        ({"data": -1, "model": 3}, "needs a multiple of 3 devices, but there are 8"),
        ({"data": -1, "model": -1}, r"Only one mesh axis can be -1.*\['data', 'model'\]"),
        ({"modell": 2}, r"Unknown mesh axis 'modell'.*'model'"),
        ({"data": 0}, "Mesh axis 'data' has size 0"),
        ({"data": -2}, "Mesh axis 'data' has size -2"),
    ],
)
def test_a_wrong_mesh_is_an_error(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.abstract_mesh(shape, 8)


def test_batches_must_divide():
    mesh = sharding.abstract_mesh({"data": 2, "fsdp": 2, "sequence": 2}, 8)
    sharding.check_divides(mesh, 12, lengths={"inputs": 6})
    with pytest.raises(ValueError, match=r"10 rows.*4 equal parts.*'data': 2, 'fsdp': 2.*Use 8 or 12 rows"):
        sharding.check_divides(mesh, 10)
    with pytest.raises(ValueError, match="Use 4 rows"):
        sharding.check_divides(mesh, 2)
    with pytest.raises(ValueError, match=r"length 7 of 'inputs'.*'sequence' \(2\)"):
        sharding.check_divides(mesh, 4, lengths={"inputs": 7})


def test_parameters_follow_their_rules_with_layers_uncut():
    mesh = sharding.abstract_mesh({"fsdp": 2, "model": 4}, 8)
    got = specs(sharding.parameter_shardings(mesh, sharding.PARAMETER_RULES, abstract()))
    want = {
        "token_embedder/embedding": ("model", "fsdp"),
        "encoder/layers/attention/query/kernel": (None, "fsdp", "model"),
        "encoder/layers/attention/out/kernel": (None, "model", "fsdp"),
        "encoder/layers/mlp/wi_0/kernel": (None, "fsdp", "model"),
        "encoder/layers/mlp/wo/kernel": (None, "model", "fsdp"),
        "encoder/layers/pre_mlp_layer_norm/scale": (None, None),
        "decoder/layers_0/self_attention/value/kernel": ("fsdp", "model"),
        "decoder/relpos_bias/rel_embedding": (None, None),
        "decoder/logits_dense/kernel": ("fsdp", "model"),
    }
    assert {path: padded(spec, len(SHAPES[path])) for path, spec in got.items()} == want


@pytest.mark.parametrize(
    ("rules", "shapes", "message"),
    [
        (None, {"encoder/layers/mlp/wi/kernel": (2, 128, 6)}, r"wi/kernel \(2, 128, 6\): dim 2 of size 6.*'model' of size 4.*\[1, 2, 3, 6\]"),
        (None, {"encoder/adapter/kernel": (4, 4)}, "No rule matches parameter 'encoder/adapter/kernel'"),
        ([(".*", P("modle"))], {"x": (4,)}, r"mesh axis in the rule for x: 'modle'.*'model'"),
        ([(".*", P(None, "model"))], {"layers/x": (2, 4)}, r"layers/x \(2, 4\).*is for 2 dims after 1 of layers; write one for 1"),
        ([(".*", P(("fsdp", "model")))], {"x": (4,)}, "dim 0 of size 4.*'fsdp' x 'model' of size 8"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_errors(rules, shapes, message):
    mesh = sharding.abstract_mesh({"fsdp": 2, "model": 4}, 8)
    with pytest.raises(ValueError, match=message):
        sharding.parameter_shardings(mesh, rules or sharding.PARAMETER_RULES, abstract(shapes))


@pytest.mark.parametrize("name", ["adafactor", "momentum", "adamw", "optax_adafactor"])
def test_optimizer_state_follows_its_parameters(name):
    optimizer = {
        "adafactor": optim.adafactor(0.1),
        "momentum": optim.adafactor(0.1, beta1=0.9),
        "adamw": optim.chain(optim.adamw(0.1), freeze=["encoder/.*"]),
        "optax_adafactor": optim.transformation("adafactor", 0.1),
    }[name]
    mesh = sharding.abstract_mesh({"fsdp": 2, "model": 4}, 8)
    params = abstract()
    state = jax.eval_shape(optimizer.init, params)
    got = specs(sharding.state_shardings(mesh, sharding.PARAMETER_RULES, state, params))
    want = {
        path: padded(spec, len(SHAPES[path]))
        for path, spec in specs(sharding.parameter_shardings(mesh, sharding.PARAMETER_RULES, params)).items()
    }
    cut = 0
    for leaf_path, leaf in tree.flatten(state).items():
        path = next((path for path in want if leaf_path.endswith("/" + path)), None)
        spec = padded(got[leaf_path], len(leaf.shape))
        if path is None or leaf.shape == (1,):
            assert not any(spec), leaf_path
        elif leaf.shape == SHAPES[path]:
            assert spec == want[path], leaf_path
            cut += any(spec)
        elif name != "optax_adafactor":
            rows_are_larger = SHAPES[path][-2] > SHAPES[path][-1]
            lost = -2 if ("v_row" in leaf_path) == rows_are_larger else -1
            keep = [dim for dim in range(len(want[path])) if dim != len(want[path]) + lost]
            assert spec == tuple(want[path][dim] for dim in keep), leaf_path
            cut += any(spec)
    assert cut >= (0 if name == "optax_adafactor" else 3)


def test_gradients_by_group_follow_their_parameters():
    mesh = sharding.abstract_mesh({"fsdp": 2, "model": 4}, 8)
    params = abstract({"mlp": (1,)} | {"decoder/logits_dense/kernel": (128, 384)})
    rules = [("mlp", P()), *sharding.PARAMETER_RULES]
    state = {
        "gradients": {
            "decoder": {"logits_dense": {"kernel": jax.ShapeDtypeStruct((5, 128, 384), "float32")}}
        },
        "weights": jax.ShapeDtypeStruct((5,), "float32"),
        "odd": {"decoder": {"logits_dense": {"kernel": jax.ShapeDtypeStruct((7,), "float32")}}},
    }
    got = specs(sharding.state_shardings(mesh, rules, state, params))
    assert got["gradients/decoder/logits_dense/kernel"] == P(None, "fsdp", "model")
    assert got["weights"] == P() and got["odd/decoder/logits_dense/kernel"] == P()


def test_bytes_per_device_counts_shards_and_keys():
    mesh = sharding.abstract_mesh({"fsdp": 2, "model": 4}, 8)
    params = abstract({"decoder/logits_dense/kernel": (128, 384), "decoder/decoder_norm/scale": (128,)})
    where = sharding.parameter_shardings(mesh, sharding.PARAMETER_RULES, params)
    assert sharding.bytes_per_device(params, where) == 4 * (128 * 384 // 8 + 128)
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert sharding.bytes_per_device(key, jax.sharding.NamedSharding(mesh, P())) == 8


def test_a_batch_on_one_device():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    local = {"encoder_input_tokens": np.arange(12, dtype=np.int32).reshape(3, 4), "weight": np.ones(3)}
    batch = sharding.global_batch(mesh, {k: v.astype(np.float32) for k, v in local.items()})
    np.testing.assert_array_equal(batch["encoder_input_tokens"], local["encoder_input_tokens"])
    assert batch["weight"].shape == (3,)
    assert sharding.data_hosts(mesh) == (1, 0)


def test_the_mesh_is_seen_while_tracing_only():
    mesh, seen = sharding.make_mesh(devices=jax.devices()[:1]), []

    def body(x):
        seen.append((sharding.current_mesh(), sharding.platform()))
        return sharding.constrain(x, "residual")

    x = jnp.ones((2, 3, 4))
    jaxpr = jax.make_jaxpr(sharding.on_mesh(body, mesh))(x)
    assert seen == [(mesh, "cpu")] and not jaxpr.eqns  # nothing to lay out on one device
    assert sharding.current_mesh() is None and sharding.constrain(x, "no such name") is x


def test_activations_are_laid_out_by_their_rules_where_the_axes_divide_them():
    out = run_on_eight_devices("""
        import jax, jax.numpy as jnp
        from mtjax import sharding
        mesh = sharding.make_mesh({"fsdp": 2, "sequence": 2, "model": 2})
        for shape, name in [((4, 6, 8), "mlp/hidden"), ((4, 1, 8), "mlp/hidden"), ((4, 3, 6, 8), "attention/query")]:
            f = sharding.on_mesh(lambda x: sharding.constrain(x, name), mesh)
            (constraint,) = jax.make_jaxpr(f)(jnp.ones(shape)).eqns
            print(tuple(constraint.params["sharding"].spec))
        for name, shape in [("mlp/hiden", (4, 6, 8)), ("mlp/hidden", (4, 6))]:
            try:
                jax.make_jaxpr(sharding.on_mesh(lambda x: sharding.constrain(x, name), mesh))(jnp.ones(shape))
            except ValueError as error:
                print(error)
    """)
    rows = "('slice', 'data', 'fsdp', 'expert')"
    fits, decodes, odd_heads, misspelt, too_few = out.splitlines()
    assert fits == f"({rows}, 'sequence', 'model')"
    assert decodes == f"({rows}, UNCONSTRAINED, 'model')"
    assert odd_heads == f"({rows}, UNCONSTRAINED, 'sequence', None)"
    assert (
        "No rule matches activation 'mlp/hiden'" in misspelt and "more dims than its shape (4, 6)" in too_few
    )


def test_global_batches_cut_rows_and_length():
    run_on_eight_devices("""
        import numpy as np
        from mtjax import sharding
        mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "sequence": 2})
        rows = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
        batch = sharding.global_batch(mesh, {"tokens": rows, "weights": np.ones(4, np.float32)})
        assert batch["tokens"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
        assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(1, 3)}
        assert {shard.data.shape for shard in batch["weights"].addressable_shards} == {(1,)}
        np.testing.assert_array_equal(batch["tokens"], rows)
    """)


def test_optax_states_without_parameters_are_replicated():
    mesh = sharding.abstract_mesh({"fsdp": 2, "model": 4}, 8)
    params = abstract()
    state = jax.eval_shape(optax.sgd(0.1).init, params)
    assert specs(sharding.state_shardings(mesh, sharding.PARAMETER_RULES, state, params)) == {}
