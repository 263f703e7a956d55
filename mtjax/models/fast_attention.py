"""Which implementation of attention runs: the reference, cuDNN's on GPUs, or the tiled kernels on TPUs.

All of them give softmax(query @ key + bias) @ value. The reference (attention.mix_values) runs everywhere and
holds [B, H, L, S] arrays in memory; the others do not, and take only some of its shapes and types.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mtjax import sharding
from mtjax.models import flash
from mtjax.models.flash import TokenBias
from mtjax.types import Array

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")


def choose(name: str, query_BHLK: Array, key_BHSK: Array, *, has_relative_bias: bool) -> str:
    """Return the implementation to run: 'xla', 'cudnn' or 'pallas'.

    'auto' takes the fast one of the platform that the running trace is for, where it can run and pays.
    Raises ValueError where one was asked for by name and cannot run, with the reason.
    """
    if name == "auto":
        fast = {"tpu": "pallas", "gpu": "cudnn"}.get(sharding.platform())
        if fast is None or obstacle(fast, query_BHLK, key_BHSK):
            return "xla"
        return fast if pays(fast, query_BHLK, key_BHSK, has_relative_bias=has_relative_bias) else "xla"
    if name != "xla" and (reason := obstacle(name, query_BHLK, key_BHSK)):
        raise ValueError(
            f"attention={name!r} cannot run here: {reason}. Use attention='auto', which takes the fastest that "
            "can, or 'xla', which runs everywhere."
        )
    return name


def pays(name: str, query_BHLK: Array, key_BHSK: Array, *, has_relative_bias: bool) -> bool:
    """Tell whether an implementation is expected to be faster than the reference at these lengths."""
    weights = query_BHLK.shape[2] * key_BHSK.shape[2]
    if name == "cudnn":
        # It takes a dense bias [B, H, L, S] only, which is what the reference's time goes into; a mask has no heads.
        return not has_relative_bias and weights >= 512 * 512
    return weights >= 256 * 256


def obstacle(name: str, query_BHLK: Array, key_BHSK: Array) -> str | None:
    """Say why 'cudnn' or 'pallas' cannot run in this trace with these shapes, or return None."""
    rows, num_heads, num_queries, head_dim = query_BHLK.shape
    mesh, platform = sharding.current_mesh(), sharding.platform()
    needs = {"cudnn": "gpu", "pallas": "tpu"}[name]
    if platform != needs:
        return f"it needs a {needs.upper()}, this computation is for {platform!r}"
    shards = {} if mesh is None else dict(mesh.shape)
    if shards.get("sequence", 1) > 1:
        return (
            f"the mesh axis 'sequence' cuts the rows in {shards['sequence']} parts, and it needs whole rows"
        )
    row_shards, head_shards = (1, 1) if mesh is None else (sharding.num_row_shards(mesh), shards["model"])
    if rows % row_shards or num_heads % head_shards:
        return f"the mesh does not divide {rows} rows by {row_shards} or {num_heads} heads by {head_shards}"
    if name == "pallas":
        return flash.obstacle(
            num_heads=num_heads // head_shards,
            head_dim=head_dim,
            num_queries=num_queries,
            bytes_each=query_BHLK.dtype.itemsize,
        )
    return _cudnn_obstacle(query_BHLK, key_BHSK)


def capability() -> str:
    """Return the compute capability of the devices that the running trace is for; '9.0' is an H100's."""
    mesh = sharding.current_mesh()
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return str(getattr(device, "compute_capability", "unknown"))


def _cudnn_obstacle(query_BHLK: Array, key_BHSK: Array) -> str | None:
    num_queries, head_dim = query_BHLK.shape[2:]
    num_keys = key_BHSK.shape[2]
    major = capability().partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return f"it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later, got {capability()}"
    if query_BHLK.dtype != jnp.bfloat16:
        return f"it needs bfloat16 activations, got {query_BHLK.dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"it needs a head_dim that is a multiple of 8 up to 128, got {head_dim}"
    if num_queries % 2 or num_keys % 2:
        return f"with a bias it needs even lengths, got {num_queries} and {num_keys}"
    return None


def cudnn(
    query_BHLK: Array,
    key_BHSK: Array,
    value_BHSK: Array,
    *,
    visible: Array,
    relative: Array | None,
    implementation: Any = "cudnn",
) -> Array:
    """Return the values mixed by cuDNN's fused attention [B, H, L, K].

    `visible` is bool and `relative` float32, both broadcastable to [B, H, L, S]; cuDNN adds them as one dense
    bias of the queries' type, [B, 1, L, S] where there is no relative one.
    """
    lengths = (query_BHLK.shape[2], key_BHSK.shape[2])
    dense = [
        None if x is None else jnp.broadcast_to(x, (*x.shape[:2], *lengths))
        for x in (visible, None if relative is None else relative.astype(query_BHLK.dtype))
    ]
    mixed_BLHK = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query_BHLK, key_BHSK, value_BHSK)),
        mask=dense[0],
        bias=dense[1],
        scale=1.0,  # which the query's initialiser holds
        implementation=implementation,
    )
    return jnp.swapaxes(mixed_BLHK, 1, 2)


def pallas(
    query_BHLK: Array, key_BHSK: Array, value_BHSK: Array, bias: TokenBias, *, interpret: bool = False
) -> Array:
    """Return the values mixed by the tiled kernels [B, H, L, K]: each device its own rows and heads."""

    def mix(*arguments: Any) -> Array:
        return flash.flash_attention(*arguments, interpret=interpret)

    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return mix(query_BHLK, key_BHSK, value_BHSK, bias)
    rows = PartitionSpec(sharding.ROW_AXES)
    heads = PartitionSpec(sharding.ROW_AXES, "model")
    of_bias = dataclasses.replace(
        bias,
        keys_BS=rows,
        queries_BL=None if bias.queries_BL is None else rows,
        by_distance_HX=None if bias.by_distance_HX is None else PartitionSpec("model"),
    )
    # check_vma: the kernels do not say over which axes their outputs vary.
    sharded = jax.shard_map(
        mix, mesh=mesh, in_specs=(heads, heads, heads, of_bias), out_specs=heads, check_vma=False
    )
    return sharded(query_BHLK, key_BHSK, value_BHSK, bias)
