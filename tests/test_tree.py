"""Trees of parameters by path."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import optim, tree

names = st.text(alphabet="ab01_", min_size=1, max_size=3)
nested = st.recursive(
    st.integers(0, 9).map(np.int32),
    lambda children: st.dictionaries(names, children, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda x: isinstance(x, dict))


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


@hypothesis.given(nested)
def test_unflatten_inverts_flatten(x):
    assert tree.unflatten(tree.flatten(x)) == x


def test_paths_name_every_kind_of_node():
    state = {
        "a": [jnp.ones(1), (jnp.ones(2),)],
        "opt": optim.TransformationState(jnp.int32(0), {"v": jnp.ones(3)}),
    }
    assert list(tree.flatten(state)) == ["a/0", "a/1/0", "opt/step", "opt/inner/v"]
    assert tree.flatten({}) == {} == tree.unflatten({})


def test_map_with_path_sees_paths_and_leaves():
    x, y = {"a": {"b": 1, "c": 2}}, {"a": {"b": 10, "c": 20}}
    assert tree.map_with_path(lambda path, a, b: (path, a + b), x, y) == {
        "a": {"b": ("a/b", 11), "c": ("a/c", 22)}
    }


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = [("a/.*", 1), ("a", 2), (".*c", 3), (".*", 4)]
    assert tree.match(rules, {"a": {"b": 0, "c": 0}, "ab": 0, "xc": 0}) == {
        "a": {"b": 1, "c": 1},
        "ab": 4,
        "xc": 3,
    }
    assert tree.lookup(rules, "a") == 2
    with pytest.raises(ValueError, match=r"No rule matches parameter 'x/a'\. Rules, in order: \['a/\.\*'\]"):
        tree.lookup(rules[:1], "x/a")


def test_layer_dims_are_counted_by_path_segment():
    assert tree.num_layer_dims("encoder/layers/mlp/wi/kernel") == 1
    assert tree.num_layer_dims("encoder/layers_0/mlp/wi/kernel") == 0
    assert tree.num_layer_dims("a/layers/b/layers/c") == 2
    assert tree.num_layer_dims("players/x") == 0


@hypothesis.given(nested, names)
def test_combine_inverts_partition(x, name):
    chosen, others = tree.partition(lambda path: name in path, x)
    assert all(name in path for path in tree.flatten(chosen))
    assert not any(name in path for path in tree.flatten(others))
    assert tree.combine(chosen, others) == x == tree.combine(others, chosen)
    if chosen:
        with pytest.raises(ValueError, match="Both trees hold"):
            tree.combine(chosen, x)


def test_products_are_those_of_one_long_vector():
    rng = np.random.default_rng(0)
    x, y = ({"a": rng.standard_normal((3, 4)), "b": {"c": rng.standard_normal(5)}} for _ in range(2))
    x, y = (jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), t) for t in (x, y))
    long = [np.concatenate([np.ravel(v) for v in jax.tree.leaves(t)]) for t in (x, y)]
    np.testing.assert_allclose(tree.dot(x, y), long[0] @ long[1], rtol=1e-5)
    np.testing.assert_allclose(tree.norm(x), np.linalg.norm(long[0]), rtol=1e-6)
    assert tree.num_parameters(x) == 17
    assert tree.dot({}, {}) == 0


def test_products_of_bfloat16_accumulate_in_float32():
    ones = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)}
    assert tree.dot(ones, ones) == 1001 and tree.dot(ones, ones).dtype == jnp.float32


def test_difference_lists_missing_extra_and_misshapen():
    want = {"a": shape(2), "b": {"c": shape(2, 3), "d": shape()}}
    have = {"b": {"c": shape(3, 2), "d": shape()}, "e": shape(1)}
    assert tree.difference(want, have) == [
        "extra      e (1,)",
        "misshapen  b/c expected (2, 3), found (3, 2)",
        "missing    a (2,)",
    ]
    assert tree.difference(want, want) == []


def test_unknown_names_offer_the_nearest():
    error = tree.unknown_name("task", "sst3", ["sst2", "mnli", "sst"])
    assert str(error) == "Unknown task 'sst3'. Did you mean 'sst' or 'sst2'? Known: mnli, sst, sst2."
    assert str(tree.unknown_name("task", "x", [])) == "Unknown task 'x'. Known: none."
    assert str(tree.unknown_name("n", "q", [f"{i:02}" for i in range(30)])).endswith("18, 19, ....")
