"""Loss-weighting and gradient-balancing methods, one a file."""

from mtjax.balance.uniform import uniform

__all__ = ["uniform"]
