"""Models: nnx modules as parameter containers, used through pure functions."""

from mtjax.models import decoder_only, encoder_only, functional, routers, t5

__all__ = ["decoder_only", "encoder_only", "functional", "routers", "t5"]
