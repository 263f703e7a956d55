"""Decoding with a key/value cache: greedy, beam search and sampling; scoring of given targets.

All functions are pure and trace once: jit them with model, lengths and beam count static. A decoded sequence
ends with its end-of-sequence token, if it reached it, and is padded with 0.
Shapes: B rows, N beams, L target length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax import losses
from mtjax.types import Array, Batch, Model, Params

NEVER = -1e7  # a log-probability that loses to every real one and stays finite


class Decoded(NamedTuple):
    """Tokens int32 [B, L] and summed log-probabilities [B]; beam search: [B, N, L], best first, and [B, N]."""

    tokens: Array
    scores: Array


def greedy(model: Model, params: Params, batch: Batch, *, max_length: int, eos_id: int = 1) -> Decoded:
    """Take the likeliest token at every step; scores are sums of log-probabilities."""
    return _token_by_token(
        model,
        params,
        batch,
        choose=lambda logits_BV, step: likeliest(logits_BV, 1)[1][:, 0],
        max_length=max_length,
        eos_id=eos_id,
    )


def sample(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    key: Array,
    max_length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    eos_id: int = 1,
) -> Decoded:
    """Draw every token from softmax(logits / temperature), cut to top_k tokens and to top_p probability.

    0 switches either cut off; with both, top_k comes first (Holtzman et al. 2020 for top_p). Row i's draws
    depend on key and i alone. Scores are sums of the model's own log-probabilities, neither tempered nor cut.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}; greedy() is the limit at 0.")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 = off), got {top_k!r}.")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p must be in [0, 1] (0 = off), got {top_p!r}.")

    def choose(logits_BV: Array, step: Array) -> Array:
        logits_BV = cut(logits_BV / temperature, top_k=top_k, top_p=top_p)
        rows = jnp.arange(logits_BV.shape[0])
        step_key = jax.random.fold_in(key, step)
        return jax.vmap(
            lambda row, logits_V: jax.random.categorical(jax.random.fold_in(step_key, row), logits_V)
        )(rows, logits_BV)

    return _token_by_token(model, params, batch, choose=choose, max_length=max_length, eos_id=eos_id)


def cut(logits_BV: Array, *, top_k: int = 0, top_p: float = 0.0) -> Array:
    """Set logits to -inf outside the top_k largest, then outside the fewest that reach probability top_p."""
    if 0 < top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, top_k)[0][..., -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if 0.0 < top_p < 1.0:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return logits_BV


def likeliest(logits_BV: Array, count: int, *, block: int = 128) -> tuple[Array, Array]:
    """Return the `count` largest logits of each row and their tokens, as jax.lax.top_k does.

    Of a large vocabulary only the `count` blocks with the largest maxima are searched: they hold all of them.
    On a CPU that takes half the time of a search of everything.
    """
    rows, vocab_size = logits_BV.shape
    if vocab_size < 4 * count * block or jax.default_backend() != "cpu":
        return jax.lax.top_k(logits_BV, count)
    padding = ((0, 0), (0, -vocab_size % block))
    blocks_BXY = jnp.pad(logits_BV, padding, constant_values=-jnp.inf).reshape(rows, -1, block)
    chosen_BX = jnp.sort(
        jax.lax.top_k(blocks_BXY.max(-1), count)[1], axis=-1
    )  # the first of equals stays first
    found_BZ = jnp.take_along_axis(blocks_BXY, chosen_BX[..., None], axis=1).reshape(rows, -1)
    values_BM, places_BM = jax.lax.top_k(found_BZ, count)
    return values_BM, jnp.take_along_axis(chosen_BX, places_BM // block, axis=1) * block + places_BM % block


def _token_by_token(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    choose: Callable[[Array, Array], Array],
    max_length: int,
    eos_id: int,
) -> Decoded:
    cache = model.start(params, model.encode(params, batch), max_length=max_length)
    rows = cache["first_B"].shape[0]
    state = {
        "step": jnp.int32(0),
        "fed_B": cache["first_B"],
        "ended_B": jnp.zeros(rows, bool),
        "tokens_BL": jnp.zeros((rows, max_length), jnp.int32),
        "score_B": jnp.zeros(rows, jnp.float32),
        "cache": cache,
    }

    def running(state: dict) -> Array:
        return (state["step"] < max_length) & ~state["ended_B"].all()

    def advance(state: dict) -> dict:
        logits_BV, cache = model.decode(params, state["cache"], state["fed_B"])
        chosen_B = choose(logits_BV, state["step"]).astype(jnp.int32)
        logit_B = jnp.take_along_axis(logits_BV, chosen_B[:, None], axis=-1)[:, 0]
        logprob_B = logit_B - jax.nn.logsumexp(logits_BV, axis=-1)
        chosen_B = jnp.where(state["ended_B"], 0, chosen_B)
        return {
            "step": state["step"] + 1,
            "fed_B": chosen_B,
            "ended_B": state["ended_B"] | (chosen_B == eos_id),
            "tokens_BL": state["tokens_BL"].at[:, state["step"]].set(chosen_B),
            "score_B": state["score_B"] + jnp.where(state["ended_B"], 0.0, logprob_B),
            "cache": cache,
        }

    state = jax.lax.while_loop(running, advance, state)
    return Decoded(state["tokens_BL"], state["score_B"])


# --- Beam search ------------------------------------------------------------------------------------------

Normaliser = Callable[
    [Array], Array
]  # float32 length, EOS included -> what the log-probability is divided by


def t5x_length(alpha: float) -> Normaliser:
    """Return length -> ((5 + length) / 6)^alpha (Wu et al. 2016, equation 14, as T5 uses it)."""
    return lambda length: jnp.power((5.0 + length) / 6.0, alpha)


def huggingface_length(alpha: float) -> Normaliser:
    """Return length -> length^alpha, transformers' length_penalty."""
    return lambda length: jnp.power(length, alpha)


class Stopping(NamedTuple):
    """When a row's search is over, and which hypotheses count.

    is_over(live, finished, length, max_length, normaliser) -> bool [B], where live [B] are the best
    log-probabilities of unfinished beams of `length` tokens, and finished [B, N] the scores so far, best first.
    """

    is_over: Callable[[Array, Array, Array, int, Normaliser], Array]
    share_ending: float  # of the 2 * num_beams best continuations, those that may end there
    closes_rows: bool  # a row that is over takes no more hypotheses while others go on
    counts_cut: bool  # what max_length cuts off competes with what ended


def t5x_stopping() -> Stopping:
    """Stop a row when its worst finished beam beats what its best live one could still reach at max_length."""

    def is_over(live_B: Array, finished_BN: Array, length: Array, max_length: int, normaliser: Normaliser):
        del length
        return finished_BN[:, -1] > live_B / normaliser(jnp.float32(max_length))

    return Stopping(is_over, share_ending=1.0, closes_rows=False, counts_cut=False)


def huggingface_stopping(early_stopping: bool | str = False, *, alpha: float = 1.0) -> Stopping:
    """Stop as transformers does: False, True and 'never' are its early_stopping.

    True: num_beams hypotheses suffice. Or else a row stops when its best live beam, at its present length, is
    not better than its worst hypothesis; 'never' takes max_length where alpha > 0, and so misses nothing.
    """
    if early_stopping not in (False, True, "never"):
        raise ValueError(f"early_stopping must be False, True or 'never', got {early_stopping!r}.")

    def is_over(live_B: Array, finished_BN: Array, length: Array, max_length: int, normaliser: Normaliser):
        reached = jnp.float32(max_length) if early_stopping == "never" and alpha > 0 else length
        is_hopeless_B = live_B / normaliser(reached) <= finished_BN[:, -1]
        is_full_B = finished_BN[:, -1] > NEVER / 2
        return is_hopeless_B | is_full_B if early_stopping is True else is_hopeless_B

    return Stopping(is_over, share_ending=0.5, closes_rows=True, counts_cut=True)


class Beams(NamedTuple):
    """N hypotheses a row, best first."""

    tokens_BNL: Array
    scores_BN: Array

    def best(self, num_beams: int) -> tuple[Beams, Array]:
        """Return the best num_beams, and which ones they were [B, num_beams]."""
        scores_BN, chosen_BN = jax.lax.top_k(self.scores_BN, num_beams)
        return Beams(jnp.take_along_axis(self.tokens_BNL, chosen_BN[..., None], axis=1), scores_BN), chosen_BN


def _continuations(logits: Array, live_BN: Array, *, count: int) -> tuple[Array, Array, Array]:
    """Return the `count` best continuations of each row's beams: log-probability, beam and token, [B, count].

    logits [B * N, V]; live_BN: log-probabilities of the beams.
    """
    rows, num_beams = live_BN.shape
    values, tokens = likeliest(logits, min(count, logits.shape[-1]))
    logprobs = values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = logprobs.reshape(rows, num_beams, -1) + live_BN[..., None]
    scores_BM, flat_BM = jax.lax.top_k(scores.reshape(rows, -1), count)
    token_BM = jnp.take_along_axis(tokens.reshape(rows, -1), flat_BM, axis=1)
    return scores_BM, flat_BM // values.shape[-1], token_BM.astype(jnp.int32)


def beam_search(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    max_length: int,
    num_beams: int = 4,
    normaliser: Normaliser | None = None,
    stopping: Stopping | None = None,
    eos_id: int = 1,
) -> Decoded:
    """Search for the sequences with the best log-probability / normaliser(length).

    Lengths count the end-of-sequence token. T5X's normaliser (alpha 0.6) and stopping rule hold unless others
    are given. Where nothing finished, the live beams are returned, with plain log-probabilities. Fewer
    finished sequences than beams leave scores near -1e7 at the end.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be >= 1, got {num_beams!r}.")
    normaliser, stopping = normaliser or t5x_length(0.6), stopping or t5x_stopping()
    cache = model.start(params, model.encode(params, batch), max_length=max_length, num_beams=num_beams)
    rows = cache["first_B"].shape[0] // num_beams
    nothing = jnp.zeros((rows, num_beams, max_length), jnp.int32)
    only_first = jnp.where(jnp.arange(num_beams) == 0, 0.0, NEVER)  # beams start equal: keep one
    may_end_M = jnp.arange(2 * num_beams) < 2 * num_beams * stopping.share_ending
    state = {
        "step": jnp.int32(0),
        "fed_B": cache["first_B"],
        "live": Beams(nothing, jnp.broadcast_to(only_first, (rows, num_beams)).astype(jnp.float32)),
        "finished": Beams(nothing, jnp.full((rows, num_beams), NEVER, jnp.float32)),
        "is_over_B": jnp.zeros(rows, bool),
        "cache": cache,
    }

    def running(state: dict) -> Array:
        return (state["step"] < max_length) & ~state["is_over_B"].all()

    def advance(state: dict) -> dict:
        step, live = state["step"], state["live"]
        length = (step + 1).astype(jnp.float32)
        logits, cache = model.decode(params, state["cache"], state["fed_B"])
        # 1. Of all continuations, 2 * num_beams suffice: at most num_beams of them end.
        scores_BM, beam_BM, token_BM = _continuations(logits, live.scores_BN, count=2 * num_beams)
        tokens_BML = jnp.take_along_axis(live.tokens_BNL, beam_BM[..., None], axis=1)
        tokens_BML = tokens_BML.at[:, :, step].set(token_BM)
        ended_BM = token_BM == eos_id
        # 2. Those that did not end live on, with their rows of the cache.
        live, chosen_BN = Beams(tokens_BML, jnp.where(ended_BM, NEVER + scores_BM, scores_BM)).best(num_beams)
        from_beam_BN = jnp.take_along_axis(beam_BM, chosen_BN, axis=1)
        cache_rows = (jnp.arange(rows)[:, None] * num_beams + from_beam_BN).ravel()
        # 3. Those that ended compete with the finished ones.
        if stopping.counts_cut:
            ended_BM = ended_BM | (step == max_length - 1)
        counts_BM = ended_BM & may_end_M
        if stopping.closes_rows:
            counts_BM = counts_BM & ~state["is_over_B"][:, None]
        normalised_BM = scores_BM / normaliser(length)
        candidates = Beams(
            jnp.concatenate([state["finished"].tokens_BNL, tokens_BML], axis=1),
            jnp.concatenate(
                [state["finished"].scores_BN, jnp.where(counts_BM, normalised_BM, normalised_BM + NEVER)],
                axis=1,
            ),
        )
        finished = candidates.best(num_beams)[0]
        is_over_B = stopping.is_over(live.scores_BN[:, 0], finished.scores_BN, length, max_length, normaliser)
        return {
            "step": step + 1,
            "fed_B": jnp.take_along_axis(token_BM, chosen_BN, axis=1).ravel(),
            "live": live,
            "finished": finished,
            "is_over_B": is_over_B | (state["is_over_B"] & stopping.closes_rows),
            "cache": model.reorder(cache, cache_rows),
        }

    state = jax.lax.while_loop(running, advance, state)
    live, finished = state["live"], state["finished"]
    some_B = finished.scores_BN[:, 0] > NEVER / 2
    return Decoded(
        jnp.where(some_B[:, None, None], finished.tokens_BNL, live.tokens_BNL),
        jnp.where(some_B[:, None], finished.scores_BN, live.scores_BN),
    )


def score(model: Model, params: Params, batch: Batch) -> Array:
    """Return each row's sum of target log-probabilities [B], over tokens of positive loss weight."""
    logits_BLV = model.apply(params, batch).logits_BLV
    return losses.sequence_logprobs(logits_BLV, batch["decoder_target_tokens"], batch["decoder_loss_weights"])
