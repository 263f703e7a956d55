"""Configurations of models as JSON, for checkpoints: dataclasses inside of dataclasses keep their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtjax import tree
from mtjax.models import decoder_only, encoder_only, moe, routers, t5

KINDS = {
    kind.__name__: kind
    for kind in (
        t5.T5Config,
        decoder_only.DecoderOnlyConfig,
        encoder_only.EncoderOnlyConfig,
        moe.MoeConfig,
        *routers.SETTINGS,
    )
}


def describe(config: Any) -> dict[str, Any]:
    """Return {"name": the configuration's class, field: value, ...}, a JSON object."""
    fields = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return {"name": type(config).__name__, **fields}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return describe(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def build(described: Mapping[str, Any]) -> Any:
    """Return the configuration that `describe` has described; fields that it does not have are left at defaults.

    Raises ValueError on a name or a field that is not known.
    """
    if described["name"] not in KINDS:
        raise tree.unknown_name("configuration", str(described["name"]), list(KINDS))
    kind = KINDS[described["name"]]
    known = [field.name for field in dataclasses.fields(kind)]
    values = {name: value for name, value in described.items() if name != "name"}
    for name in values:
        if name not in known:
            raise tree.unknown_name(f"field of {described['name']}", name, known)
    return kind(**{name: _built(value) for name, value in values.items()})


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return build(value)
    return tuple(_built(item) for item in value) if isinstance(value, list | tuple) else value
