"""Task-level routing: one choice for each task and layer (Ye, Zha & Ren 2022, https://arxiv.org/abs/2205.12701).

    logits = W_2 gelu(W_1 e_task);  w = softmax(logits / tau)
    output = sum_e w_e expert_e(h), with Gumbel noise on the logits while training, or the one-hot of its
    largest weight with the softmax's gradient (straight-through)

The paper routes between whole layers; here the experts are feed-forward blocks. Its temperature falls during
training; a router does not know the step, so tau is fixed for a run.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import tree
from mtjax.models.layers import Linear, fan_in_truncated
from mtjax.models.routers.choice import Routing, TokenChoice, several
from mtjax.models.routers.gates import product
from mtjax.models.routers.tasks import check_num_tasks, task_rows, with_mean
from mtjax.types import Array, Context

SELECTIONS = ("softmax", "gumbel", "straight_through")
NOISE_SITE = 32  # of the layer's key


@dataclasses.dataclass(frozen=True)
class TaskLevel:
    """Route by the task alone.

    `softmax` mixes all experts, always. `gumbel` mixes them while training, `straight_through` draws one (all
    are computed, for the gradient); without dropout's key both take the likeliest expert alone.
    """

    selection: str = "straight_through"
    temperature: float = 1.0
    width: int = 768  # of a task's embedding
    hidden: int = 64

    can_decode: ClassVar[bool] = True
    can_pack: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise tree.unknown_name("selection of TaskLevel", self.selection, SELECTIONS)
        if self.temperature <= 0:
            raise ValueError(f"TaskLevel.temperature must be above 0, got {self.temperature}.")

    def make(self, emb_dim: int, num_experts: int, *, num_tasks: int = 0, key: Array) -> TaskLevelRouter:
        """Make the router's module; activations do not matter to it."""
        del emb_dim
        check_num_tasks(self, num_tasks)
        return TaskLevelRouter(self, num_experts, num_tasks=num_tasks, key=key)


class TaskLevelRouter(nnx.Module):
    """The module of TaskLevel."""

    def __init__(self, settings: TaskLevel, num_experts: int, *, num_tasks: int, key: Array) -> None:
        task_key, in_key, out_key = jax.random.split(key, 3)
        self.task_embedding = nnx.Param(jax.random.normal(task_key, (num_tasks, settings.width), jnp.float32))
        self.w_in = Linear(fan_in_truncated(in_key, (settings.width, settings.hidden)))
        self.w_out = Linear(fan_in_truncated(out_key, (settings.hidden, num_experts)))
        self.settings = settings

    def __call__(self, x_GND: Array, mask_GN: Array, context: Context) -> Routing:
        """Route tokens; see the package for shapes."""
        codes_TC = with_mean(self.task_embedding[...])
        logits_TE = product(jax.nn.gelu(product(codes_TC, self.w_in)), self.w_out)
        rows_GN = task_rows(context, codes_TC.shape[0] - 1, x_GND.shape[:2])
        probs_GNE = jax.nn.softmax(logits_TE / self.settings.temperature)[rows_GN]
        taken_GNE = jnp.broadcast_to(mask_GN[..., None], probs_GNE.shape)
        if self.settings.selection == "softmax":
            return several(probs_GNE, taken_GNE, probs_GNE), {}
        if not context.train or context.key is None:
            best_GN1 = jnp.where(mask_GN, jnp.argmax(logits_TE, -1)[rows_GN], logits_TE.shape[-1])[..., None]
            weights_GN1 = mask_GN[..., None].astype(jnp.float32)
            return TokenChoice(best_GN1.astype(jnp.int32), weights_GN1, None, probs_GNE), {}
        return several(self._drawn(logits_TE, context)[rows_GN], taken_GNE, probs_GNE), {}

    def _drawn(self, logits_TE: Array, context: Context) -> Array:
        """Draw every task's weights for this step: all its tokens share them."""
        assert context.key is not None
        noise_TE = jax.random.gumbel(jax.random.fold_in(context.key, NOISE_SITE), logits_TE.shape)
        soft_TE = jax.nn.softmax((logits_TE + noise_TE) / self.settings.temperature)
        if self.settings.selection == "gumbel":
            return soft_TE
        hard_TE = jax.nn.one_hot(soft_TE.argmax(-1), soft_TE.shape[-1])
        return hard_TE + soft_TE - jax.lax.stop_gradient(soft_TE)
