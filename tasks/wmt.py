"""WMT translation from English as T5 reads it: 'translate English to German: <sentence>' → its translation.

WMT 2014 English to German and to French, WMT 2016 English to Romanian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf

from mtjax.tasks.preprocessors import join, map_examples
from mtjax.tasks.registration import add_task

PAIRS = {
    # name: (TFDS name, language, citation)
    "wmt14_en_de": ("wmt14_translate/de-en:1.0.0", "German", "Bojar et al. 2014"),
    "wmt14_en_fr": ("wmt14_translate/fr-en:1.0.0", "French", "Bojar et al. 2014"),
    "wmt16_en_ro": ("wmt16_translate/ro-en:1.0.0", "Romanian", "Bojar et al. 2016"),
}


def translate(code: str, language: str) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Return the preprocessor from English (field 'en') into the language of field `code`."""

    def format_pair(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"inputs": join(f"translate English to {language}:", example["en"]), "targets": example[code]}

    return map_examples(format_pair)


for _name, (_tfds, _language, _citation) in PAIRS.items():
    add_task(
        _name,
        source=seqio.TfdsDataSource(_tfds, splits=["train", "validation", "test"]),
        preprocessors=[translate(_name[-2:], _language)],
        metrics=["bleu"],
        family="translation",
        licence="as the parallel corpora; research use",
        citation=f"{_citation}, Findings of the Conference on Machine Translation",
        origin=f"tfds:{_tfds.partition(':')[0]}",
    )
seqio.MixtureRegistry.add("wmt", list(PAIRS), default_rate=1.0)
