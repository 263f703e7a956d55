"""Parameter-efficient tuning, one method a file."""

from mtjax.peft.full import full

__all__ = ["full"]
