"""What every conversion passes on: a T5's configuration, its parameters by path, and where they came from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from mtjax import lazy, tree
from mtjax.data.vocabulary import Vocabulary
from mtjax.lazy import LazyArray, Leaf
from mtjax.models import functional, t5

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

SLOTS = ("v_row", "v_col", "v", "m")  # Adafactor's moments, as optim.AdafactorState names them


class Weights(NamedTuple):
    """A model outside of any run; layers are unstacked (layers_0, layers_1, ...), kernels [in, out].

    No array is in memory before it is asked for. `optimizer` holds Adafactor's moments, PARAMETER/v and so on
    by optim.AdafactorState's names, where the source has them. `decoding`: fields of predict.DecodeConfig that
    the original searches beams with.
    """

    config: t5.T5Config
    leaves: Mapping[str, Leaf]  # by path
    origin: Mapping[str, Any]  # JSON: the format, the folder's name, its own configuration
    vocabulary: Vocabulary | None = None
    step: int = 0
    optimizer: Mapping[str, Leaf] = {}
    decoding: Mapping[str, Any] = {}


def checked(weights: Weights, *, source: str) -> Weights:
    """Return weights whose leaves are those of the configuration's model.

    Raises ValueError listing, a line each, what is missing, surplus or misshapen; `source` names the files.
    """
    lines = tree.difference(tree.unflatten(expected_shapes(weights.config)), tree.unflatten(weights.leaves))
    if lines:
        shown = "\n  ".join(lines[:20]) + (f"\n  ... {len(lines) - 20} more" if len(lines) > 20 else "")
        raise ValueError(f"The tensors of {source} do not fit its configuration:\n  {shown}")
    return weights


def expected_shapes(config: t5.T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {path: shape} of the unstacked model's parameters; allocates nothing."""
    unscanned = dataclasses.replace(config, scan_layers=False)
    return tree.flatten(jax.eval_shape(t5.t5(unscanned).init, jax.random.key(0)))


def check_plain_decoder(config: t5.T5Config, theirs: str) -> None:
    """Raise ValueError where `theirs` would lose decoders or heads."""
    if config.num_decoders > 1 or config.num_predicted_tokens > 1:
        raise ValueError(
            f"{theirs} has one decoder that predicts one token; this one has {config.num_decoders} decoders that "
            f"predict {config.num_predicted_tokens} (decoder_of_task, num_predicted_tokens)."
        )


def cast(weights: Weights, dtype: str) -> Weights:
    """Round every parameter to 'float32' or 'bfloat16'; an optimizer's state keeps its precision."""
    if dtype not in DTYPES:
        raise tree.unknown_name("dtype", dtype, list(DTYPES))
    to = DTYPES[dtype]
    leaves = {
        path: lazy.after(lambda x: x.astype(to), leaf, dtype=to) for path, leaf in weights.leaves.items()
    }
    return weights._replace(leaves=leaves)


def pad_vocabulary(weights: Weights, multiple: int) -> Weights:
    """Grow the embedding (and untied logits) to a multiple of rows.

    New rows are copies of the padding's (id 0), which is never a target: training has made it unlikely. An
    optimizer's state is left behind.
    """
    if multiple < 1:
        raise ValueError(f"pad_vocabulary={multiple} must be at least 1.")
    extra = -weights.config.vocab_size % multiple
    if not extra:
        return weights
    leaves = dict(weights.leaves)
    for path, leaf in weights.leaves.items():
        if path.endswith(("token_embedder/embedding", "logits_dense/kernel")):
            leaves[path] = _padded(leaf, 0 if path.endswith("embedding") else 1, extra)
    config = dataclasses.replace(weights.config, vocab_size=weights.config.vocab_size + extra)
    return weights._replace(config=config, leaves=leaves, optimizer={})


def _padded(leaf: Leaf, dim: int, extra: int) -> LazyArray:
    """Repeat the first slice of a dim `extra` times at its end."""
    shape = [size + extra * (i == dim) for i, size in enumerate(leaf.shape)]
    return lazy.after(
        lambda x: np.concatenate([x, np.repeat(x.take([0], dim), extra, dim)], dim), leaf, shape=shape
    )


def group_heads(weights: Weights, kv_heads: int) -> Weights:
    """Give groups of the decoder's heads one key and value: the mean of theirs (Ainslie et al. 2023, 2.1).

    An optimizer's state is left behind. Raises ValueError where kv_heads does not divide the heads that have
    their own now.
    """
    config = weights.config
    heads = config.decoder_kv_heads or config.num_heads
    if kv_heads < 1 or heads % kv_heads:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(f"kv_heads={kv_heads} does not divide {heads} heads; use one of {divisors}.")

    def mean_of_groups(kernel: np.ndarray) -> np.ndarray:
        heads_first = kernel.astype(np.float32).reshape(
            len(kernel), kv_heads, heads // kv_heads, config.head_dim
        )
        return heads_first.mean(2).reshape(len(kernel), -1).astype(kernel.dtype)

    leaves = dict(weights.leaves)
    for path, leaf in weights.leaves.items():
        if not path.startswith("encoder/") and path.endswith(
            ("attention/key/kernel", "attention/value/kernel")
        ):
            shape = (leaf.shape[0], kv_heads * config.head_dim)
            leaves[path] = lazy.after(mean_of_groups, leaf, shape=shape)
    config = dataclasses.replace(config, decoder_kv_heads=kv_heads)
    return weights._replace(config=config, leaves=leaves, optimizer={})


def average(several: Sequence[Weights]) -> Weights:
    """Return the mean of checkpoints of one model, summed in float32; the rest is the last one's.

    An optimizer's state is left behind. Raises ValueError where their configurations differ.
    """
    last = several[-1]
    if any(weights.config != last.config for weights in several):
        raise ValueError("Only checkpoints of one model can be averaged; their configurations differ.")

    def mean(path: str, leaf: Leaf) -> LazyArray:
        def read() -> np.ndarray:
            total = np.zeros(leaf.shape, np.float32)
            for weights in several:
                total += np.asarray(weights.leaves[path])
            total /= np.float32(len(several))
            return total.astype(leaf.dtype, copy=False)

        return lazy.LazyArray(leaf.shape, leaf.dtype, read)

    leaves = {path: mean(path, leaf) for path, leaf in last.leaves.items()}
    origin = {**last.origin, "averaged": [weights.step for weights in several]}
    return last._replace(leaves=leaves, origin=origin, optimizer={})


def stacked(config: t5.T5Config, leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """Return leaves as the configuration's model nests them: layers stacked where it scans them."""
    nested = tree.unflatten(leaves)
    return functional.stack_layers(nested, stack=lazy.stack) if config.scan_layers else nested


def unstacked(config: t5.T5Config, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return leaves with the layers of a scanned model apart: the inverse of `stacked`."""
    if not config.scan_layers:
        return dict(leaves)
    found: dict[str, Leaf] = {}
    for path, leaf in leaves.items():
        if not tree.num_layer_dims(path):
            found[path] = leaf
            continue
        stack, _, rest = path.partition(f"/{tree.STACK}/")
        first, step = 0, 1
        if block := re.fullmatch(rf"{functional.BLOCK}_(\d+)/(.*)", rest):
            assert config.moe is not None
            first, step, rest = int(block[1]), config.moe.every, block[2]
        for i, part in enumerate(lazy.parts(leaf, 0)):
            found[f"{stack}/{tree.STACK}_{first + i * step}/{rest}"] = part
    return found
