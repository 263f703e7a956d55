"""Optimizers as pairs of pure functions, learning-rate schedules, and what wraps around both.

Adafactor: Shazeer & Stern, 2018, https://arxiv.org/abs/1804.04235, as T5X defines it.
AdamW: Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101. Everything else comes from optax by name.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mtjax import tree
from mtjax.types import Array, Params, PyTree

Schedule = Callable[[Any], Array]
Rules = Sequence[tuple[str, float]]


class Optimizer(NamedTuple):
    """An optimizer as pure functions, compatible with optax.GradientTransformation.

    Every state has an int32 `step`, the number of updates so far; arrays that follow a parameter lie under
    that parameter's path. Updates are added to the parameters.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[PyTree, PyTree, Params], tuple[PyTree, PyTree]]  # (grads, state, params)
    learning_rate: Schedule


# --- Learning rates ---------------------------------------------------------------------------------------


def _cosine(step: Array, *, warmup_steps: int, steps_per_cycle: int) -> Array:
    cycles = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
    return jnp.maximum(0.0, 0.5 + 0.5 * jnp.cos(jnp.pi * (cycles % 1.0)))


def _linear(step: Array, *, warmup_steps: int, decay_factor: float) -> Array:
    return jnp.minimum(step / warmup_steps, 1.0 + decay_factor * (warmup_steps - step))


def learning_rate(
    *,
    factors: str = "constant * rsqrt_decay",
    base_learning_rate: float = 1.0,
    warmup_steps: int = 10000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20000,
    steps_per_cycle: int = 100000,
    step_offset: int = 0,
    min_learning_rate: float = 1e-8,
) -> Schedule:
    """Multiply factors into a schedule, step (from 0) -> float32 scalar.

    The factors and arguments are those of T5X's create_learning_rate_scheduler:
      constant                base_learning_rate
      linear_warmup           min(1, step / warmup_steps)
      linear_decay            base_learning_rate * min(step / warmup_steps, 1 - decay_factor * (step - warmup_steps)):
                              warm-up and constant are part of it
      rsqrt_decay             1 / sqrt(max(step, warmup_steps))
      rsqrt_normalized_decay  sqrt(warmup_steps) / sqrt(max(step, warmup_steps))
      decay_every             decay_factor ** (step // steps_per_decay)
      cosine_decay            (1 + cos(pi * c)) / 2, c the fraction of the current cycle after warm-up
    Steps count from step_offset, and the product is at least min_learning_rate. Raises ValueError for an
    unknown factor.
    """
    known: dict[str, Callable[[Array], Any]] = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: jnp.minimum(1.0, step / warmup_steps),
        "linear_decay": lambda step: (
            base_learning_rate * _linear(step, warmup_steps=warmup_steps, decay_factor=decay_factor)
        ),
        "rsqrt_decay": lambda step: jax.lax.rsqrt(jnp.maximum(step, warmup_steps)),
        "rsqrt_normalized_decay": lambda step: jax.lax.rsqrt(jnp.maximum(step / warmup_steps, 1.0)),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "cosine_decay": lambda step: _cosine(
            step, warmup_steps=warmup_steps, steps_per_cycle=steps_per_cycle
        ),
    }
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in known:
            raise tree.unknown_name("learning-rate factor", name, list(known))
    for argument, value in [("warmup_steps", warmup_steps), ("steps_per_decay", steps_per_decay)]:
        if value <= 0:
            raise ValueError(f"{argument} must be positive, got {value}; without warm-up use 1.")

    def schedule(step: Any) -> Array:
        since = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
        value = jnp.float32(1.0)
        for name in names:
            value = value * known[name](since)
        return jnp.maximum(min_learning_rate, value).astype(jnp.float32)

    return schedule


def _schedule(rate: Schedule | float) -> Schedule:
    """Turn a number into a constant schedule."""
    return rate if callable(rate) else lambda step: jnp.float32(rate)


# --- Adafactor --------------------------------------------------------------------------------------------


class AdafactorState(NamedTuple):
    """Second moments by parameter path: v_row and v_col where factored, v elsewhere; m with momentum."""

    step: Array
    v_row: Params
    v_col: Params
    v: Params
    m: Params


class _Leaf(NamedTuple):
    """One parameter's update and new moments; a moment that it does not have is None."""

    update: Any
    v_row: Any
    v_col: Any
    v: Any
    m: Any


def num_batch_dims(path: str, ndim: int) -> int:
    """Count the leading dims that only stack matrices: layers, and what else precedes the last two dims."""
    return max(tree.num_layer_dims(path), ndim - 2)


def factored_dims(path: str, shape: Sequence[int], *, min_dim_size: int) -> tuple[int, int] | None:
    """Return the (row, column) dims that a parameter's second moment factors into, or None.

    A matrix factors where both its dims are at least min_dim_size; its column dim is the larger one (the
    last one of equals), v_row keeps the row dim and v_col the column dim.
    """
    ndim = len(shape)
    if ndim - num_batch_dims(path, ndim) < 2 or min(shape[-2:]) < min_dim_size:
        return None
    return (ndim - 1, ndim - 2) if shape[-2] > shape[-1] else (ndim - 2, ndim - 1)


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i != dim)


def _again(x: PyTree) -> PyTree:
    """Return x so that what is computed from it a second time is not shared with the first.

    XLA would keep the shared array, as large as the parameter, in memory between both uses; computing it
    twice inside two fused loops is about five times as fast on CPU.
    """
    return jax.lax.optimization_barrier(x)


def _product(factors: Sequence[Array]) -> Array:
    return functools.reduce(jnp.multiply, factors)


def _sum_squares_down(x: Array) -> Array:
    """Return the sum of x^2 over the rows of a matrix, 16 rows at a time."""

    def add(total: Array, slab: Array) -> tuple[Array, None]:
        return total + sum(jnp.square(slab[i]) for i in range(16)), None

    zeros = jnp.zeros(x.shape[-1], jnp.float32)
    return jax.lax.scan(add, zeros, x.reshape(-1, 16, x.shape[-1]))[0]


def _mean_square(x: Array, dim: int) -> Array:
    """Return the mean of x^2 over one of the last two dims."""
    if x.ndim > 2 or dim == x.ndim - 1 or x.shape[-1] < 16384 or x.shape[0] % 16:
        return jnp.mean(jnp.square(x), axis=dim)
    # Down the columns of so wide a matrix XLA's CPU reduction walks with strides, 15 times as slow.
    total = jax.lax.platform_dependent(
        x, cpu=_sum_squares_down, default=lambda x: jnp.sum(jnp.square(x), axis=dim)
    )
    return total / x.shape[dim]


def _rms(x: Array, dims: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))


def adafactor(
    learning_rate: Schedule | float,
    *,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float | None = 1.0,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    beta1: float | None = None,
    weight_decay_rate: float | None = None,
    weight_decay_rate_lr_exponent: float | None = None,
) -> Optimizer:
    """Build T5X's Adafactor (sections 4 to 8 of the paper).

    With t the step from 0, d = 1 - (t + 1 - step_offset)^-decay_rate and v = d v + (1 - d) (g^2 + epsilon1):
      u = g / sqrt(v)                                          v = v_row v_col / mean(v_row) where factored
      u = u / max(1, rms(u) / clipping_threshold)
      update = -learning_rate(t) * max(epsilon2, rms(parameter)) * u
    beta1 averages updates, at the price of one array per parameter. weight_decay_rate shrinks parameters by
    that share a step, times learning_rate ** weight_decay_rate_lr_exponent where given.

    Leading layer dims (tree.num_layer_dims) are batch dims: factoring, rms and clipping are per layer, so
    stacked and unstacked layers train alike. A parameter with more dims is a stack of matrices too: experts'
    kernels [E, D, F] are factored, scaled and clipped one by one, as by T5X's rules for mixtures of experts.
    """
    schedule = _schedule(learning_rate)

    def init_leaf(path: str, p: Array) -> _Leaf:
        dims = factored_dims(path, p.shape, min_dim_size=min_dim_size_to_factor)
        zeros = lambda shape: jnp.zeros(shape, jnp.float32)  # noqa: E731
        return _Leaf(
            update=p,
            v_row=zeros(_without(p.shape, dims[1])) if dims else None,
            v_col=zeros(_without(p.shape, dims[0])) if dims else None,
            v=None if dims else zeros(p.shape),
            m=None if beta1 is None else zeros(p.shape),
        )

    def moments(path: str, g: Array, old: _Leaf, decay: Array) -> tuple[_Leaf, tuple[Array, ...]]:
        """Return the new second moments, and g with the factors that divide it by their root."""
        if (dims := factored_dims(path, g.shape, min_dim_size=min_dim_size_to_factor)) is None:
            v = decay * old.v + (1.0 - decay) * (jnp.square(g) + epsilon1)
            return old._replace(v=v), (g, jax.lax.rsqrt(v))
        row, column = dims
        v_row = decay * old.v_row + (1.0 - decay) * (_mean_square(g, column) + epsilon1)
        v_col = decay * old.v_col + (1.0 - decay) * (_mean_square(_again(g), row) + epsilon1)
        # After its column dim is gone, v_row's row dim is the last one, as v_col's column dim is.
        rows = jnp.expand_dims(jax.lax.rsqrt(v_row / jnp.mean(v_row, axis=-1, keepdims=True)), column)
        columns = jnp.expand_dims(jax.lax.rsqrt(v_col), row)
        return old._replace(v_row=v_row, v_col=v_col), (g, rows, columns)

    def update_leaf(path: str, g: Array, p: Array, old: _Leaf, *, decay: Array, rate: Array) -> _Leaf:
        g, wide = g.astype(jnp.float32), p.astype(jnp.float32)
        within = tuple(range(num_batch_dims(path, p.ndim), p.ndim))
        new, factors = moments(path, g, old, decay)
        scale = -rate
        if multiply_by_parameter_scale:
            scale = scale * jnp.maximum(epsilon2, _rms(wide, within))
        if clipping_threshold is not None:
            scale = scale / jnp.maximum(1.0, _rms(_product(_again(factors)), within) / clipping_threshold)
        change = scale * _product(factors)
        if beta1 is not None:
            change = beta1 * old.m + (1.0 - beta1) * change
            new = new._replace(m=change)
        if shrink is not None:
            change = change - shrink(rate) * wide
        return new._replace(update=change)

    shrink: Callable[[Array], Any] | None = None
    if weight_decay_rate_lr_exponent is not None:
        shrink = lambda rate: (weight_decay_rate or 1.0) * rate**weight_decay_rate_lr_exponent  # noqa: E731
    elif weight_decay_rate:
        shrink = lambda rate: weight_decay_rate  # noqa: E731

    def pack(step: Array, leaves: Mapping[str, _Leaf]) -> AdafactorState:
        def of(name: str) -> Params:
            arrays = {path: getattr(leaf, name) for path, leaf in leaves.items()}
            return tree.unflatten({path: x for path, x in arrays.items() if x is not None})

        return AdafactorState(step, of("v_row"), of("v_col"), of("v"), of("m"))

    def init(params: Params) -> AdafactorState:
        return pack(jnp.int32(0), {path: init_leaf(path, p) for path, p in tree.flatten(params).items()})

    def update(grads: PyTree, state: AdafactorState, params: Params) -> tuple[PyTree, AdafactorState]:
        rate = schedule(state.step)
        since = (state.step - step_offset).astype(jnp.float32) + 1.0
        decay = 1.0 - since**-decay_rate
        fields = [tree.flatten(x) for x in (state.v_row, state.v_col, state.v, state.m)]
        values = tree.flatten(params)
        leaves = {
            path: update_leaf(
                path,
                g,
                values[path],
                _Leaf(g, *(field.get(path) for field in fields)),
                decay=decay,
                rate=rate,
            )
            for path, g in tree.flatten(grads).items()
        }
        updates = jax.tree.unflatten(jax.tree.structure(grads), [leaf.update for leaf in leaves.values()])
        return updates, pack(state.step + 1, leaves)

    return Optimizer(init, update, schedule)


# --- optax ------------------------------------------------------------------------------------------------


class TransformationState(NamedTuple):
    """An optax state and the number of updates so far."""

    step: Array
    inner: PyTree


def _builds_transformation(factory: Any) -> bool:
    """Tell from a function's signature whether it returns a transformation."""
    if not inspect.isfunction(factory) or factory.__name__.startswith("_"):
        return False
    signature = inspect.signature(factory)
    returned = signature.return_annotation
    if returned is inspect.Signature.empty:  # a few of optax's factories carry no annotations
        return factory.__name__.startswith("scale_by_") or "learning_rate" in signature.parameters
    name = returned if isinstance(returned, str) else getattr(returned, "__name__", "")
    return name.rsplit(".", 1)[-1] in ("GradientTransformation", "GradientTransformationExtraArgs")


def _factories() -> dict[str, Callable[..., Any]]:
    """Return the factories of transformations of optax and optax.contrib by name."""
    members = vars(optax.contrib) | vars(optax)
    return {name: x for name, x in members.items() if _builds_transformation(x)}


def transformation(name: str, learning_rate: Schedule | float, **arguments: Any) -> Optimizer:
    """Build any optax (or optax.contrib) transformation by name, e.g. 'lion' with b1=0.95.

    One without a learning rate of its own, such as 'scale_by_adam', is followed by a step of -learning_rate.
    Raises ValueError for an unknown name or argument.
    """
    factories = _factories()
    if name not in factories:
        raise tree.unknown_name("optax transformation", name, list(factories))
    parameters = inspect.signature(factories[name]).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for argument in arguments:
        if argument not in parameters and not takes_any:
            raise tree.unknown_name(f"argument of optax's {name}", argument, list(parameters))
    schedule = _schedule(learning_rate)
    if "learning_rate" in parameters:
        inner = factories[name](learning_rate=learning_rate, **arguments)
    else:
        inner = optax.chain(factories[name](**arguments), optax.scale_by_learning_rate(learning_rate))

    def init(params: Params) -> TransformationState:
        return TransformationState(jnp.int32(0), inner.init(params))

    def update(
        grads: PyTree, state: TransformationState, params: Params
    ) -> tuple[PyTree, TransformationState]:
        updates, new = inner.update(grads, state.inner, params)
        return updates, TransformationState(state.step + 1, new)

    return Optimizer(init, update, schedule)


def adamw(
    learning_rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Rules = 0.01,
) -> Optimizer:
    """Build AdamW; weight_decay is one rate or rules as in `chain`."""
    return chain(transformation("adam", learning_rate, b1=b1, b2=b2, eps=eps), weight_decay=weight_decay)


# --- Around an optimizer ----------------------------------------------------------------------------------


def _check_patterns(argument: str, patterns: Sequence[str], paths: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(
                f"{argument}: the regex {pattern!r} matches no parameter. It must match a whole path; paths "
                f"here are {', '.join(list(paths)[:8])}, ... ({len(paths)} in all)."
            )


def _value(argument: str, rules: Rules, path: str) -> float:
    try:
        return tree.lookup(rules, path)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def chain(
    optimizer: Optimizer,
    *,
    clip_global_norm: float | None = None,
    weight_decay: float | Rules = (),
    learning_rate_multipliers: Rules = (),
    freeze: Sequence[str] = (),
) -> Optimizer:
    """Wrap an optimizer; every regex matches whole parameter paths, and the first match wins.

    1. freeze: parameters matching one of these regexes stay bit for bit and hold no optimizer memory.
    2. clip_global_norm scales the gradient of the others down to this L2 norm.
    3. weight_decay adds -learning_rate(step) * rate * parameter to the update (decoupled).
    4. learning_rate_multipliers scale the update.
    A rate is one number, or rules [(regex, number), ...] that cover every trained parameter. Raises
    ValueError in init where a regex matches nothing or rules leave a parameter out.
    """
    decay_rules: Rules = [(".*", weight_decay)] if isinstance(weight_decay, (int, float)) else weight_decay
    decays = any(rate for _, rate in decay_rules)
    if clip_global_norm is not None and clip_global_norm <= 0:
        raise ValueError(
            f"clip_global_norm must be positive, got {clip_global_norm}; None switches clipping off."
        )

    def is_frozen(path: str) -> bool:
        return any(re.fullmatch(pattern, path) for pattern in freeze)

    def split(nested: PyTree) -> dict[str, Any]:
        return {path: x for path, x in tree.flatten(nested).items() if not is_frozen(path)}

    def init(params: Params) -> PyTree:
        paths = list(tree.flatten(params))
        _check_patterns("freeze", freeze, paths)
        _check_patterns("weight_decay", [pattern for pattern, _ in decay_rules], paths)
        _check_patterns("learning_rate_multipliers", [p for p, _ in learning_rate_multipliers], paths)
        trained = split(params)
        for path in trained:
            for name, rules in [
                ("weight_decay", decay_rules),
                ("learning_rate_multipliers", learning_rate_multipliers),
            ]:
                if rules:
                    _value(name, rules, path)
        return optimizer.init(tree.unflatten(trained))

    def clip(grads: dict[str, Array]) -> dict[str, Array]:
        if clip_global_norm is None:
            return grads
        scale = clip_global_norm / jnp.maximum(clip_global_norm, tree.norm(grads))
        return {path: (g * scale).astype(g.dtype) for path, g in grads.items()}

    def finish(path: str, update: Array, p: Array, rate: Array) -> Array:
        if decays and (decay := _value("weight_decay", decay_rules, path)):
            update = update - (rate * decay) * p
        if learning_rate_multipliers:
            update = update * _value("learning_rate_multipliers", learning_rate_multipliers, path)
        return update

    def update(grads: PyTree, state: PyTree, params: Params) -> tuple[PyTree, PyTree]:
        values = split(params)
        rate = optimizer.learning_rate(state.step)
        updates, new = optimizer.update(tree.unflatten(clip(split(grads))), state, tree.unflatten(values))
        done = {path: finish(path, u, values[path], rate) for path, u in tree.flatten(updates).items()}
        # x + (-0.0) is x for every x, so a frozen parameter keeps its bits, the sign of zero included; within
        # one jit XLA drops the addition.
        full = tree.map_with_path(lambda path, p: done.get(path, jnp.full_like(p, -0.0)), params)
        return full, new

    return Optimizer(init, update, optimizer.learning_rate)


def average(average_params: Params, params: Params, decay: float | Array) -> Params:
    """Return the exponential moving average decay * average + (1 - decay) * params, leaf by leaf.

    Start it from a copy of the parameters; the sum is taken in float32.
    """

    def one(a: Array, p: Array) -> Array:
        wide = decay * a.astype(jnp.float32) + (1.0 - decay) * p.astype(jnp.float32)
        return wide.astype(a.dtype)

    return jax.tree.map(one, average_params, params)
