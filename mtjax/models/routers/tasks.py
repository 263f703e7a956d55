"""What a router knows of tasks: gates by task, and rows of a table by task id.

Gupta et al. 2022 (https://arxiv.org/abs/2204.07689) let a router see a task's code beside the token; they give
the task's code as a learned embedding or as an encoded description. The paper's sizes could not be checked:
the widths here are ours.

    TaskMatrix:    W_task h            (one gate a task, as MMoE, https://dl.acm.org/doi/10.1145/3219819.3220007)
    TaskEmbedding: W [h; e_task]
    Descriptions:  W [h; U d_task]     with d the embedded text, which a task never trained on has too

A task never seen (id -1) has the mean of the tasks' gates, embeddings or codes. Leaves named task_... have a
row for every task; starting from a checkpoint with other tasks moves the rows by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models import layers
from mtjax.models.routers import descriptions
from mtjax.models.routers.gates import INIT, product
from mtjax.types import Array, Context


def check_num_tasks(router: Any, num_tasks: int) -> None:
    """Raise ValueError where a router or gate that has rows of tasks is told of none."""
    if num_tasks < 1:
        raise ValueError(
            f"{type(router).__name__} has a row for every task and needs their number: set MoeConfig.num_tasks, got {num_tasks}."
        )


def with_mean(table: Array, num_seen: int | None = None) -> Array:
    """Append to [T, ...] the mean of its first num_seen rows, which stands for a task never seen."""
    return jnp.concatenate([table, table[:num_seen].mean(0, keepdims=True)])


def task_rows(context: Context, num_tasks: int, shape: tuple[int, ...]) -> Array:
    """Return each token's row of a table with_mean, int32 of `shape`: T where its task was never seen."""
    if context.task_ids is None:
        return jnp.full(shape, num_tasks, jnp.int32)
    ids = jnp.broadcast_to(context.task_ids, shape)
    return jnp.where((ids >= 0) & (ids < num_tasks), ids, num_tasks)


@dataclasses.dataclass(frozen=True)
class TaskMatrix:
    """Score experts by a gate of the task's own. All T gates are computed for every token."""

    def make(self, emb_dim: int, num_outputs: int, *, num_tasks: int, key: Array) -> TaskMatrixGate:
        """Make the gate's module."""
        check_num_tasks(self, num_tasks)
        return TaskMatrixGate(emb_dim, num_outputs, num_tasks=num_tasks, key=key)


class TaskMatrixGate(nnx.Module):
    """The module of TaskMatrix."""

    def __init__(self, emb_dim: int, num_outputs: int, *, num_tasks: int, key: Array) -> None:
        self.task_kernel = nnx.Param(INIT(key, (num_tasks, emb_dim, num_outputs), jnp.float32))

    def __call__(self, x_GND: Array, context: Context) -> Array:
        """Return logits [G, N, num_outputs]."""
        kernel_TDE = self.task_kernel[...]
        rows_GN = task_rows(context, kernel_TDE.shape[0], x_GND.shape[:2])
        logits_GNTE = jnp.einsum("gnd,tde->gnte", x_GND, kernel_TDE, precision=jax.lax.Precision.HIGHEST)
        logits_GNTE = jnp.concatenate([logits_GNTE, logits_GNTE.mean(2, keepdims=True)], 2)
        return jnp.take_along_axis(logits_GNTE, rows_GN[..., None, None], axis=2)[..., 0, :]


@dataclasses.dataclass(frozen=True)
class TaskEmbedding:
    """Score experts by the token and a learned embedding of its task."""

    width: int = 64

    def make(self, emb_dim: int, num_outputs: int, *, num_tasks: int, key: Array) -> TaskEmbeddingGate:
        """Make the gate's module."""
        check_num_tasks(self, num_tasks)
        return TaskEmbeddingGate(emb_dim, num_outputs, num_tasks=num_tasks, width=self.width, key=key)


class TaskEmbeddingGate(nnx.Module):
    """The module of TaskEmbedding; W's columns for h and for e are `w` and `w_code`."""

    def __init__(self, emb_dim: int, num_outputs: int, *, num_tasks: int, width: int, key: Array) -> None:
        token_key, code_key, task_key = jax.random.split(key, 3)
        self.w = layers.Linear(INIT(token_key, (emb_dim, num_outputs), jnp.float32))
        self.w_code = layers.Linear(INIT(code_key, (width, num_outputs), jnp.float32))
        self.task_embedding = nnx.Param(jax.random.normal(task_key, (num_tasks, width), jnp.float32))

    def __call__(self, x_GND: Array, context: Context) -> Array:
        """Return logits [G, N, num_outputs]."""
        codes_TC = with_mean(self.task_embedding[...])
        rows_GN = task_rows(context, codes_TC.shape[0] - 1, x_GND.shape[:2])
        return product(x_GND, self.w) + product(codes_TC, self.w_code)[rows_GN]


@dataclasses.dataclass(frozen=True)
class Descriptions:
    """Score experts by the token and what its task's description says.

    `texts` maps a task's name to its description: first the run's tasks in the order of their ids, then any
    number of tasks to come, whose ids go on from there. Nothing else is kept of a task, so texts appended
    later, at inference too, route at once.
    """

    texts: Mapping[str, str] | tuple[tuple[str, str], ...]
    width: int = 64
    features: int = 512  # of a description's hashed words and letters

    def __post_init__(self) -> None:
        pairs = tuple(self.texts.items() if isinstance(self.texts, Mapping) else map(tuple, self.texts))
        if not pairs or any(not text.strip() for _, text in pairs):
            empty = [name for name, text in pairs if not text.strip()]
            raise ValueError(f"Descriptions.texts needs a text for every task; it has none for {empty[:5]}.")
        object.__setattr__(self, "texts", pairs)  # hashable

    @property
    def names(self) -> tuple[str, ...]:
        """Return the described tasks' names, in the order of their ids."""
        return tuple(name for name, _ in self.texts)

    def make(self, emb_dim: int, num_outputs: int, *, num_tasks: int, key: Array) -> DescriptionsGate:
        """Make the gate's module. Raises ValueError where a task has no description."""
        if num_tasks > len(self.texts):
            raise ValueError(
                f"Descriptions.texts describes {len(self.texts)} tasks, {list(self.names)[:10]}, of num_tasks={num_tasks}."
            )
        return DescriptionsGate(self, emb_dim, num_outputs, num_tasks=num_tasks, key=key)


class DescriptionsGate(nnx.Module):
    """The module of Descriptions; `code` is U."""

    def __init__(
        self, settings: Descriptions, emb_dim: int, num_outputs: int, *, num_tasks: int, key: Array
    ) -> None:
        token_key, code_key, text_key = jax.random.split(key, 3)
        self.w = layers.Linear(INIT(token_key, (emb_dim, num_outputs), jnp.float32))
        self.w_code = layers.Linear(INIT(code_key, (settings.width, num_outputs), jnp.float32))
        self.code = layers.Linear(
            jax.random.normal(text_key, (settings.features, settings.width), jnp.float32)
        )
        self.settings = settings
        self.num_seen = num_tasks or len(settings.texts)

    def __call__(self, x_GND: Array, context: Context) -> Array:
        """Return logits [G, N, num_outputs]."""
        texts = tuple(text for _, text in self.settings.texts)
        embedded_TF = jnp.asarray(descriptions.embed(texts, self.settings.features))
        codes_TC = product(with_mean(embedded_TF, self.num_seen), self.code)
        rows_GN = task_rows(context, len(texts), x_GND.shape[:2])
        return product(x_GND, self.w) + product(codes_TC, self.w_code)[rows_GN]


def described_tasks(config: Any) -> tuple[str, ...]:
    """Return the tasks that a model's configuration describes, in the order of their ids; () where none is.

    Raises ValueError where its parts describe different ones.
    """
    if isinstance(config, Descriptions):
        return config.names
    if not dataclasses.is_dataclass(config):
        return ()
    parts = {described_tasks(getattr(config, field.name)) for field in dataclasses.fields(config)} - {()}
    if len(parts) > 1:
        raise ValueError(
            f"All Descriptions of a model need the same tasks in the same order; got {sorted(parts)}."
        )
    return parts.pop() if parts else ()


def check_descriptions(config: Any, tasks: Sequence[str]) -> None:
    """Raise ValueError where a model describes tasks, but not first these, in this order."""
    described, tasks = described_tasks(config), tuple(tasks)
    if not described or described[: len(tasks)] == tasks:
        return
    missing = [name for name in tasks if name not in described]
    what = f"lacks {missing[:10]}" if missing else f"has them as {list(described[: len(tasks)])}"
    raise ValueError(
        f"Descriptions.texts has to describe the run's tasks first and in their order, {list(tasks)}; it {what}."
    )
