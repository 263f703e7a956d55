"""C4, the text T5 was pretrained on (Raffel et al. 2020): span corruption and prefix language modelling."""

from __future__ import annotations

import seqio

from mtjax.tasks import preprocessors
from mtjax.tasks.registration import add_task

CITATION = (
    "Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
)

for _name, _objective in (
    ("c4_span_corruption", preprocessors.span_corruption),
    ("c4_prefix_lm", preprocessors.prefix_lm),
):
    add_task(
        _name,
        source=seqio.TfdsDataSource("c4/en:3.1.0", splits=["train", "validation"]),
        preprocessors=[preprocessors.text_as_targets],
        online=[_objective],
        metrics=["bits_per_byte"],
        family="language_modeling",
        licence="ODC-BY 1.0; Common Crawl terms of use",
        citation=CITATION,
        origin="tfds:c4/en",
    )
