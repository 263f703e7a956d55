"""Routers of mixtures of experts: which expert sees which token, and with what weight.

A router is a frozen dataclass of settings; `make(emb_dim, num_experts, num_tasks=T, key=key)` returns the nnx
module that holds its parameters. The module's call is `router(x_GND, mask_GN, context) -> (choice, losses)`:
G routing groups of N tokens, mask_GN true where a token is no padding, the context's arrays regrouped to
[G, N]. `choice` is a TokenChoice, an ExpertChoice or Slots; `losses` holds auxiliary losses by name, float32
[G]: each the mean over a group's tokens, times its factor. All of it is computed in float32.

`can_decode` tells whether a token's choice depends on no later token, so that a decoder may use the router;
`can_pack` whether it keeps the examples of a group apart.
"""

from mtjax.models.routers.choice import ExpertChoice, Routing, Slots, TokenChoice, check_decoder
from mtjax.models.routers.dselect_k import DSelectK
from mtjax.models.routers.experts_choose import ExpertsChoose
from mtjax.models.routers.gates import Linear
from mtjax.models.routers.hashed import Hash
from mtjax.models.routers.soft import Soft
from mtjax.models.routers.task_level import TaskLevel
from mtjax.models.routers.tasks import (
    Descriptions,
    TaskEmbedding,
    TaskMatrix,
    check_descriptions,
    described_tasks,
)
from mtjax.models.routers.top_k import Switch, TopK

SETTINGS = (
    *(DSelectK, ExpertsChoose, Hash, Soft, Switch, TaskLevel, TopK),
    *(Descriptions, Linear, TaskEmbedding, TaskMatrix),
)
"""The settings' classes: routers, and gates."""

__all__ = [
    "SETTINGS",
    "DSelectK",
    "Descriptions",
    "ExpertChoice",
    "ExpertsChoose",
    "Hash",
    "Linear",
    "Routing",
    "Slots",
    "Soft",
    "Switch",
    "TaskEmbedding",
    "TaskLevel",
    "TaskMatrix",
    "TokenChoice",
    "TopK",
    "check_decoder",
    "check_descriptions",
    "described_tasks",
]
