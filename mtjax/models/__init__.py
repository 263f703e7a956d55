"""Models: nnx modules as parameter containers, used through pure functions."""

from mtjax.models import functional, t5

__all__ = ["functional", "t5"]
