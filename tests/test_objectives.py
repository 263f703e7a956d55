"""Each objective against its published definition: what it keeps, how much is noise, in which order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data import objectives, vocabulary
from mtjax.data.objectives import Room

VOCAB = vocabulary.byte(extra_ids=100)
LENGTHS = st.integers(0, 300)
SEEDS = st.integers(0, 2**64 - 1)


def rng_of(seed):
    return np.random.Generator(np.random.Philox(key=seed))


def text(length):
    return (np.arange(length) % 200 + 3).astype(np.uint16)


def undo_span_corruption(inputs, targets):
    """Put the spans of the targets where the inputs have their sentinels."""
    spans, lowest = {}, VOCAB.size - VOCAB.extra_ids
    for token in targets:
        if token >= lowest:
            spans[last := int(token)] = []
        else:
            spans[last].append(int(token))
    return [t for token in inputs for t in spans.get(int(token), [int(token)])]


@given(LENGTHS, SEEDS, st.floats(0.05, 0.5), st.floats(1.0, 10.0))
@settings(deadline=None)
def test_span_corruption_keeps_every_id_and_its_place(length, seed, density, mean):
    corrupt = objectives.span_corruption(
        Room(200, 200), vocabulary.byte(extra_ids=300), noise_density=density, mean_noise_span_length=mean
    )
    inputs, targets = corrupt(text(length), rng_of(seed))
    assert len(inputs) <= 200 and len(targets) <= 200
    lowest = 259
    sentinels = [int(t) for t in inputs if t >= lowest]
    assert sentinels == list(range(558, 558 - len(sentinels), -1))
    # A text of one id has a sentinel and no span.
    assert [int(t) for t in targets if t >= lowest] == sentinels or length == 1


@given(st.integers(2, 250), SEEDS)
@settings(deadline=None)
def test_span_corruption_can_be_undone(length, seed):
    corrupt = objectives.span_corruption(Room(400, 200), VOCAB)
    inputs, targets = corrupt(text(length), rng_of(seed))
    assert undo_span_corruption(inputs, targets) == text(length).tolist()
    assert targets[0] == inputs[inputs >= 259][0] == VOCAB.sentinel(0)


def test_t5s_lengths():
    # arXiv:1910.10683: 512 inputs and 114 targets, EOS in, come from 568 ids with 85 noise ids in 28 spans.
    corrupt = objectives.span_corruption(Room(511, 113), VOCAB)
    inputs, targets = corrupt(text(5000), rng_of(0))
    assert (len(inputs), len(targets)) == (511, 113)
    assert sum(inputs >= 259) == sum(targets >= 259) == 28
    assert len(undo_span_corruption(inputs, targets)) == 568


@given(st.integers(2, 400), SEEDS, st.floats(0.05, 0.6), st.floats(1.0, 10.0))
@settings(deadline=None)
def test_noise_mask_has_exactly_the_noise_asked_for(length, seed, density, mean):
    mask = objectives.noise_mask(length, rng_of(seed), noise_density=density, mean_length=mean)
    noise = min(max(round(length * density), 1), length - 1)
    assert len(mask) == length and mask.sum() == noise and not mask[0] and mask[-1]
    spans = [k for k, _ in itertools.groupby(mask) if k]
    assert len(spans) == min(max(round(noise / mean), 1), noise, length - noise)


def naive_span_lengths(rng, total, spans):
    """Shuffle where parts begin, as T5's random_spans_noise_mask does."""
    starts = np.arange(total - 1) < spans - 1
    rng.shuffle(starts)
    return np.bincount(np.cumsum(np.concatenate([[False], starts])))


def test_noise_spans_are_distributed_as_t5s():
    rng, ours, theirs = np.random.default_rng(0), [], []
    for _ in range(1500):
        mask = objectives.noise_mask(100, rng, noise_density=0.15, mean_length=3.0)
        ours += [len(list(group)) for is_noise, group in itertools.groupby(mask) if is_noise]
        theirs += naive_span_lengths(rng, 15, 5).tolist()
    assert np.mean(ours) == np.mean(theirs) == 3.0
    frequencies = [np.bincount(lengths, minlength=12)[:12] / len(lengths) for lengths in (ours, theirs)]
    np.testing.assert_allclose(*frequencies, atol=0.02)


@given(st.integers(1, 300), SEEDS, st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None)
def test_prefix_lm_cuts_a_chunk_in_two(length, seed, room_inputs, room_targets):
    inputs, targets = objectives.prefix_lm(Room(room_inputs, room_targets), VOCAB)(text(length), rng_of(seed))
    joined = np.concatenate([inputs, targets])
    start = int(np.flatnonzero((text(length)[:, None] == joined[0]).any(1))[0]) if length < 200 else None
    if start is not None:
        np.testing.assert_array_equal(joined, text(length)[start : start + len(joined)])
    assert len(joined) == min(length, room_inputs + room_targets)
    assert 1 <= len(inputs) <= room_inputs or length == 1
    assert len(targets) <= room_targets and (len(targets) >= 1 or length == 1)


def test_prefix_lm_cuts_everywhere_equally_often():
    split, rng = objectives.prefix_lm(Room(20, 20), VOCAB), np.random.default_rng(0)
    cuts = np.bincount([len(split(text(6), rng)[0]) for _ in range(2000)], minlength=7) / 2000
    np.testing.assert_allclose(cuts, [0, 0.2, 0.2, 0.2, 0.2, 0.2, 0], atol=0.04)


@given(LENGTHS, SEEDS)
@settings(deadline=None)
def test_causal_lm_has_targets_only(length, seed):
    inputs, targets = objectives.causal_lm(Room(0, 64), VOCAB)(text(length), rng_of(seed))
    assert len(inputs) == 0 and len(targets) == min(length, 64)


@given(st.integers(1, 100), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_chunks_cover_the_text_and_are_full(length, size):
    rng, ids = np.random.default_rng(0), np.arange(length)
    chunks = [objectives.random_chunk(ids, size, rng) for _ in range(40 * -(-length // size))]
    assert set(np.concatenate(chunks).tolist()) == set(range(length))
    assert {len(chunk) for chunk in chunks} == {min(size, length)}


def test_noise_depends_on_the_seed_alone():
    corrupt = objectives.span_corruption(Room(100, 50), VOCAB)
    one, same, other = (corrupt(text(90), rng_of(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one[0], same[0])
    assert not np.array_equal(one[0], other[0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"needs 28 sentinels .* has 27 extra ids"):
        objectives.span_corruption(Room(511, 113), vocabulary.byte(extra_ids=27))
    with pytest.raises(ValueError, match="does not fit"):
        objectives.span_corruption(Room(1, 1), VOCAB)
    with pytest.raises(ValueError, match="does not fit"):
        objectives.prefix_lm(Room(0, 5), VOCAB)
    with pytest.raises(ValueError, match="does not fit"):
        objectives.causal_lm(Room(5, 0), VOCAB)
