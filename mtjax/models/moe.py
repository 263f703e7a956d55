"""Sparse feed-forward blocks: a router, experts, and perhaps a dense block beside them.

Switch Transformer (Fedus et al. 2021, https://arxiv.org/abs/2101.03961), GShard (Lepikhin et al. 2020,
https://arxiv.org/abs/2006.16668), ST-MoE (Zoph et al. 2022, https://arxiv.org/abs/2202.08906).

    y = x's experts' outputs, weighted:  sum over k of w_k expert_k(x)

Routing, and with it capacity, priority and auxiliary losses, is by group: a fixed number of rows, however the
batch is cut into microbatches or over devices. Auxiliary losses are means over the tokens of the global batch
and, as in T5X, over the sparse layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax import tree
from mtjax.models import dispatch
from mtjax.models.layers import MlpBlock, projection_names
from mtjax.models.routers import ExpertChoice, Slots, TokenChoice
from mtjax.types import Array, Aux, Context

DISPATCHES = ("dropless", "capacity")
DROPOUT_SITE = 40  # of the layer's key


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Where a stack is sparse, its experts and routers, and how tokens reach experts.

    The last one of every `every` blocks is sparse. A router is one of models.routers; None keeps that side
    dense. 'dropless' serves every choice; 'capacity' serves ceil(factor * tokens * K / num_experts) choices
    of a routing group an expert, and the other choices add nothing to the residual. A group is group_rows
    rows in training, one row in evaluation (where padding adds no slots), one position that is decoded, so decoding drops nothing. Expert choice and soft routing have
    capacities of their own.
    """

    num_experts: int
    every: int
    encoder_router: Any
    decoder_router: Any
    dispatch: str = "dropless"
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    group_rows: int = 1
    mlp_dim: int | None = None  # of an expert; None: the model's
    expert_dropout_rate: float | None = None  # of experts' hidden activations; None: the model's dropout rate
    extra_mlp: bool = False  # a dense block beside the experts
    init_scale: float = 1.0  # variance of experts' kernels times fan-in; Switch and ST-MoE: 0.1
    num_tasks: int = 0  # of the run, for routers that know tasks

    def __post_init__(self) -> None:
        for name in ("num_experts", "every", "group_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"MoeConfig.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("train_capacity_factor", "eval_capacity_factor", "init_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MoeConfig.{name} must be above 0, got {getattr(self, name)}.")
        if self.dispatch not in DISPATCHES:
            raise tree.unknown_name("MoeConfig.dispatch", self.dispatch, DISPATCHES)
        if self.encoder_router is None and self.decoder_router is None:
            raise ValueError("MoeConfig has no router, so no block is sparse; leave `moe` None instead.")
        rate = self.expert_dropout_rate
        if rate is not None and not 0.0 <= rate < 1.0:
            raise ValueError(f"MoeConfig.expert_dropout_rate must be in [0, 1), got {rate}.")

    def check_layers(self, side: str, num_layers: int) -> None:
        """Raise ValueError where `every` does not divide a side's layers."""
        if self.router(side) is not None and num_layers % self.every:
            divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise ValueError(
                f"MoeConfig.every={self.every} does not divide the {num_layers} layers of the {side}; use one "
                f"of {divisors}."
            )

    def router(self, side: str) -> Any:
        """Return the router of 'encoder' or 'decoder', or None."""
        return self.encoder_router if side == "encoder" else self.decoder_router

    def num_sparse(self, side: str, num_layers: int) -> int:
        """Count the sparse layers among a side's."""
        return 0 if self.router(side) is None else num_layers // self.every


def choices_per_token(moe: MoeConfig, side: str, *, emb_dim: int, num_tokens: int) -> float:
    """Return how many experts compute a token of a group of num_tokens, on average over the group."""

    def route(key: Array) -> Any:
        router = moe.router(side).make(emb_dim, moe.num_experts, num_tasks=moe.num_tasks, key=key)
        ids_GN = jnp.zeros((1, num_tokens), jnp.int32)
        context = Context(task_ids=ids_GN, tokens=ids_GN)
        return router(jnp.zeros((1, num_tokens, emb_dim)), ids_GN == 0, context)[0]

    choice = jax.eval_shape(route, jax.random.key(0))
    if isinstance(choice, TokenChoice):
        return choice.experts_GNK.shape[-1]
    slots = (
        choice.tokens_GEC.shape[1:] if isinstance(choice, ExpertChoice) else choice.dispatch_GNEC.shape[2:]
    )
    return math.prod(slots) / num_tokens


class Kernel(nnx.Module):
    """One matrix an expert [E, in, out], in float32."""

    def __init__(self, shape: tuple[int, int, int], *, scale: float, key: Array) -> None:
        # Fan-in is an expert's own: as if each were a dense block.
        init = jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", batch_axis=(0,))
        self.kernel = nnx.Param(init(key, shape, jnp.float32))


class Experts(nnx.Module):
    """The kernels of E feed-forward blocks."""

    def __init__(
        self,
        num_experts: int,
        emb_dim: int,
        mlp_dim: int,
        activations: tuple[str, ...],
        *,
        scale: float,
        key: Array,
    ) -> None:
        self.names = projection_names(activations)
        *wi_keys, wo_key = jax.random.split(key, len(activations) + 1)
        for name, wi_key in zip(self.names, wi_keys, strict=True):
            setattr(self, name, Kernel((num_experts, emb_dim, mlp_dim), scale=scale, key=wi_key))
        self.wo = Kernel((num_experts, mlp_dim, emb_dim), scale=scale, key=wo_key)

    def kernels(self, dtype: Any) -> dispatch.Kernels:
        """Return the kernels in a dtype."""
        wi = tuple(getattr(self, name).kernel[...].astype(dtype) for name in self.names)
        return dispatch.Kernels(wi, self.wo.kernel[...].astype(dtype))


class SparseMlp(nnx.Module):
    """A feed-forward block of experts; takes the place of layers.MlpBlock."""

    def __init__(
        self,
        moe: MoeConfig,
        side: str,
        *,
        emb_dim: int,
        mlp_dim: int,
        activations: tuple[str, ...],
        dropout_rate: float,
        num_sparse_layers: int,
        key: Array,
    ) -> None:
        router_key, expert_key, extra_key = jax.random.split(key, 3)
        self.router = moe.router(side).make(emb_dim, moe.num_experts, num_tasks=moe.num_tasks, key=router_key)
        self.expert = Experts(
            moe.num_experts,
            emb_dim,
            moe.mlp_dim or mlp_dim,
            activations,
            scale=moe.init_scale,
            key=expert_key,
        )
        if moe.extra_mlp:
            self.extra = MlpBlock(emb_dim, mlp_dim, activations, dropout_rate=dropout_rate, key=extra_key)
        self.moe, self.side, self.activations = moe, side, activations
        self.dropout_rate = dropout_rate if moe.expert_dropout_rate is None else moe.expert_dropout_rate
        self.num_sparse_layers = num_sparse_layers

    def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, Aux]:
        """Return the block's output, its auxiliary losses and its statistics."""
        x_GND, mask_GN, by_group = self._groups(x_BLD, context)
        choice, losses = self.router(x_GND, mask_GN, by_group)
        y_BLD, chosen_GNE, served_GN = self._dispatch(x_BLD, x_GND, choice, context)
        if self.moe.extra_mlp:
            y_BLD = y_BLD + self.extra(x_BLD, context)[0]
        aux = Aux(
            self._losses(losses, mask_GN, context),
            jax.tree.map(
                jax.lax.stop_gradient,
                self._stats(choice.probs_GNE, chosen_GNE, served_GN & mask_GN, mask_GN, by_group),
            ),
        )
        return y_BLD, aux

    def _groups(self, x_BLD: Array, context: Context) -> tuple[Array, Array, Context]:
        """Cut rows, mask and context into routing groups [G, N]."""
        B, L, D = x_BLD.shape
        rows = self.moe.group_rows if context.train else 1  # predictions do not depend on neighbours
        if B % rows:
            raise ValueError(
                f"{B} rows cannot be cut into routing groups of MoeConfig.group_rows={rows} rows."
            )
        if self.moe.num_tasks and context.num_tasks not in (0, self.moe.num_tasks):
            raise ValueError(
                f"MoeConfig.num_tasks is {self.moe.num_tasks}, but the run has {context.num_tasks} tasks."
            )
        shape = (B // rows, rows * L)
        mask_BL = jnp.ones((B, L), bool) if context.mask is None else context.mask
        by_group = dataclasses.replace(
            context,
            **{
                name: None if (ids_BL := getattr(context, name)) is None else ids_BL.reshape(shape)
                for name in ("task_ids", "segment_ids", "positions", "tokens", "mask")
            },
        )
        return x_BLD.reshape(*shape, D), mask_BL.reshape(shape), by_group

    def _dispatch(
        self, x_BLD: Array, x_GND: Array, choice: Any, context: Context
    ) -> tuple[Array, Array, Array]:
        """Return the experts' output, what was chosen [G, N, E], and which tokens [G, N] any expert took."""
        E, kernels = self.moe.num_experts, self.expert.kernels(x_BLD.dtype)
        drops = context.train and context.key is not None and self.dropout_rate > 0.0
        key = jax.random.fold_in(context.key, DROPOUT_SITE) if drops and context.key is not None else None
        feed = dispatch.FeedForward(self.activations, self.dropout_rate, key)
        if isinstance(choice, Slots):
            y_GND = dispatch.by_mixtures(x_GND, choice.dispatch_GNEC, choice.combine_GNEC, kernels, feed)
            served_GN = jnp.ones(x_GND.shape[:2], bool)
            return y_GND.reshape(x_BLD.shape), choice.combine_GNEC.sum(-1), served_GN
        if isinstance(choice, ExpertChoice):
            y_GND = dispatch.by_slots(x_GND, choice.tokens_GEC, choice.weights_GEC, kernels, feed)
            chosen_GNE = _takers(choice, x_GND.shape[1])
            return y_GND.reshape(x_BLD.shape), chosen_GNE, chosen_GNE.any(-1)
        chosen_GNE = jax.nn.one_hot(choice.experts_GNK, E).sum(2)
        if self.moe.dispatch == "dropless":
            choice_BLK = (x.reshape(*x_BLD.shape[:2], -1) for x in (choice.experts_GNK, choice.weights_GNK))
            y_BLD = dispatch.dropless(x_BLD, tuple(choice_BLK), kernels, feed, num_experts=E)
            return y_BLD, chosen_GNE, (choice.experts_GNK < E).any(-1)
        slots, served_GNK = dispatch.slots_of(
            choice, self._capacity(choice, context), num_experts=E, limit_G=self._limit(choice, context)
        )
        y_GND = dispatch.by_slots(x_GND, slots.tokens_GEC, slots.weights_GEC, kernels, feed)
        return y_GND.reshape(x_BLD.shape), chosen_GNE, served_GNK.any(-1)

    def _capacity(self, choice: TokenChoice, context: Context) -> int:
        _, num_tokens, num_selected = choice.experts_GNK.shape
        return dispatch.capacity(
            self.moe.train_capacity_factor if context.train else self.moe.eval_capacity_factor,
            num_tokens=num_tokens,
            num_selected=num_selected,
            num_experts=self.moe.num_experts,
        )

    def _limit(self, choice: TokenChoice, context: Context) -> Array | None:
        """Return the slots [G] for the tokens that are no padding: what a row is padded to changes no prediction."""
        if context.train or context.mask is None:
            return None
        factor = self.moe.eval_capacity_factor * choice.experts_GNK.shape[-1] / self.moe.num_experts
        return jnp.maximum(jnp.ceil(factor * context.mask.sum(-1)), 1).astype(jnp.int32)

    def _losses(self, losses: dict[str, Array], mask_GN: Array, context: Context) -> dict[str, Array]:
        """Turn means over groups into shares of the mean over the global batch and the sparse layers."""
        tokens_G = mask_GN.sum(-1, dtype=jnp.float32)
        total = tokens_G.sum() if context.num_tokens is None else context.num_tokens
        share_G = tokens_G / jnp.maximum(total, 1.0) / self.num_sparse_layers
        return {name: (share_G * loss_G).sum() for name, loss_G in losses.items()}

    def _stats(
        self, probs_GNE: Array, chosen_GNE: Array, served_GN: Array, mask_GN: Array, context: Context
    ) -> dict[str, Array]:
        """Sum over tokens by task: [T + 1, ...], the last row for tokens of no task of the run."""
        num_tasks = context.num_tasks
        task_GN = jnp.full(mask_GN.shape, num_tasks)
        if context.task_ids is not None and num_tasks:
            task_GN = jnp.where(context.task_ids < 0, num_tasks, context.task_ids)
        member_GNT = (task_GN[..., None] == jnp.arange(num_tasks + 1)) & mask_GN[..., None]
        by_task = functools.partial(jnp.einsum, "gnt,gn->t", member_GNT.astype(jnp.float32))
        entropy_GN = -jax.scipy.special.xlogy(probs_GNE, probs_GNE).sum(-1)
        return {
            f"{self.side}/expert_load": jnp.einsum("gnt,gne->te", member_GNT.astype(jnp.float32), chosen_GNE),
            f"{self.side}/dropped": by_task((~served_GN).astype(jnp.float32)),
            f"{self.side}/entropy": by_task(entropy_GN),
            f"{self.side}/tokens": by_task(mask_GN.astype(jnp.float32)),
        }


def _takers(choice: ExpertChoice, num_tokens: int) -> Array:
    """Return [G, N, E], 1 where an expert took a token."""

    def one(tokens_EC: Array, weights_EC: Array) -> Array:
        zeros_EN = jnp.zeros((tokens_EC.shape[0], num_tokens))
        expert_E1 = jnp.arange(tokens_EC.shape[0])[:, None]
        return zeros_EN.at[expert_E1, tokens_EC].max((weights_EC > 0).astype(jnp.float32)).T

    return jax.vmap(one)(choice.tokens_GEC, choice.weights_GEC)
