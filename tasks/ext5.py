"""What mtjax ships of ExT5's pretraining (Aribandi et al. 2022): C4, GLUE, SuperGLUE, CNN / Daily Mail, SQuAD, WMT.

Not ExMix, which was never released and has 107 tasks. Rates: supervised tasks by size, capped; C4 R = 2 times all of
them is a study's or recipe's rates.ratio.
"""

from __future__ import annotations

import functools

import seqio

from mtjax.tasks import c4, cnn_dailymail, glue, squad, superglue, wmt  # noqa: F401

MAXIMUM = 300_000
SUPERVISED = ("glue", "superglue", "cnn_dailymail", "squad", "wmt")

seqio.MixtureRegistry.add(
    "ext5_shipped",
    ["c4_span_corruption", *SUPERVISED],
    default_rate=functools.partial(seqio.mixing_rate_num_examples, maximum=MAXIMUM),
)
