"""Checkpoints in and out: Hugging Face and T5X folders, and our own model directories.

Every reader returns Weights and every writer takes them; a leaf is a numpy view of a file wherever the format
allows it, so that a large model passes through leaf by leaf.
"""

from mtjax.convert.model_directory import read as read_model_directory
from mtjax.convert.model_directory import write as write_model_directory
from mtjax.convert.upcycle import upcycle
from mtjax.convert.weights import Weights, average, cast, group_heads, pad_vocabulary

__all__ = [
    "Weights",
    "average",
    "cast",
    "group_heads",
    "pad_vocabulary",
    "read_model_directory",
    "upcycle",
    "write_model_directory",
]
