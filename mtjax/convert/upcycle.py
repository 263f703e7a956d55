"""Sparse upcycling (Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055): a dense model becomes a mixture of experts.

Every expert of a layer starts as a copy of its dense block, routers start anew. Where a token's weights sum to
1, and no token is dropped, the new model's outputs are the dense one's.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import lazy, tree
from mtjax.convert.weights import Weights, checked
from mtjax.lazy import Leaf
from mtjax.models import functional, routers, t5
from mtjax.types import Array, Context

_FREE = (
    "moe",
    "scan_layers",
    "dropout_rate",
    "dtype",
    "attention",
    "remat_policy",
)  # what has no say in parameters


def upcycle(weights: Weights, config: t5.T5Config, *, seed: int = 0) -> Weights:
    """Return the mixture of experts `config` with the parameters of a dense model; `seed` is of its routers.

    An optimizer's state is left behind. Raises ValueError where the models differ in more than their
    experts, and where the outputs would not be those of the dense model.
    """
    _check(weights.config, config)
    assert config.moe is not None
    moe, leaves = config.moe, dict[str, Leaf]()
    for path, leaf in weights.leaves.items():
        found = re.fullmatch(r"((encoder|decoder)/layers_(\d+)/mlp)/(wi(?:_\d+)?/kernel|wo/kernel)", path)
        if found and moe.router(found[2]) is not None and int(found[3]) % moe.every == moe.every - 1:
            path, leaf = f"{found[1]}/expert/{found[4]}", _copies(leaf, moe.num_experts)
        leaves[path] = leaf
    leaves |= _routers(config, jax.random.key(seed))
    origin = {**weights.origin, "upcycled": moe.num_experts}
    return checked(
        weights._replace(config=config, leaves=leaves, origin=origin, optimizer={}), source="the dense model"
    )


def _copies(leaf: Leaf, count: int) -> Leaf:
    return lazy.after(lambda x: np.broadcast_to(x, (count, *x.shape)), leaf, shape=(count, *leaf.shape))


def _check(dense: t5.T5Config, config: t5.T5Config) -> None:
    if dense.moe is not None or config.moe is None:
        raise ValueError("Upcycling starts from a dense model, and needs the `moe` of the model to make.")
    names = [field.name for field in dataclasses.fields(config) if field.name not in _FREE]
    if lines := [
        f"{name}: {getattr(dense, name)} -> {getattr(config, name)}"
        for name in names
        if getattr(dense, name) != getattr(config, name)
    ]:
        raise ValueError("The models differ in more than their experts: " + "; ".join(lines) + ".")
    moe = config.moe
    if moe.extra_mlp or moe.mlp_dim not in (None, config.mlp_dim):
        raise ValueError(
            "An expert starts as the dense block: leave MoeConfig.extra_mlp False and mlp_dim None."
        )
    if moe.dispatch != "dropless":
        raise ValueError(
            f"MoeConfig.dispatch={moe.dispatch!r} drops tokens, so the outputs would not be the dense model's. "
            "Upcycle with 'dropless'; a run that starts from the result may have either."
        )
    for router in {moe.encoder_router, moe.decoder_router} - {None}:
        if not _weights_sum_to_one(router, config):
            raise ValueError(
                f"Under {router} a token's weights do not sum to 1, so the outputs would not be the dense "
                "model's. Use TopK(normalize_weights=True), Hash, TaskLevel or DSelectK."
            )


def _weights_sum_to_one(settings: Any, config: t5.T5Config) -> bool:
    """Route random tokens of every task with new parameters."""
    assert config.moe is not None
    moe, num_tokens = config.moe, max(8, config.moe.num_tasks + 1)

    def total(key: Array) -> Array:
        router = settings.make(config.emb_dim, moe.num_experts, num_tasks=moe.num_tasks, key=key)
        ids = jnp.arange(num_tokens)[None]
        x_GND = jax.random.normal(key, (1, num_tokens, config.emb_dim))
        choice, _ = router(x_GND, jnp.ones(ids.shape, bool), Context(task_ids=ids - 1, tokens=ids))
        return choice.weights_GNK.sum(-1) if isinstance(choice, routers.TokenChoice) else jnp.zeros(())

    return np.allclose(jax.jit(total)(jax.random.key(0)), 1.0, atol=1e-5)


def _routers(config: t5.T5Config, key: Array) -> dict[str, np.ndarray]:
    """Draw every sparse layer's router."""
    assert config.moe is not None
    moe, leaves = config.moe, {}
    for side, num_layers in config.num_layers_by_side:
        if (settings := moe.router(side)) is None:
            continue
        for i in range(moe.every - 1, num_layers, moe.every):
            key, router_key = jax.random.split(key)
            router = settings.make(config.emb_dim, moe.num_experts, num_tasks=moe.num_tasks, key=router_key)
            for path, leaf in tree.flatten(functional.parameters(router)).items():
                leaves[f"{side}/layers_{i}/mlp/router/{path}"] = np.asarray(leaf)
    return leaves
