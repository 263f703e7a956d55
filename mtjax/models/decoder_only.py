"""A decoder-only T5: causal or prefix language model, with T5X's parameters (t5x.examples.decoder_only).

Positions marked in decoder_causal_attention (the inputs, and one more: the sequence is shifted right) see
each other in both directions; the relative bias stays one-directional. As in models/t5.py positions are
relative, so decoder_positions change nothing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtjax.models import functional
from mtjax.models.attention import MASKED, attention_bias, attention_mask
from mtjax.models.layers import Embed, Linear, RMSNorm, dropout, fan_in_truncated
from mtjax.models.t5 import (
    EncoderLayer,
    attention_block,
    batch_context,
    cache_context,
    check_config,
    empty_cache,
    mlp_block,
    relative_bias,
    residual_dropout,
    step_bias,
    take_rows,
)
from mtjax.types import Array, Context, Features, Model
