"""T5X's parameters and Adafactor moments as ours, and back; see convert/t5x for the files.

Two networks: t5x.examples.t5, whose tree is ours, and t5x.examples.scalable_t5, with a table of relative biases
in every layer, heads as a dim of their own, and layers stacked on dim 1 where it scans them.

T5X's Adafactor (t5x/adafactor.py) factors a matrix as ours does. A kernel of more than two dims it always
factors, v_row keeping the embedding's dim (and the layers') and v_col the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mtjax import lazy, optim
from mtjax.convert.weights import SLOTS
from mtjax.lazy import Leaf
from mtjax.models import t5

_LAYERS = 1  # the dim of stacked layers
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")  # encoder/encoder/... has the layers stacked
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_ATTENTION = re.compile(
    r".*/(attention|self_attention|encoder_decoder_attention)/(query|key|value|out)/kernel"
)


def parameters(target: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return our unstacked leaves of T5X's."""
    return dict(pair for path, leaf in target.items() for pair in _apart(path, leaf))


def is_scanned(target: Mapping[str, Leaf]) -> bool:
    """Tell whether T5X stacked the layers."""
    return any(_SCANNED.fullmatch(path) for path in target)


def moments(states: Mapping[str, Leaf], target: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return PARAMETER/SLOT of ours from T5X's param_states; its placeholders [1] are left out."""
    found: dict[str, Leaf] = {}
    for name, leaf in states.items():
        path, _, slot = name.rpartition("/")
        if leaf.shape == (1,):
            continue
        if slot in ("v_row", "v_col"):
            pairs = _apart_moment(path, slot, leaf, target[path].shape)
        else:
            pairs = ((f"{ours}/{slot}", part) for ours, part in _apart(path, leaf))
        found |= dict(pairs)
    return found


def _apart(path: str, leaf: Leaf) -> Iterator[tuple[str, Leaf]]:
    """Yield our parameters of one of T5X's: layers apart, heads joined to their width."""
    for ours, part in _layers_apart(path, leaf, _LAYERS):
        found = _ATTENTION.fullmatch(ours)
        if found is None or part.ndim == 2:
            yield ours, part
            continue
        width = part.shape[-1] if found[2] == "out" else part.shape[0]
        shape = (part.size // width, width) if found[2] == "out" else (width, part.size // width)
        yield ours, lazy.after(lambda x, shape=shape: x.reshape(shape), part, shape=shape)


def _layers_apart(path: str, leaf: Leaf, dim: int) -> Iterator[tuple[str, Leaf]]:
    if (found := _SCANNED.fullmatch(path)) is None:
        yield path, leaf
        return
    stack, rest = found.groups()
    for i, part in enumerate(lazy.parts(leaf, dim)):
        yield f"{stack}/layers_{i}/{rest}", part


def _apart_moment(path: str, slot: str, leaf: Leaf, shape: Sequence[int]) -> Iterator[tuple[str, Leaf]]:
    """Yield our moments of one of T5X's that keeps some dims of a parameter."""
    kept = _kept(path, slot, len(shape))
    for ours, part in _layers_apart(path, leaf, kept.index(_LAYERS) if _LAYERS in kept else 0):
        name = slot
        if len(shape) > 2:
            wide = int(np.prod(shape)) // shape[_embedding_dim(path, len(shape))]
            wide //= shape[_LAYERS] if _SCANNED.fullmatch(path) else 1
            name = _other_name(path, slot, width=shape[_embedding_dim(path, len(shape))], others=wide)
        yield f"{ours}/{name}", lazy.after(np.ravel, part, shape=(part.size,))


def _embedding_dim(path: str, ndim: int) -> int:
    """Return the dim of a kernel that the residual stream has."""
    return ndim - 1 if path.endswith(("/out/kernel", "/wo/kernel")) else 0


def _kept(path: str, slot: str, ndim: int) -> list[int]:
    """Return the dims of a kernel of more than two dims that a factored moment keeps."""
    row = {_embedding_dim(path, ndim)}
    layers = {_LAYERS} if _SCANNED.fullmatch(path) else set()
    return sorted(row | layers) if slot == "v_row" else sorted(set(range(ndim)) - row | layers)


def _other_name(path: str, slot: str, *, width: int, others: int) -> str:
    """Return our name of a moment of T5X's, and T5X's of ours: rows are not the same dim everywhere."""
    embedding = _embedding_dim(path, 2)
    shape = (others, width) if embedding else (width, others)
    dims = optim.factored_dims(path, shape, min_dim_size=1)
    assert dims is not None
    is_same = dims[0] == embedding
    return slot if is_same else {"v_row": "v_col", "v_col": "v_row"}[slot]


# --- Back -------------------------------------------------------------------------------------------------


def t5x_parameters(config: t5.T5Config, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return T5X's leaves of ours: of t5x.examples.t5, or of scalable_t5 where layers have their own bias."""
    if not config.relative_bias_per_layer:
        return dict(leaves)
    apart = {path: _heads_apart(config, path, leaf) for path, leaf in leaves.items()}
    return _stacked(apart, {path: _LAYERS for path in apart}) if config.scan_layers else apart


def t5x_moments(
    config: t5.T5Config, optimizer: Mapping[str, Leaf], leaves: Mapping[str, Leaf]
) -> dict[str, Leaf]:
    """Return T5X's param_states, with placeholders [1] for the moments that a parameter does not have.

    Raises ValueError where T5X would factor a kernel that is not factored here.
    """
    states: dict[str, Leaf] = {}
    dims: dict[str, int] = {}
    for name, leaf in optimizer.items():
        path, _, slot = name.rpartition("/")
        if slot in ("v_row", "v_col"):
            named, leaf, dim = _t5x_moment(config, path, slot, leaf, leaves[path].shape)
        elif slot == "v" and _is_always_factored(config, path):
            raise ValueError(
                f"T5X factors the second moment of {path} {leaf.shape}, which is not factored here: train with a "
                "smaller min_dim_size_to_factor, or convert with --no_optimizer."
            )
        elif config.relative_bias_per_layer:
            named, leaf, dim = name, _heads_apart(config, path, leaf), _LAYERS
        else:
            named, dim = name, _LAYERS
        states[named], dims[named] = leaf, dim
    if config.relative_bias_per_layer and config.scan_layers:
        states = _stacked(states, dims)
    parameters = {name.rpartition("/")[0] for name in states}
    empty = np.zeros(1, np.float32)
    return {f"{p}/{slot}": states.get(f"{p}/{slot}", empty) for p in sorted(parameters) for slot in SLOTS}


def _is_always_factored(config: t5.T5Config, path: str) -> bool:
    """Tell whether T5X keeps the kernel in more than two dims."""
    if not config.relative_bias_per_layer:
        return False
    is_stacked = config.scan_layers and _LAYER.fullmatch(path) and path.endswith("/kernel")
    return bool(is_stacked or _ATTENTION.fullmatch(path))


def _t5x_moment(
    config: t5.T5Config, path: str, slot: str, leaf: Leaf, shape: Sequence[int]
) -> tuple[str, Leaf, int]:
    """Return a factored moment's name, itself with heads apart, and the dim that layers are stacked on."""
    if not _is_always_factored(config, path):
        return f"{path}/{slot}", leaf, 0
    embedding = _embedding_dim(path, 2)
    name = _other_name(path, slot, width=shape[embedding], others=shape[1 - embedding])
    has_heads = _ATTENTION.fullmatch(path) is not None
    theirs = re.sub(_LAYER, r"\1/\1/\3", path) if config.scan_layers else path
    kept = _kept(theirs, name, 2 + has_heads + config.scan_layers)
    if name == "v_col" and has_heads:
        heads = (config.num_heads, config.head_dim)
        leaf = lazy.after(lambda x: x.reshape(heads), leaf, shape=heads)
    return f"{path}/{name}", leaf, kept.index(_LAYERS) if config.scan_layers else 0


def _heads_apart(config: t5.T5Config, path: str, leaf: Leaf) -> Leaf:
    """Give heads a dim of their own."""
    found = _ATTENTION.fullmatch(path)
    if found is None:
        return leaf
    heads = (config.num_heads, config.head_dim)
    shape = (*heads, leaf.shape[1]) if found[2] == "out" else (leaf.shape[0], *heads)
    return lazy.after(lambda x: x.reshape(shape), leaf, shape=shape)


def _stacked(leaves: Mapping[str, Leaf], dims: Mapping[str, int]) -> dict[str, Leaf]:
    """Stack the layers of T5X's unscanned leaves, each on its dim."""
    stacks: dict[str, list[tuple[int, str]]] = {}
    for path in leaves:
        if found := _LAYER.fullmatch(path):
            stack, i, rest = found.groups()
            stacks.setdefault(f"{stack}/{stack}/{rest}", []).append((int(i), path))
        else:
            stacks[path] = [(-1, path)]
    done: dict[str, Leaf] = {}
    for name, members in stacks.items():
        paths = [path for _, path in sorted(members)]
        if members[0][0] < 0:
            done[name] = leaves[name]
            continue
        stacked, dim = lazy.stack([leaves[path] for path in paths]), dims[paths[0]]
        size, *shape = stacked.shape
        shape.insert(dim, size)
        done[name] = lazy.after(lambda x, dim=dim: np.moveaxis(x, 0, dim), stacked, shape=shape)
    return done
