"""Preprocessors that SeqIO leaves to others: T5's span corruption and text-to-text formatting."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf


def rekey_text(dataset: tf.data.Dataset, *, field: str = "text") -> tf.data.Dataset:
    """Make a text the targets, with empty inputs, as span corruption and language modelling expect it."""
    return seqio.preprocessors.rekey(dataset, key_map={"inputs": None, "targets": field})


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    *,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> tf.data.Dataset:
    """Replace spans of the targets by sentinels in the inputs, and make them the targets (T5, Raffel et al. 2020).

    The mtjax pipeline knows this preprocessor by its name and runs mtjax.data.objectives on cached ids; under
    plain SeqIO the same numpy function runs here, with SeqIO's seed for each example.
    """
    vocabulary = output_features["targets"].vocabulary
    corrupt = functools.partial(
        _span_corruption,
        length=sequence_length["inputs"],
        vocabulary_size=vocabulary.vocab_size,
        noise_density=noise_density,
        mean_noise_span_length=mean_noise_span_length,
    )

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt_example(example, seed):
        inputs, targets = tf.numpy_function(corrupt, [example["targets"], seed], [tf.int32, tf.int32])
        inputs.set_shape([None])
        targets.set_shape([None])
        return {**example, "inputs": inputs, "targets": targets}

    return corrupt_example(dataset)


def _span_corruption(
    targets: np.ndarray, seed: np.ndarray, *, length: int, vocabulary_size: int, **noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Run the library's objective on one example; seed [2] int32."""
    from mtjax.data import objectives

    rng = np.random.default_rng([int(word) & 0xFFFFFFFF for word in seed])
    example: dict[str, Any] = {"targets": targets}
    example = objectives.span_corruption(
        example, rng, length=length, vocabulary_size=vocabulary_size, **noise
    )
    return example["inputs"].astype(np.int32), example["targets"].astype(np.int32)
