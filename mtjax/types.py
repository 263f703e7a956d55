"""The central types: what flows from a batch to a gradient.

Shape legend, used as suffixes of array names: B rows, L target length, S source length, D model width,
H heads, K width per head, F feed-forward width, V vocabulary, T tasks, G groups of tasks, E experts,
C capacity, N flat tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

PyTree = Any
Array = jax.Array
Params = PyTree
"""Plain nested dict of arrays; a leaf is named by its path, e.g. encoder/layers/attention/query/kernel."""

Batch = Mapping[str, Array]
"""SeqIO's feature names: encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
decoder_loss_weights, {encoder,decoder}_segment_ids, {encoder,decoder}_positions, and per token
{encoder,decoder}_task_ids (int32, -1 for padding and for a task never seen)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer gets beside its activations."""

    task_ids: Array | None = None  # [B, L] int32, -1 = a task never seen
    segment_ids: Array | None = None  # [B, L] int32, 0 = padding
    positions: Array | None = None  # [B, L] int32, counted from the start of each segment
    key: Array | None = None
    tokens: Array | None = None  # [B, L] int32, the ids that are fed in
    mask: Array | None = None  # [B, L] bool, False at padding; None: no padding
    num_tokens: Array | None = None  # float32 scalar, see Whole; None: those of `mask`
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    num_tasks: int = dataclasses.field(default=0, metadata={"static": True})  # 0: not told apart


class Whole(NamedTuple):
    """What a batch, perhaps a microbatch, is part of: the global batch, and the run."""

    num_tokens: dict[
        str, Array
    ]  # float32 scalars: of 'encoder' and 'decoder', non-padding; of 'targets', weighted
    num_tasks: int  # of the run


class Aux(NamedTuple):
    """What layers say beside their activations, summed over layers."""

    losses: dict[str, Array]  # by name, float32 scalars that are added to the loss
    stats: dict[str, Array]  # sums by name, logged and never differentiated


class Features(NamedTuple):
    """The last hidden states, before the output projection, and what Aux holds.

    Auxiliary losses and statistics add up over the microbatches of a batch.
    """

    hidden_BLD: Array
    aux: dict[str, Array]
    stats: dict[str, Array]


class Output(NamedTuple):
    """Logits and auxiliary losses by name; auxiliary losses are returned, never kept on a module."""

    logits_BLV: Array
    aux: dict[str, Array]


class Model(NamedTuple):
    """A model as pure functions of its parameters.

    `features` and `logits` compose to `apply`. Decoding: `encode` once, `start` a cache, `decode` token by
    token; `reorder` picks rows of a cache (beam search).
    """

    config: Any
    init: Callable[[Array], Params]
    features: Callable[
        ..., Features
    ]  # (params, batch, *, key=None, whole=None); dropout only where a key is given
    logits: Callable[[Params, Array], Array]  # (params, hidden_BLD) -> float32 logits_BLV
    apply: Callable[..., Output]  # (params, batch, *, key=None)
    encode: Callable[[Params, Batch], PyTree]
    start: Callable[
        ..., PyTree
    ]  # (params, encoding, *, max_length, num_beams=1) -> cache of B*num_beams rows
    decode: Callable[
        [Params, PyTree, Array], tuple[Array, PyTree]
    ]  # (params, cache, tokens_B) -> logits_BV, cache
    reorder: Callable[[PyTree, Array], PyTree]  # (cache, rows_B) -> cache
    flops: Callable[..., float]  # (rows, *, lengths) -> operations of a training step, analytic


class At(NamedTuple):
    """The current parameters and batch, as a balancer sees them.

    pullback(w_G, aux=0.0) is the gradient of w_G @ losses_G + aux * aux_loss at the current parameters;
    moved(delta) is (losses_G, pullback) at params + delta, on the same batch. A balancer whose `weights` are
    known beforehand calls pullback once, with these weights and aux=1: the trainer may have computed it.
    """

    pullback: Callable[..., PyTree]
    moved: Callable[[PyTree], tuple[Array, Callable[..., PyTree]]]


class Balancer(NamedTuple):
    """Weigh the losses of G groups of tasks, or combine their gradients.

    losses_G are sums over a group's target tokens divided by the whole batch's token count; counts_G are
    target tokens per group. `weights` returns None where the weights need this step's losses.
    """

    init: Callable[[Array, int, Params], PyTree]  # (key, num_groups, params) -> state
    weights: Callable[[PyTree, Array], Array | None]  # (state, counts_G) -> w_G
    update: Callable[[PyTree, Array, Array, At], tuple[PyTree, PyTree, dict[str, Array]]]


class Peft(NamedTuple):
    """Choose what trains. Full fine-tuning splits into ({}, params)."""

    split: Callable[[Array, Params], tuple[Params, Params]]  # (key, params) -> (frozen, trainable)
    merge: Callable[[Params, Params], Params]  # (frozen, trainable) -> params


class Rates(NamedTuple):
    """Mixture rates of T tasks, numpy on the host.

    `init` gets the number of training examples per task (float64 [T]) and the task names; `rates` returns
    float64 [T], non-negative, not necessarily normalised; `observe` sees a log line of finished steps, "step"
    included. All are pure: a state holds everything, the method's own settings too. `watched` names the
    metrics that `observe` waits for; none where the rates do not depend on any.
    """

    init: Callable[..., PyTree]  # (sizes_T, names) -> state, a JSON-serialisable tree
    rates: Callable[[PyTree, int], Any]  # (state, step) -> rates_T
    observe: Callable[[PyTree, Mapping[str, Any]], PyTree]
    watched: Callable[[PyTree], Sequence[str]] = lambda state: ()


Merger = Callable[[Params, Sequence[Params]], Params]
