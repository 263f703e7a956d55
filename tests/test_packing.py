"""Packed rows hold every example once and whole, as a loop over tokens would lay them out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data import packing
from mtjax.data.packing import Example

LENGTHS = {"inputs": 12, "targets": 7}
IDS = st.integers(3, 99)
EXAMPLES = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.lists(IDS, min_size=1, max_size=12),
        st.lists(IDS, min_size=1, max_size=7),
    ),
    min_size=1,
    max_size=40,
)
ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])


def example(task, inputs, targets, occurrence=0):
    return Example(task, occurrence, np.array(inputs, np.int32), np.array(targets, np.int32))


def pack(examples, *, window, architecture="encoder_decoder"):
    packer = packing.Packer(LENGTHS, window=window, architecture=architecture)
    numbered = [example(*fields, occurrence=n) for n, fields in enumerate(examples)]
    return [row for e in numbered if (row := packer.add(e)) is not None] + packer.close()


def naive(rows, architecture):
    """Lay rows out token by token."""
    lengths = LENGTHS if architecture == "encoder_decoder" else {"targets": 19}
    side_of = {"inputs": "encoder", "targets": "decoder"}
    batch = {}
    for feature, length in lengths.items():
        side = side_of[feature]
        names = [f"{side}_task_ids", f"{side}_segment_ids", f"{side}_positions"]
        names += (
            ["encoder_input_tokens"]
            if side == "encoder"
            else ["decoder_target_tokens", "decoder_input_tokens"]
        )
        names += ["decoder_loss_weights"] if side == "decoder" else []
        names += ["decoder_causal_attention"] if architecture == "decoder_only" else []
        batch |= {name: np.full((len(rows), length), -1 if "task" in name else 0, float) for name in names}
        for b, row in enumerate(rows):
            at = 0
            for segment, e in enumerate(row, 1):
                prefix = e.inputs.tolist() if architecture == "decoder_only" else []
                ids = prefix + getattr(e, feature).tolist()
                for position, token in enumerate(ids):
                    values = {
                        f"{side}_task_ids": e.task,
                        f"{side}_segment_ids": segment,
                        f"{side}_positions": position,
                        "encoder_input_tokens": token,
                        "decoder_target_tokens": token,
                        "decoder_input_tokens": ids[position - 1] if position else 0,
                        "decoder_loss_weights": position >= len(prefix),
                        "decoder_causal_attention": bool(prefix) and position <= len(prefix),
                    }
                    for name in names:
                        batch[name][b, at] = values[name]
                    at += 1
    return batch


@ARCHITECTURES
@given(EXAMPLES, st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_rows_are_laid_out_as_a_loop_does(architecture, examples, window):
    rows = pack(examples, window=window, architecture=architecture)
    batch, expected = (
        packing.batch(rows, LENGTHS, architecture=architecture, packed=True),
        naive(rows, architecture),
    )
    assert batch.keys() == expected.keys()
    for name, values in batch.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
        assert values.dtype == (np.float32 if name == "decoder_loss_weights" else np.int32)


@ARCHITECTURES
@given(EXAMPLES, st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_every_example_is_in_one_row_and_rows_do_not_overflow(architecture, examples, window):
    rows = pack(examples, window=window, architecture=architecture)
    assert sorted(e.occurrence for row in rows for e in row) == list(range(len(examples)))
    for row in rows:
        inputs, targets = sum(len(e.inputs) for e in row), sum(len(e.targets) for e in row)
        if architecture == "decoder_only":
            assert inputs + targets <= 19
        else:
            assert inputs <= 12 and targets <= 7


@given(EXAMPLES, st.integers(1, 6), st.integers(0, 40))
@settings(deadline=None, max_examples=50)
def test_a_restored_packer_goes_on_alike(examples, window, cut):
    numbered = [example(*fields, occurrence=n) for n, fields in enumerate(examples)]
    first = packing.Packer(LENGTHS, window=window, architecture="encoder_decoder")
    for e in numbered[:cut]:
        first.add(e)
    second = packing.Packer(LENGTHS, window=window, architecture="encoder_decoder")
    second.restore(first.rows)
    for e in numbered[cut:]:
        one, two = first.add(e), second.add(e)
        assert (one is None) == (two is None) and [x.occurrence for x in one or []] == [
            x.occurrence for x in two or []
        ]


def test_first_fit_takes_the_oldest_row_with_room():
    examples = [(0, [5] * 10, [5]), (0, [5] * 8, [5]), (0, [5] * 3, [5]), (0, [5] * 2, [5])]
    assert [[e.occurrence for e in row] for row in pack(examples, window=3)] == [[0, 3], [1, 2]]


def test_the_fullest_row_closes_when_the_window_is_full():
    packer = packing.Packer(LENGTHS, window=2, architecture="encoder_decoder")
    assert packer.add(example(0, [5] * 8, [5])) is None
    assert packer.add(example(0, [5] * 11, [5])) is None
    assert [len(e.inputs) for e in packer.add(example(0, [5] * 9, [5]))] == [11]


def test_decoder_only_rows_are_t5xs():
    # Row 0 of case prefix_lm_packed of T5X's decoder-only outputs.
    segments = [([211, 366, 342, 225, 1], [77, 3, 318, 362, 1]), ([18, 229, 225, 1], [3, 299, 103, 299, 1])]
    row = [example(0, *sides) for sides in segments]
    batch = packing.batch([row], {"inputs": 10, "targets": 10}, architecture="decoder_only", packed=True)
    expected = {
        "decoder_target_tokens": [
            211,
            366,
            342,
            225,
            1,
            77,
            3,
            318,
            362,
            1,
            18,
            229,
            225,
            1,
            3,
            299,
            103,
            299,
            1,
            0,
        ],
        "decoder_input_tokens": [
            0,
            211,
            366,
            342,
            225,
            1,
            77,
            3,
            318,
            362,
            0,
            18,
            229,
            225,
            1,
            3,
            299,
            103,
            299,
            0,
        ],
        "decoder_loss_weights": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0],
        "decoder_causal_attention": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    }
    for name, values in expected.items():
        assert batch[name][0].tolist() == values, name


def test_unpacked_rows_have_no_segments():
    batch = packing.batch(
        [[example(3, [5, 1], [6, 1])], []], LENGTHS, architecture="encoder_decoder", packed=False
    )
    assert not any("segment" in name or "positions" in name for name in batch)
    assert batch["encoder_task_ids"][:, :3].tolist() == [[3, 3, -1], [-1, -1, -1]]
    assert batch["decoder_loss_weights"].sum(1).tolist() == [2, 0]


def test_packing_is_tight():
    rng = np.random.default_rng(0)
    lengths = {"inputs": 512, "targets": 114}
    packer = packing.Packer(lengths, window=16, architecture="encoder_decoder")
    sizes = rng.integers(10, 110, 4000)
    examples = [example(0, np.zeros(n), np.zeros(max(n * 114 // 512, 1))) for n in sizes]
    rows = [row for e in examples if (row := packer.add(e)) is not None]
    used = sum(len(e.inputs) for row in rows for e in row)
    assert used / (512 * len(rows)) > 0.97
