"""Switch Transformers of Hugging Face: which layers are sparse, their experts' names, their settings.

transformers lets an expert take expert_capacity tokens of a row, whatever its length; ours are dropless. Both
give the same outputs where no expert is over its capacity; generation with a cache never is. Its auxiliary
losses treat a stack's sparse layers as one, and count padding; its coefficients are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mtjax import lazy, tree
from mtjax.lazy import Leaf
from mtjax.models import moe, routers, t5

MODEL_TYPE = "switch_transformers"
UNLIMITED = 1_000_000  # expert_capacity of a model that drops nothing
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu"}  # dense_act_fn -> ours
_EXPERT = re.compile(r"(.*/mlp)/expert_(\d+)/(\w+/kernel)")
_EXPERTS = re.compile(r"(.*/mlp)/expert/(\w+/kernel)")


# --- Names ------------------------------------------------------------------------------------------------


def mlp_names(config: t5.T5Config, ours: str, theirs: str, *, is_sparse: bool) -> dict[str, str]:
    """Return {our path: their name} of a layer's feed-forward block, expert by expert (see `joined`)."""
    if not is_sparse:
        return {f"{ours}/mlp/{name}/kernel": f"{theirs}.mlp.{name}.weight" for name in ("wi", "wo")}
    assert config.moe is not None
    names = {f"{ours}/mlp/router/router_weights/w/kernel": f"{theirs}.mlp.router.classifier.weight"}
    for e in range(config.moe.num_experts):
        for name in ("wi", "wo"):
            names[f"{ours}/mlp/expert_{e}/{name}/kernel"] = f"{theirs}.mlp.experts.expert_{e}.{name}.weight"
    return names


def joined(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Stack the leaves expert_0/..., expert_1/... of a block as expert/..., [E, in, out]."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if match := _EXPERT.fullmatch(path):
            found.setdefault(f"{match[1]}/expert/{match[3]}", {})[int(match[2])] = leaf
        else:
            found[path] = leaf
    return {
        path: lazy.stack([x[e] for e in range(len(x))]) if isinstance(x, dict) else x
        for path, x in found.items()
    }


def apart(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return every expert's kernels under a path of its own: the inverse of `joined`."""
    found = {}
    for path, leaf in leaves.items():
        if match := _EXPERTS.fullmatch(path):
            found |= {f"{match[1]}/expert_{e}/{match[2]}": part for e, part in enumerate(lazy.parts(leaf, 0))}
        else:
            found[path] = leaf
    return found


# --- Settings ---------------------------------------------------------------------------------------------


def fields(theirs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Translate a config.json's sparse layers and activation to fields of T5Config.

    Raises ValueError for what our models do not have.
    """
    activation = theirs.get("dense_act_fn", "relu")
    if activation not in ACTIVATIONS:
        raise tree.unknown_name(f"dense_act_fn in {source}", str(activation), list(ACTIVATIONS))
    if theirs.get("router_bias", False):
        raise ValueError(f"router_bias in {source} is not supported: our routers have none.")
    router = routers.Switch(
        balance_factor=theirs.get("router_aux_loss_coef", 0.001),
        z_factor=theirs.get("router_z_loss_coef", 0.001),
        jitter=theirs.get("router_jitter_noise", 0.01),
    )
    every = {
        _every(num_layers, theirs.get(f"num_sparse_{side}_layers", 3), f"the {side} of {source}")
        for side, num_layers in (
            ("encoder", theirs["num_layers"]),
            ("decoder", theirs.get("num_decoder_layers") or theirs["num_layers"]),
        )
    }
    if len(every) > 1:
        raise ValueError(
            f"{source} has other distances between sparse layers in encoder and decoder: {every}."
        )
    config = moe.MoeConfig(
        num_experts=theirs["num_experts"], every=every.pop(), encoder_router=router, decoder_router=router
    )
    return {"mlp_activations": (ACTIVATIONS[activation],), "moe": config}


def _every(num_layers: int, num_sparse: int, where: str) -> int:
    """Return the n of which every n-th layer is sparse, as transformers places them."""
    step = num_layers // num_sparse if num_sparse else num_layers
    sparse = [i for i in range(num_layers) if step == 1 or i % step == 1]
    if num_layers % step or sparse != list(range(step - 1, num_layers, step)):
        raise ValueError(
            f"In {where} the layers {sparse} of {num_layers} are sparse; only every layer, or the second one of "
            "every two, is supported."
        )
    return step


def their_fields(config: t5.T5Config, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Translate to a config.json; `kept` is the one that the model came with, if any.

    Raises ValueError for what transformers does not have.
    """
    assert config.moe is not None
    both, name = (config.moe.encoder_router, config.moe.decoder_router), "Hugging Face's Switch Transformers"
    for router in both:
        if not isinstance(router, routers.Switch) or router.gate != routers.Linear():
            raise ValueError(
                f"{name} have Switch routers in encoder and decoder, with linear gates; got {router}."
            )
    if config.moe.extra_mlp or config.moe.mlp_dim not in (None, config.mlp_dim):
        raise ValueError(f"{name} have no extra_mlp, and experts as wide as their dense blocks.")
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if len(config.mlp_activations) != 1 or config.mlp_activations[0] not in activations:
        raise ValueError(f"{name} have no feed-forward block with {config.mlp_activations}.")
    num_layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    sparse = {f"num_sparse_{side}_layers": n // config.moe.every for side, n in num_layers.items()}
    for side, n in num_layers.items():
        _every(n, sparse[f"num_sparse_{side}_layers"], f"the {side}")
    router = both[0]
    return {
        "num_experts": config.moe.num_experts,
        "expert_capacity": kept.get("expert_capacity", UNLIMITED),
        "router_bias": False,
        "router_dtype": kept.get("router_dtype", "float32"),
        "router_aux_loss_coef": router.balance_factor,
        "router_z_loss_coef": router.z_factor,
        "router_jitter_noise": router.jitter,
        "dense_act_fn": activations[config.mlp_activations[0]],
        "encoder_sparse_step": config.moe.every,
        "decoder_sparse_step": config.moe.every,
        **sparse,
    }
