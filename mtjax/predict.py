"""Run a model over many examples: batches of few fixed shapes, then decode, score or rank.

Examples are sorted by length and cut into batches, so that a batch is hardly longer than its examples; its
lengths are rounded up to one of a few buckets, so that little is compiled. Results come back in the order
given, and do not depend on the batch size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtjax import decode, losses, sharding, tree
from mtjax.data import online, packing
from mtjax.types import Array, Batch, Model, Params

MODES = ("greedy", "beam", "sample", "rank")
NORMALISERS = {"t5x": decode.t5x_length, "huggingface": decode.huggingface_length}
STOPPINGS: dict[str, Callable[[float], decode.Stopping]] = {
    "t5x": lambda alpha: decode.t5x_stopping(),
    "huggingface": lambda alpha: decode.huggingface_stopping(False),
    "huggingface_early": lambda alpha: decode.huggingface_stopping(True),
    "huggingface_never": lambda alpha: decode.huggingface_stopping("never", alpha=alpha),
}


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How predictions are made.

    greedy; beam, with log-probabilities over a length normaliser ('t5x': ((5 + n) / 6)^alpha, 'huggingface':
    n^alpha) and a stopping rule of STOPPINGS; sample, at a temperature among the top_k tokens or the nucleus
    top_p (0 = all); rank: the likeliest of an example's options, by the log-probability of
    its tokens, divided by their number where length_normalized.
    max_length counts target tokens, EOS included; None = the target length of the task.
    """

    mode: str = "greedy"
    max_length: int | None = None
    num_beams: int = 4
    alpha: float = 0.6
    normaliser: str = "t5x"
    stopping: str = "t5x"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    length_normalized: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise tree.unknown_name("decode mode", self.mode, MODES)
        if self.normaliser not in NORMALISERS:
            raise tree.unknown_name("length normaliser", self.normaliser, list(NORMALISERS))
        if self.stopping not in STOPPINGS:
            raise tree.unknown_name("stopping rule", self.stopping, list(STOPPINGS))
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams}: a beam search needs at least 1.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(
                f"max_length={self.max_length}: decode at least 1 token, or None for the task's."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; mode='greedy' is its limit.")


class Example(NamedTuple):
    """One example as token ids, EOS included, and its task's id (-1 = a task the model has not seen)."""

    inputs: np.ndarray
    targets: np.ndarray
    task_id: int = -1


class TargetSums(NamedTuple):
    """Sums over the target tokens of each example, float [N]."""

    logprob: Any
    correct: Any
    tokens: Any


class Predictor(NamedTuple):
    """A model compiled for prediction; one serves all tasks and checkpoints.

    `score` gives TargetSums of numpy [N], `decode` the token ids before EOS; both take (params, examples) and
    keep their order. `num_compilations` counts the shapes compiled so far.
    """

    config: DecodeConfig
    score: Callable[..., TargetSums]
    decode: Callable[..., list[list[int]]]
    num_compilations: Callable[[], int]
    architecture: str = "encoder_decoder"


Progress = Callable[[int, int], None]  # (examples done, of how many)


def predictor(
    model: Model,
    config: DecodeConfig | None = None,
    *,
    lengths: Mapping[str, int],
    batch_size: int,
    mesh: Mesh,
    architecture: str = "encoder_decoder",
    eos_id: int = 1,
) -> Predictor:
    """Compile a model's scoring and decoding, once per shape.

    lengths: the longest `inputs` and `targets` in tokens. Parameters stay where the caller put them; batches
    are laid out over the mesh. Raises ValueError where the mesh does not divide batch_size.
    """
    config = config or DecodeConfig()
    online.check_architecture(architecture)
    sharding.check_divides(mesh, batch_size)
    replicated = NamedSharding(mesh, PartitionSpec())  # so that every host reads all results
    sums = sharding.on_mesh(functools.partial(target_sums, model), mesh)
    sums = jax.jit(sums, out_shardings=replicated)
    search = sharding.on_mesh(_search(model, config, eos_id=eos_id), mesh)
    search = jax.jit(search, static_argnums=3, out_shardings=replicated)
    max_length = config.max_length or lengths["targets"]
    calls: list[Any] = [sums, search]

    def run(call, examples: Sequence[Example], progress: Progress | None) -> list[np.ndarray]:
        rows: list[Any] = [None] * len(examples)
        done = 0
        for number, (chosen, shape) in enumerate(plan(examples, batch_size=batch_size, lengths=lengths)):
            batch = pad_batch(
                [examples[i] for i in chosen], shape=shape, num_rows=batch_size, architecture=architecture
            )
            values = jax.device_get(call(place(batch, mesh), number))
            for i, row in zip(chosen, zip(*values, strict=True), strict=False):  # rows to spare come last
                rows[i] = row
            done += len(chosen)
            if progress is not None:
                progress(done, len(examples))
        return rows

    def score(params: Params, examples: Sequence[Example], *, progress: Progress | None = None):
        rows = run(lambda batch, _: sums(params, batch), examples, progress)
        return TargetSums(*np.array(rows, np.float64).reshape(-1, 3).T)

    def decode_all(
        params: Params, examples: Sequence[Example], *, progress: Progress | None = None, seed: int = 0
    ):
        key = jax.random.fold_in(jax.random.key(config.seed), seed)
        start = np.array([eos_id], np.int32)  # holds the place where decoding starts
        inputs = [example._replace(targets=start) for example in examples]
        rows = run(
            lambda batch, i: search(params, batch, jax.random.fold_in(key, i), max_length), inputs, progress
        )
        return [before_eos(tokens, eos_id) for (tokens,) in rows]

    count = lambda: sum(call._cache_size() for call in calls)  # noqa: E731
    return Predictor(config, score, decode_all, count, architecture)


def target_sums(model: Model, params: Params, batch: Batch) -> TargetSums:
    """Sum log-probability, correct tokens and tokens of each row's targets, float32 [B]."""
    weights_BL = batch["decoder_loss_weights"]
    targets_BL = batch["decoder_target_tokens"]
    logits_BLV = model.logits(params, model.features(params, batch).hidden_BLD)
    hits_BL = (logits_BLV.argmax(-1) == targets_BL) * weights_BL
    return TargetSums(
        losses.sequence_logprobs(logits_BLV, targets_BL, weights_BL), hits_BL.sum(-1), weights_BL.sum(-1)
    )


def _search(model: Model, config: DecodeConfig, *, eos_id: int) -> Callable[..., tuple[Array]]:
    """Build search(params, batch, key, max_length) -> (best tokens [B, L],)."""

    def search(params: Params, batch: Batch, key: Array, max_length: int) -> tuple[Array]:
        common: dict[str, Any] = {"max_length": max_length, "eos_id": eos_id}
        if config.mode == "beam":
            found = decode.beam_search(
                model,
                params,
                batch,
                num_beams=config.num_beams,
                normaliser=NORMALISERS[config.normaliser](config.alpha),
                stopping=STOPPINGS[config.stopping](config.alpha),
                **common,
            )
            return (found.tokens[:, 0],)
        if config.mode == "sample":
            found = decode.sample(
                model,
                params,
                batch,
                key=key,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                **common,
            )
            return (found.tokens,)
        return (decode.greedy(model, params, batch, **common).tokens,)

    return search


def bucket(length: int, longest: int, *, smallest: int, factor: int) -> int:
    """Round a length up to smallest * factor^k, but not above `longest` where that suffices."""
    size = smallest
    while size < length:
        size *= factor
    return min(size, longest) if length <= longest else size


def plan(
    examples: Sequence[Example], *, batch_size: int, lengths: Mapping[str, int]
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yield (indices of a batch's examples, (input length, target length)), the longest inputs first."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].inputs))  # stable
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = max(len(examples[i].inputs) for i in chosen)
        targets = max(len(examples[i].targets) for i in chosen)
        shape = (
            bucket(inputs, lengths["inputs"], smallest=64, factor=2),
            bucket(targets, lengths["targets"], smallest=32, factor=4),
        )
        yield chosen, shape


def pad_batch(
    examples: Sequence[Example], *, shape: tuple[int, int], num_rows: int, architecture: str
) -> dict[str, np.ndarray]:
    """Pad examples, one a row, to `num_rows` rows of (input length, target length).

    Decoder-only rows hold both, one behind the other. Rows to spare repeat the last example, so that
    decoding does not wait for an end of nothing.
    """
    examples = [*examples, *[examples[-1]] * (num_rows - len(examples))]
    rows = [[packing.Example(e.task_id, 0, e.inputs, e.targets, False)] for e in examples]
    return packing.batch(
        rows, {"inputs": shape[0], "targets": shape[1]}, architecture=architecture, packed=False
    )


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Lay a batch that every host holds whole out over the mesh."""
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(value.shape, rows, lambda index, value=value: value[index])
        for name, value in batch.items()
    }


def before_eos(tokens: Sequence[int] | np.ndarray, eos_id: int) -> list[int]:
    """Return the ids before the first EOS, or else before the padding."""
    ids = [int(token) for token in tokens]
    ends = [ids.index(end) for end in (eos_id, 0) if end in ids]
    return ids[: min(ends)] if ends else ids


class Ranking(NamedTuple):
    """The likeliest option of each example, and what every option scored."""

    best: list[int]
    scores: list[np.ndarray]


def rank(
    predict: Predictor,
    params: Params,
    examples: Sequence[Example],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    progress: Progress | None = None,
) -> Ranking:
    """Choose the likeliest option of each example (rank classification, Brown et al. 2020, section 2.4).

    options: per example, the token ids of each option, EOS included. The first of equals wins.
    """
    if empty := [i for i, listed in enumerate(options) if not len(listed)]:
        raise ValueError(f"{len(empty)} examples have no options to rank, the first one at index {empty[0]}.")
    pairs = [
        example._replace(targets=np.asarray(option, np.int32))
        for example, listed in zip(examples, options, strict=True)
        for option in listed
    ]
    sums = predict.score(params, pairs, progress=progress)
    values = sums.logprob / np.maximum(sums.tokens, 1) if predict.config.length_normalized else sums.logprob
    ends = np.cumsum([len(listed) for listed in options])
    scores = np.split(values, ends[:-1])
    return Ranking([int(np.argmax(s)) for s in scores], scores)
