"""Compile a training run: abstract state, shardings, and the jitted init, step and evaluate.

Nothing is allocated here, so a dry run, a benchmark and a compilation for absent hardware build the same
Program as training does.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtjax import losses as loss_lib
from mtjax import optim, sharding, tree
from mtjax.balance import uniform
from mtjax.peft import full
from mtjax.types import Array, At, Balancer, Batch, Model, Params, Peft, PyTree, Whole


class TrainState(NamedTuple):
    """Everything a step reads and writes; `params` are the trainable ones."""

    step: Array
    params: Params
    frozen: Params
    opt: PyTree
    balance: PyTree
    average: Params  # exponential moving average of params, {} where it is off
    key: Array


class TaskTable(NamedTuple):
    """The tasks of a run; a task's id is its position."""

    names: tuple[str, ...]
    families: tuple[str, ...]


class StepMetrics(NamedTuple):
    """Sums of one step: divided on the host only."""

    tasks: loss_lib.TaskSums  # [T] each
    total: loss_lib.TaskSums  # scalars over every target token
    gradient_norm: Array
    learning_rate: Array
    is_finite: Array
    balance: dict[str, Array]
    aux: dict[str, Array]
    stats: dict[str, Array]  # of the model, sums by name; see monitor.routing


class Program(NamedTuple):
    """The compiled pieces of a run."""

    mesh: Mesh
    tasks: TaskTable
    groups: tuple[str, ...]
    abstract: TrainState
    shardings: TrainState
    init: Callable[[Array], TrainState]
    start_from: Callable[[Array, Params], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[Params, Batch], tuple[loss_lib.TaskSums, loss_lib.TaskSums]]
    merge: Callable[[TrainState], Params]
    model_shardings: Params  # of the whole model's parameters, as merge returns them


def group_ids(tasks: TaskTable, group_by: str | Mapping[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the groups' names and every task's group, int32 [T].

    group_by is 'task', 'family', or a mapping from every task to its group.
    """
    if isinstance(group_by, Mapping):
        if missing := [name for name in tasks.names if name not in group_by]:
            raise ValueError(f"group_by names no group for the tasks {missing[:10]}; give every task one.")
        labels: Sequence[str] = [group_by[name] for name in tasks.names]
    elif group_by in ("task", "family"):
        labels = tasks.names if group_by == "task" else tasks.families
    else:
        raise tree.unknown_name("group_by", group_by, ["task", "family"])
    groups = tuple(dict.fromkeys(labels))
    index = {name: i for i, name in enumerate(groups)}
    return groups, np.array([index[label] for label in labels], np.int32)


class _Losses(NamedTuple):
    """What one forward pass says."""

    groups_G: Array
    aux_loss: Array
    tasks: loss_lib.TaskSums
    total: loss_lib.TaskSums
    aux: dict[str, Array]
    stats: dict[str, Array]


def _split_rows(batch: Batch, microbatches: int, group_rows: int) -> Batch:
    """Cut rows into microbatches [M, B/M, ...], each with rows of every device, group_rows at a time."""

    def split(x: Array) -> Array:
        by_group = x.reshape(-1, microbatches, group_rows, *x.shape[1:]).swapaxes(0, 1)
        return by_group.reshape(microbatches, -1, *x.shape[1:])

    return {name: split(x) for name, x in batch.items()}


def _group_rows(model: Model) -> int:
    """Return how many rows the model routes together."""
    moe = getattr(model.config, "moe", None)
    return 1 if moe is None else moe.group_rows


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _forward(model: Model, peft: Peft, config: loss_lib.LossConfig, group_of_T: np.ndarray, num_groups: int):
    """Build losses(params, frozen, batch, key, total_tokens, whole) -> ((losses_G, aux), _Losses)."""

    def forward(params, frozen, batch, key, total_tokens, whole):
        denominator = _denominator(config, total_tokens)
        merged = peft.merge(frozen, params)
        features = model.features(merged, batch, key=key, whole=whole)
        tasks, total = loss_lib.task_sums(
            functools.partial(model.logits, merged),
            features.hidden_BLD,
            batch,
            num_tasks=len(group_of_T),
            config=config,
        )
        losses_G = jax.ops.segment_sum(tasks.loss_T, group_of_T, num_groups) / denominator
        # Means over tokens: where losses are divided by a constant instead, they keep their share of the gradient.
        aux_loss = sum(features.aux.values(), jnp.float32(0)) * (jnp.maximum(total_tokens, 1.0) / denominator)
        said = _Losses(losses_G, aux_loss, tasks, total, features.aux, features.stats)
        return (losses_G, aux_loss), said

    return forward


def _whole_batch(forward, params: Params) -> tuple[_Losses, Callable[..., PyTree]]:
    """Differentiate a batch in one piece."""
    _, vjp, said = jax.vjp(lambda p: forward(p), params, has_aux=True)
    return said, lambda w_G, aux=0.0: vjp((jnp.asarray(w_G, jnp.float32), jnp.float32(aux)))[0]


def _accumulate(forward, params: Params, batch: Batch, keys: Array) -> _Losses:
    """Sum the losses of every microbatch."""

    def body(carry, slice_):
        said = forward(params, *slice_)[1]
        return _add(carry, said), None

    first = jax.tree.map(lambda x: x[0], (batch, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(forward, params, *first)[1])
    return jax.lax.scan(body, zeros, (batch, keys))[0]


def _accumulate_gradient(forward, params: Params, batch: Batch, keys: Array, w_G: Array, aux):
    """Sum the losses and the gradient of w_G @ losses_G + aux * aux_loss over microbatches."""

    def body(carry, slice_):
        _, vjp, said = jax.vjp(lambda p: forward(p, *slice_), params, has_aux=True)
        return _add(carry, (said, vjp((jnp.asarray(w_G, jnp.float32), jnp.float32(aux)))[0])), None

    first = jax.tree.map(lambda x: x[0], (batch, keys))
    said = jax.eval_shape(forward, params, *first)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (said, params))
    return jax.lax.scan(body, zeros, (batch, keys))[0]


def _micro_batches(forward, params: Params, batch: Batch, keys: Array, w_G: Array | None):
    """Differentiate a batch in microbatches.

    With weights known beforehand losses and gradient come from one pass, and the balancer's one pullback
    returns that gradient; otherwise every pullback recomputes each microbatch.
    """
    if w_G is not None:
        said, gradient = _accumulate_gradient(forward, params, batch, keys, w_G, 1.0)
        return said, lambda w_G, aux=0.0: gradient
    said = _accumulate(forward, params, batch, keys)
    return said, lambda w_G, aux=0.0: _accumulate_gradient(forward, params, batch, keys, w_G, aux)[1]


def _denominator(config: loss_lib.LossConfig, total_tokens: Array) -> Array:
    """Return what losses are divided by: the global token count, or the recipe's constant."""
    if config.normalizing_factor in (None, "tokens"):
        return jnp.maximum(total_tokens, 1.0)
    return jnp.float32(config.normalizing_factor)


def _whole(batch: Batch, num_tasks: int) -> Whole:
    sides = ("encoder", "decoder") if "encoder_input_tokens" in batch else ("decoder",)
    tokens = {side: loss_lib.non_padding(batch, side).sum(dtype=jnp.float32) for side in sides}
    tokens["targets"] = batch["decoder_loss_weights"].sum(dtype=jnp.float32)
    return Whole(tokens, num_tasks)


def _keep_if(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _make_step(
    *,
    model: Model,
    optimizer: optim.Optimizer,
    balancer: Balancer,
    peft: Peft,
    loss: loss_lib.LossConfig,
    group_of_T: np.ndarray,
    num_groups: int,
    microbatches: int,
    ema_decay: float | None,
):
    """Build step(state, batch) -> (state, metrics), with no branch on a method's name."""
    forward = _forward(model, peft, loss, group_of_T, num_groups)
    num_tasks = len(group_of_T)

    def differentiate(params, state, batch, total, w_G):
        key = jax.random.fold_in(state.key, state.step)
        whole = _whole(batch, num_tasks)
        if microbatches == 1:
            return _whole_batch(lambda p: forward(p, state.frozen, batch, key, total, whole), params)
        keys = jax.random.split(key, microbatches)
        rows = _split_rows(batch, microbatches, _group_rows(model))
        one = lambda p, b, k: forward(p, state.frozen, b, k, total, whole)  # noqa: E731
        return _micro_batches(one, params, rows, keys, w_G)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        counts_T, total = loss_lib.token_counts(batch, num_tasks=num_tasks)
        counts_G = jax.ops.segment_sum(counts_T, group_of_T, num_groups)
        w_G = balancer.weights(state.balance, counts_G)
        said, pullback = differentiate(state.params, state, batch, total, w_G)

        def moved(delta):
            there, back = differentiate(_add(state.params, delta), state, batch, total, None)
            return there.groups_G, back

        grads, balance, stats = balancer.update(
            state.balance, said.groups_G, counts_G, At(pullback=pullback, moved=moved)
        )
        gradient_norm = tree.norm(grads)
        is_finite = jnp.isfinite(gradient_norm) & jnp.isfinite(said.total.loss_T)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, updates)
        average = optim.average(state.average, params, ema_decay) if ema_decay else state.average
        # The old buffers are donated, so a bad step is undone here and not on the host.
        params, opt, balance, average = _keep_if(
            is_finite,
            (params, opt, balance, average),
            (state.params, state.opt, state.balance, state.average),
        )
        new = state._replace(step=state.step + 1, params=params, opt=opt, balance=balance, average=average)
        metrics = StepMetrics(
            said.tasks,
            said.total,
            gradient_norm,
            jnp.asarray(optimizer.learning_rate(state.step), jnp.float32),
            is_finite,
            stats,
            said.aux,
            said.stats,
        )
        return new, metrics

    return step


def _make_init(
    *, optimizer: optim.Optimizer, balancer: Balancer, peft: Peft, num_groups: int, ema_decay: float | None
):
    """Build start_from(key, model_params) -> TrainState."""

    def start_from(key, model_params):
        peft_key, balance_key, train_key = jax.random.split(key, 3)
        frozen, params = peft.split(peft_key, model_params)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            frozen=frozen,
            opt=optimizer.init(params),
            balance=balancer.init(balance_key, num_groups, params),
            # A copy: the step donates its state, and one buffer cannot be donated twice.
            average=jax.tree.map(jnp.copy, params) if ema_decay else {},
            key=train_key,
        )

    return start_from


def _shardings(mesh: Mesh, rules: sharding.Rules, abstract: TrainState) -> TrainState:
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=replicated,
        params=sharding.parameter_shardings(mesh, rules, abstract.params),
        frozen=sharding.parameter_shardings(mesh, rules, abstract.frozen),
        opt=sharding.state_shardings(mesh, rules, abstract.opt, abstract.params),
        balance=sharding.state_shardings(mesh, rules, abstract.balance, abstract.params),
        average=sharding.parameter_shardings(mesh, rules, abstract.average),
        key=replicated,
    )


def program(
    *,
    model: Model,
    optimizer: optim.Optimizer,
    tasks: TaskTable,
    batch_size: int,
    balancer: Balancer | None = None,
    peft: Peft | None = None,
    loss: loss_lib.LossConfig | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    rules: sharding.Rules = sharding.PARAMETER_RULES,
    activation_rules: sharding.Rules = sharding.ACTIVATION_RULES,
    microbatches: int = 1,
    group_by: str | Mapping[str, str] = "task",
    ema_decay: float | None = None,
) -> Program:
    """Build a run's Program.

    Raises ValueError where the mesh does not divide the devices, or the rows of a microbatch the mesh.
    """
    balancer, peft, loss = balancer or uniform(), peft or full(), loss or loss_lib.LossConfig()
    if not isinstance(mesh, Mesh):
        mesh = sharding.make_mesh(mesh)
    if microbatches < 1 or batch_size % microbatches:
        divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ValueError(
            f"microbatches={microbatches} does not divide batch_size={batch_size}; use one of {divisors}."
        )
    sharding.check_divides(mesh, batch_size // microbatches)
    if (rows := batch_size // microbatches // sharding.num_row_shards(mesh)) % _group_rows(model):
        raise ValueError(
            f"A device has {rows} rows of a microbatch, which cannot be cut into routing groups of "
            f"MoeConfig.group_rows={_group_rows(model)}; use a divisor of {rows}."
        )
    groups, group_of_T = group_ids(tasks, group_by)
    start_from = _make_init(
        optimizer=optimizer, balancer=balancer, peft=peft, num_groups=len(groups), ema_decay=ema_decay
    )
    step = _make_step(
        model=model,
        optimizer=optimizer,
        balancer=balancer,
        peft=peft,
        loss=loss,
        group_of_T=group_of_T,
        num_groups=len(groups),
        microbatches=microbatches,
        ema_decay=ema_decay,
    )

    def init(key):
        model_key, rest = jax.random.split(key)
        return start_from(rest, model.init(model_key))

    def evaluate(params, batch):
        features = model.features(params, batch, key=None)
        return loss_lib.task_sums(
            functools.partial(model.logits, params),
            features.hidden_BLD,
            batch,
            num_tasks=len(tasks.names),
            config=loss,
        )

    merge = lambda state: peft.merge(state.frozen, state.average or state.params)  # noqa: E731
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = _shardings(mesh, rules, abstract)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
    )
    model_shardings = sharding.parameter_shardings(mesh, rules, jax.eval_shape(merge, abstract))
    rows = sharding.batch_sharding(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    on_mesh = functools.partial(sharding.on_mesh, mesh=mesh, rules=activation_rules)
    return Program(
        mesh=mesh,
        tasks=tasks,
        groups=groups,
        abstract=abstract,
        shardings=shardings,
        init=jax.jit(on_mesh(init), out_shardings=shardings),
        start_from=jax.jit(
            on_mesh(start_from), in_shardings=(None, model_shardings), out_shardings=shardings
        ),
        step=jax.jit(
            on_mesh(step),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        evaluate=jax.jit(on_mesh(evaluate), in_shardings=(model_shardings, rows), out_shardings=replicated),
        merge=jax.jit(on_mesh(merge), in_shardings=(shardings,), out_shardings=model_shardings),
        model_shardings=model_shardings,
    )


def abstract_parameters(run: Program) -> Params:
    """Return the whole model's parameters as ShapeDtypeStructs with their shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(run.merge, run.abstract),
        run.model_shardings,
    )


@contextlib.contextmanager
def compiling(run: Program, batch: Batch) -> Iterator[None]:
    """Compile the step for batches like `batch` in a thread beside the body, which may make the state.

    The step is compiled when the context ends; what failed in compiling is raised there.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mtjax-compile") as pool:
        compiled = pool.submit(lambda: run.step.lower(run.abstract, like).compile())
        yield
        compiled.result()
