"""The one adapter between nnx modules and pure functions of plain nested dicts.

Modules only hold parameters: no random keys, caches or shardings live in them. Everything else uses jax
transforms. Parameters that a module does not declare (an adapter, `lora_a` beside `kernel`) are attached to
the submodule that their path names, so that a layer can apply them when present.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import sharding, tree
from mtjax.types import Array, Aux, Context, Features, Model, Output, Params, Whole

BLOCK = "block"  # layers/block_0, ...: layers of several kinds that are stacked together

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of a layer: everything; outputs of all
products; outputs of products with parameters; nothing."""


class Extra(nnx.Module):
    """A submodule that exists only in the parameters."""


def parameters(module: nnx.Module) -> Params:
    """Return a module's parameters as a plain nested dict."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def bind(abstract: nnx.Module, params: Params) -> Any:
    """Return a copy of an abstract module that holds these parameters.

    Raises ValueError where a parameter that the module declares is missing.
    """
    graph, state = nnx.split(abstract)
    declared, given = tree.flatten(nnx.to_pure_dict(state)), tree.flatten(params)
    if missing := sorted(declared.keys() - given.keys()):
        raise ValueError(
            f"{len(missing)} parameters are missing, the first ones {missing[:5]}. "
            "Were they made by another architecture, or with another scan_layers "
            "(models.functional.stack_layers and unstack_layers convert)?"
        )
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the abstract module stays as it is
    nnx.replace_by_pure_dict(state, tree.unflatten({path: given[path] for path in declared}))
    module = nnx.merge(graph, state)
    for path in given.keys() - declared.keys():
        *parents, name = path.split("/")
        node = module
        for parent in parents:
            if not hasattr(node, parent):
                setattr(node, parent, Extra())
            node = getattr(node, parent)
        setattr(node, name, nnx.Param(given[path]))
    return module


def functional(make: Callable[[Array], Any], *, config: Any, flops: Callable[..., float]) -> Model:
    """Turn `make(key) -> nnx module` into a Model of pure functions of nested dicts.

    The module has the methods features(batch, key, whole), logits(hidden_BLD), encode(batch),
    start(encoding, max_length, num_beams), decode(cache, tokens_B) and reorder(cache, rows_B). A cache is a
    dict whose `first_B` are the tokens to feed first. `flops` becomes Model.flops.
    """
    abstract = jax.eval_shape(lambda: make(jax.random.key(0)))

    def init(key: Array) -> Params:
        return parameters(make(key))

    def features(
        params: Params,
        batch: Mapping[str, Array],
        *,
        key: Array | None = None,
        whole: Whole | None = None,
    ) -> Features:
        return bind(abstract, params).features(batch, key, whole)

    def logits(params: Params, hidden_BLD: Array) -> Array:
        return bind(abstract, params).logits(hidden_BLD)

    def apply(params: Params, batch: Mapping[str, Array], *, key: Array | None = None) -> Output:
        module = bind(abstract, params)
        features = module.features(batch, key, None)
        return Output(module.logits(features.hidden_BLD), features.aux)

    def encode(params: Params, batch: Mapping[str, Array]) -> Any:
        return bind(abstract, params).encode(batch)

    def start(params: Params, encoding: Any, *, max_length: int, num_beams: int = 1) -> Any:
        return bind(abstract, params).start(encoding, max_length, num_beams)

    def decode(params: Params, cache: Any, tokens_B: Array) -> tuple[Array, Any]:
        return bind(abstract, params).decode(cache, tokens_B)

    return Model(config, init, features, logits, apply, encode, start, decode, abstract.reorder, flops)


class Superblock(nnx.Module):
    """Layers of several kinds, block_0, block_1, ..., that are stacked and scanned together."""

    def __init__(self, blocks: Sequence[nnx.Module]) -> None:
        self.num_blocks = len(blocks)
        for i, block in enumerate(blocks):
            setattr(self, f"{BLOCK}_{i}", block)


def blocks_of(unit: Any) -> list[Any]:
    """Return the layers of what is scanned: of a superblock, or the one layer itself."""
    if not isinstance(unit, Superblock):
        return [unit]
    return [getattr(unit, f"{BLOCK}_{i}") for i in range(unit.num_blocks)]


def add_layers(
    owner: nnx.Module,
    make_layer: Callable[[Array], nnx.Module],
    *,
    key: Array,
    num_layers: int,
    scan: bool,
    nth: tuple[int, Callable[[Array], nnx.Module]] | None = None,
) -> None:
    """Give `owner` its layers: one stacked module `layers`, or modules `layers_0`, `layers_1`, ...

    With nth = (n, make), the last of every n layers is made by `make`, and what is stacked is a Superblock of
    n layers. Layer i gets the same key, and so the same values (to rounding), either way.
    """
    n, make_nth = nth or (1, make_layer)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_layers)).reshape(-1, n)

    def make_unit(keys: Array) -> nnx.Module:
        blocks = [*map(make_layer, keys[:-1]), make_nth(keys[-1])]
        return blocks[0] if n == 1 else Superblock(blocks)

    if scan:
        setattr(owner, tree.STACK, jax.vmap(make_unit)(keys))
    else:
        stacked = jax.lax.map(make_unit, keys)  # a loop: the layer's initialisation is compiled once
        for i in range(num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i // n], blocks_of(stacked)[i % n])
            setattr(owner, f"{tree.STACK}_{i}", layer)


def run_layers(
    owner: nnx.Module,
    call: Callable[[Any, Array, Context], tuple[Array, Aux]],
    x_BLD: Array,
    context: Context,
    *,
    num_layers: int,
    remat_policy: str,
) -> tuple[Array, Aux]:
    """Run call(layer, x, context) over all layers of `owner`; each layer gets its own dropout key.

    Returns the last x and the layers' auxiliary losses and statistics, summed over layers.
    """

    def step(x_BLD: Array, layer: tuple[Any, Array]) -> tuple[Array, Aux]:
        module, i = layer
        key = None if context.key is None else jax.random.fold_in(context.key, i)
        x_BLD, aux = call(module, x_BLD, dataclasses.replace(context, key=key))
        return sharding.constrain(x_BLD, "residual"), aux

    if (policy := REMAT_POLICIES[remat_policy]) is not None:
        step = jax.checkpoint(step, policy=policy, prevent_cse=not hasattr(owner, tree.STACK))

    def unit_step(x_BLD: Array, unit: tuple[Any, Array]) -> tuple[Array, Aux]:
        blocks, total = blocks_of(unit[0]), Aux({}, {})
        for b, block in enumerate(blocks):
            x_BLD, aux = step(x_BLD, (block, unit[1] * len(blocks) + b))
            total = add_aux(total, aux)
        return x_BLD, total

    if hasattr(owner, tree.STACK):
        units = getattr(owner, tree.STACK)
        numbers = jnp.arange(num_layers // len(blocks_of(units)))
        x_BLD, aux = jax.lax.scan(unit_step, x_BLD, (units, numbers))
        return x_BLD, jax.tree.map(lambda values: values.sum(0), aux)
    total = Aux({}, {})
    for i in range(num_layers):
        x_BLD, aux = step(x_BLD, (getattr(owner, f"{tree.STACK}_{i}"), jnp.int32(i)))
        total = add_aux(total, aux)
    return x_BLD, total


def add_aux(first: Aux, second: Aux) -> Aux:
    """Add auxiliary losses and statistics by name."""
    return Aux(
        *(
            a | {name: a[name] + value if name in a else value for name, value in b.items()}
            for a, b in zip(first, second, strict=True)
        )
    )


def decode_layers(
    owner: nnx.Module,
    call: Callable[[Any, Array, dict[str, Any]], tuple[Array, dict[str, Any]]],
    x_BLD: Array,
    cache: dict[str, Any],
    *,
    num_layers: int,
) -> tuple[Array, dict[str, Any]]:
    """Run call(layer, x, layer's cache) -> (x, layer's cache) over all layers.

    A cache is a dict of what each layer keeps: stacked on a leading dim where scanned, else a list. It may
    start empty.
    """
    if hasattr(owner, tree.STACK):
        units = getattr(owner, tree.STACK)
        n = len(blocks_of(units))

        def unit_step(x_BLD: Array, unit: tuple[Any, Any]) -> tuple[Array, Any]:
            kept = []
            for b, block in enumerate(blocks_of(unit[0])):
                x_BLD, layer_cache = call(block, x_BLD, jax.tree.map(lambda leaf, b=b: leaf[b], unit[1]))
                kept.append(layer_cache)
            return x_BLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)

        by_unit = jax.tree.map(lambda leaf: leaf.reshape(-1, n, *leaf.shape[1:]), cache)
        x_BLD, by_unit = jax.lax.scan(unit_step, x_BLD, (units, by_unit))
        return x_BLD, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), by_unit)
    updated = []
    for i in range(num_layers):
        layer_cache = {name: values[i] for name, values in cache.items()}
        x_BLD, layer_cache = call(getattr(owner, f"{tree.STACK}_{i}"), x_BLD, layer_cache)
        updated.append(layer_cache)
    return x_BLD, {name: [layer_cache[name] for layer_cache in updated] for name in updated[0]}


def map_layers(owner: nnx.Module, function: Callable[[Any], Any], *, num_layers: int) -> Any:
    """Return function(layer) of every layer: stacked on a leading dim where scanned, else a list."""
    if hasattr(owner, tree.STACK):
        each = [jax.lax.map(function, block) for block in blocks_of(getattr(owner, tree.STACK))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *each)
    return [function(getattr(owner, f"{tree.STACK}_{i}")) for i in range(num_layers)]


def stack_layers(params: Params, *, stack: Callable[[Any], Any] = jnp.stack) -> Params:
    """Turn layers_0/..., layers_1/... into layers/... with a leading layer dim; `stack` joins arrays on it.

    Layers of several kinds that repeat every n layers become layers/block_0/..., ..., layers/block_{n-1}/...
    """
    if not isinstance(params, Mapping):
        return params
    stack_layers_of = functools.partial(stack_layers, stack=stack)
    prefix = f"{tree.STACK}_"
    numbers = sorted(int(name.removeprefix(prefix)) for name in params if name.startswith(prefix))
    others = {name: stack_layers_of(value) for name, value in params.items() if not name.startswith(prefix)}
    if not numbers:
        return others
    layers = [stack_layers_of(params[f"{prefix}{i}"]) for i in numbers]
    n = _period([jax.tree.structure(layer) for layer in layers])
    blocks = [jax.tree.map(lambda *leaves: stack(leaves), *layers[b::n]) for b in range(n)]
    return others | {tree.STACK: blocks[0] if n == 1 else {f"{BLOCK}_{b}": x for b, x in enumerate(blocks)}}


def _period(structures: Sequence[Any]) -> int:
    """Return the least n that divides the layers and after which their structures repeat."""
    count = len(structures)
    divisors = (n for n in range(1, count + 1) if count % n == 0)
    return next(n for n in divisors if all(structures[i] == structures[i % n] for i in range(count)))


def unstack_layers(params: Params) -> Params:
    """Turn layers/... with a leading layer dim into layers_0/..., layers_1/...: the inverse of stack_layers."""
    if not isinstance(params, Mapping):
        return params
    others = {name: unstack_layers(value) for name, value in params.items() if name != tree.STACK}
    if tree.STACK not in params:
        return others
    stacked = params[tree.STACK]
    n = sum(name.startswith(f"{BLOCK}_") for name in stacked)
    blocks = [stacked[f"{BLOCK}_{b}"] for b in range(n)] or [stacked]
    n, num_units = len(blocks), jax.tree.leaves(blocks[0])[0].shape[0]
    return others | {
        f"{tree.STACK}_{i}": unstack_layers(jax.tree.map(lambda leaf, i=i: leaf[i // n], blocks[i % n]))
        for i in range(n * num_units)
    }
