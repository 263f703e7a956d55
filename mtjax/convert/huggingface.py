"""Hugging Face folders of T5, T5 1.1, Flan-T5, mT5, UMT5, ByT5, LongT5 and Switch: config.json and safetensors.

Needs neither torch nor transformers. Tensors are read when they are asked for. torch's Linear keeps [out, in]
and its Embedding [rows, width], so kernels and tables of relative biases are transposed.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from mtjax import lazy, tree
from mtjax.convert import switch
from mtjax.convert.weights import Weights, check_plain_decoder, checked
from mtjax.data import vocabulary
from mtjax.lazy import LazyArray, Leaf
from mtjax.models import t5

MODEL_TYPES = ("t5", "mt5", "umt5", "longt5", switch.MODEL_TYPE)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
VOCABULARY = "spiece.model"
_EMBEDDING, _LOGITS = "token_embedder/embedding", "decoder/logits_dense/kernel"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# feed_forward_proj -> our activations; gated-gelu is the tanh approximation there, plain "gelu" is not.
_FEED_FORWARD = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_BLOCKS = {
    "encoder": (("attention", "SelfAttention"), ("mlp", "DenseReluDense")),
    "decoder": (
        ("self_attention", "SelfAttention"),
        ("encoder_decoder_attention", "EncDecAttention"),
        ("mlp", "DenseReluDense"),
    ),
}
# Our encoder_attention -> LongT5's encoder_attention_type, and what its blocks are called.
_ENCODER_ATTENTION = {"local": "local", "transient_global": "transient-global"}
_ENCODER_BLOCKS = {
    "full": "SelfAttention",
    "local": "LocalSelfAttention",
    "transient_global": "TransientGlobalSelfAttention",
}
_CLASSES = {"longt5": "LongT5", switch.MODEL_TYPE: "SwitchTransformers"}  # others: in capitals
_NORMS = {
    "attention": "pre_attention_layer_norm",
    "self_attention": "pre_self_attention_layer_norm",
    "encoder_decoder_attention": "pre_cross_attention_layer_norm",
    "mlp": "pre_mlp_layer_norm",
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def tensor_names(config: t5.T5Config) -> dict[str, str]:
    """Return {our path: Hugging Face's tensor name} of a configuration's unstacked parameters."""
    names = {_EMBEDDING: "shared.weight"}
    if not config.logits_via_embedding:
        names[_LOGITS] = "lm_head.weight"
    for stack, num_layers in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        names[f"{stack}/{stack}_norm/scale"] = f"{stack}.final_layer_norm.weight"
        for i in range(num_layers):
            names |= _layer_names(config, stack, i)
    return names


def _layer_names(config: t5.T5Config, stack: str, i: int) -> dict[str, str]:
    names = {}
    ours = f"{stack}/layers_{i}"
    for j, (block, theirs) in enumerate(_BLOCKS[stack]):
        layer = f"{stack}.block.{i}.layer.{j}"
        theirs = _ENCODER_BLOCKS[config.encoder_attention] if block == "attention" else theirs
        names[f"{ours}/{_NORMS[block]}/scale"] = f"{layer}.layer_norm.weight"
        if block == "mlp" and config.moe is not None:
            is_sparse = i % config.moe.every == config.moe.every - 1
            names |= switch.mlp_names(config, ours, layer, is_sparse=is_sparse)
            continue
        if block == "mlp":
            is_gated = len(config.mlp_activations) > 1
            parts = {name: name for name in (("wi_0", "wi_1") if is_gated else ("wi",))} | {"wo": "wo"}
        else:
            parts = _PROJECTIONS
        for name, their_name in parts.items():
            names[f"{ours}/{block}/{name}/kernel"] = f"{layer}.{theirs}.{their_name}.weight"
    has_own = stack == "encoder"
    attention = _ENCODER_BLOCKS[config.encoder_attention if has_own else "full"]
    tables = {"relpos_bias": "relative_attention_bias"}
    if has_own and config.encoder_attention == "transient_global":
        tables["global_relpos_bias"] = "global_relative_attention_bias"
        norm = f"{stack}.block.{i}.layer.0.{attention}.global_input_layer_norm.weight"
        names[f"{ours}/global_input_layer_norm/scale"] = norm
    if config.relative_bias_per_layer or i == 0:
        owner = ours if config.relative_bias_per_layer else stack
        for name, their_name in tables.items():
            table = f"{stack}.block.{i}.layer.0.{attention}.{their_name}.weight"
            names[f"{owner}/{name}/rel_embedding"] = table
    return names


def _is_transposed(path: str) -> bool:
    return path.endswith(("/kernel", "/rel_embedding"))


# --- Reading ----------------------------------------------------------------------------------------------


def read(directory: str | pathlib.Path) -> Weights:
    """Open a folder written by save_pretrained. No tensor is read yet.

    Whether the logits are tied is decided by the tensors: transformers has written tie_word_embeddings both
    ways for either. Shared but unscaled logits become untied ones with a copy of the embedding. Raises ValueError naming file and tensor where something does not fit.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{str(directory)!r} holds no config.json; give a folder that save_pretrained wrote."
        )
    theirs = json.loads(path.read_text("utf-8"))
    tensors = dict(_tensors(directory))
    config = _config(theirs, tensors, path)
    for name in _COPIES:
        if name in tensors and not _is_same(tensors.pop(name), tensors["shared.weight"]):
            raise ValueError(
                f"{name} of {str(directory)!r} differs from shared.weight; one table is supported."
            )
    names = tensor_names(config)
    if config.logits_via_embedding:
        tensors.pop("lm_head.weight", None)  # a copy of shared.weight
    elif theirs.get("tie_word_embeddings", True):
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    _check_names(names, tensors, directory)
    leaves = {ours: _turned(ours, tensors[name]) for ours, name in names.items()}
    leaves = switch.joined(leaves)
    origin = {"format": "huggingface", "name": directory.name, "config": theirs}
    weights = Weights(config, leaves, origin, decoding=_decoding(directory, theirs))
    return checked(weights, source=repr(str(directory)))._replace(vocabulary=_vocabulary(directory))


def _turned(path: str, leaf: Leaf) -> Leaf:
    """Turn a leaf between torch's layout and ours."""
    return lazy.transposed(leaf) if _is_transposed(path) else leaf


def _is_same(one: Leaf, other: Leaf) -> bool:
    """Tell whether two tensors are equal bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = f"uint{8 * one.dtype.itemsize}"
    return np.array_equal(np.asarray(one).view(bits), np.asarray(other).view(bits))


def _decoding(directory: pathlib.Path, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the beam search that generate() runs: generation_config.json, or what old config.json hold."""
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else theirs
    early = settings.get("early_stopping") or False
    decoding: dict[str, Any] = {
        "normaliser": "huggingface",
        "stopping": {False: "huggingface", True: "huggingface_early", "never": "huggingface_never"}[early],
        "alpha": float(1.0 if settings.get("length_penalty") is None else settings["length_penalty"]),
    }
    return decoding | ({"num_beams": n} if (n := settings.get("num_beams") or 1) > 1 else {})


def _check_names(names: Mapping[str, str], tensors: Mapping[str, Any], directory: pathlib.Path) -> None:
    missing = sorted(set(names.values()) - tensors.keys())
    surplus = sorted(tensors.keys() - set(names.values()))
    if missing or surplus:
        raise ValueError(
            f"The tensors in {str(directory)!r} are not those of its config.json: missing {missing[:5]} "
            f"({len(missing)}), surplus {surplus[:5]} ({len(surplus)})."
        )


def _config(theirs: Mapping[str, Any], tensors: Mapping[str, Leaf], path: pathlib.Path) -> t5.T5Config:
    """Translate config.json; what contradicts the tensors is an error."""
    kind = theirs.get("model_type", "")
    if kind not in MODEL_TYPES:
        raise tree.unknown_name(f"model_type in {str(path)!r}", str(kind), MODEL_TYPES)
    is_sparse = kind == switch.MODEL_TYPE
    feed_forward = theirs.get("feed_forward_proj", "relu")
    if not is_sparse and feed_forward not in _FEED_FORWARD:
        raise tree.unknown_name(f"feed_forward_proj in {str(path)!r}", str(feed_forward), list(_FEED_FORWARD))
    if (epsilon := theirs.get("layer_norm_epsilon", 1e-6)) != 1e-6:
        raise ValueError(f"layer_norm_epsilon {epsilon} in {str(path)!r} is not supported, only 1e-06.")
    if "shared.weight" not in tensors:
        raise ValueError(f"No tensor 'shared.weight' beside {str(path)!r}.")
    rows = tensors["shared.weight"].shape[0]
    if theirs.get("vocab_size", rows) != rows:
        raise ValueError(
            f"{str(path)!r} says vocab_size {theirs['vocab_size']}, but 'shared.weight' has shape "
            f"{tensors['shared.weight'].shape}."
        )
    return t5.T5Config(
        vocab_size=rows,
        emb_dim=theirs["d_model"],
        num_heads=theirs["num_heads"],
        head_dim=theirs["d_kv"],
        mlp_dim=theirs["d_ff"],
        num_encoder_layers=theirs["num_layers"],
        num_decoder_layers=theirs.get("num_decoder_layers") or theirs["num_layers"],
        logits_via_embedding=_is_shared(tensors) and _is_scaled(theirs),
        relative_attention_num_buckets=theirs.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=theirs.get("relative_attention_max_distance", 128),
        relative_bias_per_layer=kind == "umt5",
        **(
            switch.fields(theirs, repr(str(path)))
            if is_sparse
            else {"mlp_activations": _FEED_FORWARD[feed_forward]}
        ),
        **_long_attention(theirs, path),
    )


def _long_attention(theirs: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Translate what LongT5's config.json says of its encoder."""
    if theirs["model_type"] != "longt5":
        return {}
    ours = {name: kind for kind, name in _ENCODER_ATTENTION.items()}
    kind = theirs.get("encoder_attention_type", "local")
    if kind not in ours:
        raise tree.unknown_name(f"encoder_attention_type in {str(path)!r}", str(kind), list(ours))
    return {
        "encoder_attention": ours[kind],
        "local_radius": theirs.get("local_radius", 127),
        "global_block_size": theirs.get("global_block_size", 16),
    }


def _is_shared(tensors: Mapping[str, Leaf]) -> bool:
    """Tell whether logits come from the embedding: no lm_head, or a copy."""
    head = tensors.get("lm_head.weight")
    return head is None or _is_same(head, tensors["shared.weight"])


def _is_scaled(theirs: Mapping[str, Any]) -> bool:
    """Tell whether the hidden states before shared logits are scaled, by 1/sqrt(d_model).

    transformers 4 scales those of T5 and mT5 that it calls tied; 5 has a key for T5, and scales no other.
    """
    if theirs["model_type"] == "umt5":
        return False
    if "scale_decoder_outputs" in theirs:
        return bool(theirs["scale_decoder_outputs"])
    if theirs["model_type"] == "mt5" and int(str(theirs.get("transformers_version", "4")).split(".")[0]) >= 5:
        return False
    return bool(theirs.get("tie_word_embeddings", True))


def _tensors(directory: pathlib.Path) -> Iterator[tuple[str, LazyArray]]:
    """Open the tensors of one file or of all shards of an index."""
    if (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"]
        for file in sorted(set(index.values())):
            if not (directory / file).is_file():
                raise ValueError(f"{str(directory / file)!r} is missing; {INDEX} puts tensors there.")
            found = dict(_opened(directory / file))
            if lost := sorted(name for name, where in index.items() if where == file and name not in found):
                raise ValueError(f"{str(directory / file)!r} lacks {lost[:5]}, which {INDEX} puts there.")
            yield from found.items()
    elif (directory / SINGLE).is_file():
        yield from _opened(directory / SINGLE)
    else:
        found = sorted(path.name for path in directory.glob("*.bin"))
        hint = " Only safetensors are read; save the model anew with a current transformers." if found else ""
        raise ValueError(f"{str(directory)!r} holds neither {SINGLE} nor {INDEX}.{hint}")


def _opened(path: pathlib.Path) -> Iterator[tuple[str, LazyArray]]:
    """Open the tensors of one safetensors file: 8 bytes of header size, the header in JSON, the data."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # checks the header, and that the file is as long as it says
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is damaged or truncated: {error}") from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"Tensor {name!r} of {str(path)!r} is {entry['dtype']}; known: {sorted(_DTYPES)}."
            )
        dtype = _DTYPES[entry["dtype"]]
        read = functools.partial(
            _read_tensor, path, dtype, entry["shape"], offset=8 + size + entry["data_offsets"][0]
        )
        yield name, LazyArray(entry["shape"], dtype, read)


def _read_tensor(path: pathlib.Path, dtype: Any, shape: Sequence[int], *, offset: int) -> np.ndarray:
    array = np.fromfile(path, dtype, count=math.prod(shape), offset=offset)
    return array.reshape(shape)


def _vocabulary(directory: pathlib.Path) -> vocabulary.Vocabulary | None:
    """Open the tokenizer's SentencePiece model, or the bytes of ByT5; None where the folder has neither."""
    path = directory / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if (directory / VOCABULARY).is_file():
        return vocabulary.sentencepiece(directory / VOCABULARY, tokenizer.get("extra_ids", 100))
    if tokenizer.get("tokenizer_class") == "ByT5Tokenizer":
        return vocabulary.byte(tokenizer.get("extra_ids", 125))
    return None


# --- Writing ----------------------------------------------------------------------------------------------


def write(weights: Weights, directory: str | pathlib.Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a folder that transformers' from_pretrained opens, tensor by tensor.

    A folder that came from Hugging Face keeps its config.json but for what conversion changed.
    """
    directory = pathlib.Path(directory)
    their_config, names = _their_config(weights), tensor_names(weights.config)
    leaves, sources = switch.apart(weights.leaves), {name: ours for ours, name in names.items()}
    if weights.config.moe is not None and not weights.config.logits_via_embedding:
        sources |= dict.fromkeys(_COPIES, _EMBEDDING)  # an untied Switch shares no table either
    shards: list[dict[str, str]] = [{}]
    size = 0
    for name, ours in sorted(sources.items()):
        if shards[-1] and size + leaves[ours].nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = ours
        size += leaves[ours].nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors({name: _turned(ours, leaves[ours]) for name, ours in shard.items()}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(leaves[ours].nbytes for ours in sources.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    text = json.dumps(their_config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, "utf-8")
    _write_tokenizer(weights.vocabulary, directory)


def _write_tokenizer(vocabulary: vocabulary.Vocabulary | None, directory: pathlib.Path) -> None:
    if vocabulary is None:
        return
    is_byte = vocabulary.kind == "byte"
    if not is_byte:
        (directory / VOCABULARY).write_bytes(vocabulary.model)
    tokenizer = {
        "tokenizer_class": "ByT5Tokenizer" if is_byte else "T5Tokenizer",
        "extra_ids": vocabulary.extra_ids,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", "utf-8")


def _write_tensors(tensors: Mapping[str, Leaf], path: pathlib.Path) -> None:
    """Write one safetensors file; one tensor is in memory at a time."""
    codes = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order, end = lazy.in_order(tensors), 0
    for name in order:
        leaf = tensors[name]
        start, end = end, end + leaf.nbytes
        header[name] = {"dtype": codes[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            np.ascontiguousarray(tensors[name]).tofile(file)


def _their_config(weights: Weights) -> dict[str, Any]:
    config, origin = weights.config, weights.origin
    proj = {ours: name for name, ours in reversed(_FEED_FORWARD.items())}
    if config.moe is None and config.mlp_activations not in proj:
        raise ValueError(f"Hugging Face's T5 has no feed-forward block with {config.mlp_activations}.")
    if config.decoder_kv_heads not in (None, config.num_heads):
        raise ValueError("Hugging Face's T5 has no grouped queries (decoder_kv_heads).")
    check_plain_decoder(config, "Hugging Face's T5")
    if config.relative_bias_per_layer and config.logits_via_embedding:
        raise ValueError("Hugging Face's UMT5 does not scale tied logits as ours are: not convertible.")
    kept = dict(origin["config"]) if origin.get("format") == "huggingface" else {}
    kept.pop("torch_dtype", None)  # the older name of dtype
    is_long = config.encoder_attention != "full"
    if is_long and config.relative_bias_per_layer:
        raise ValueError("Hugging Face's LongT5 has one table of relative biases a stack, not one a layer.")
    if config.moe is not None and (is_long or config.relative_bias_per_layer):
        raise ValueError(
            "Hugging Face's Switch Transformers have full attention and one table of biases a stack."
        )
    kind = "longt5" if is_long else "umt5" if config.relative_bias_per_layer else "t5"
    kind = kind if config.moe is None else switch.MODEL_TYPE
    defaults = {
        "model_type": kind,
        "architectures": [f"{_CLASSES.get(kind, kind.upper())}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": config.dropout_rate,
        **({"feed_forward_proj": proj[config.mlp_activations]} if config.moe is None else {}),
    }
    dtypes = {leaf.dtype.name for leaf in weights.leaves.values()}
    sizes = {
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "tie_word_embeddings": config.logits_via_embedding,
        "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
    }
    if is_long:
        sizes |= {
            "encoder_attention_type": _ENCODER_ATTENTION[config.encoder_attention],
            "local_radius": config.local_radius,
            "global_block_size": config.global_block_size,
        }
    if config.moe is not None:
        sizes |= switch.their_fields(config, kept)
    if "scale_decoder_outputs" in kept:
        kept["scale_decoder_outputs"] = config.logits_via_embedding
    return defaults | kept | sizes
