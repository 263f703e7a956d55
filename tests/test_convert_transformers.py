"""Conversion beside transformers itself: random models of every class, both directions. Needs mtjax[interop]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import convert, decode, tree
from mtjax.convert import huggingface
from mtjax.models import moe, routers, t5

torch = pytest.importorskip("torch", reason="pip install mtjax[interop]")
transformers = pytest.importorskip("transformers", reason="pip install mtjax[interop]")
pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 200,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS = {
    "t5 1.0": ("T5", {"feed_forward_proj": "relu"}),
    "t5 1.1, shared but not scaled": ("T5", GATED),
    "t5 1.1, flan: untied": ("T5", GATED),
    "mt5": ("MT5", GATED),
    "mt5 untied": ("MT5", GATED),
    "umt5 untied": ("UMT5", GATED),
    "umt5": ("UMT5", GATED),
    "byt5": ("T5", {**GATED, "num_layers": 3, "num_decoder_layers": 1}),
    "silu": ("T5", {**GATED, "feed_forward_proj": "gated-silu"}),
}


def random_model(name):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():  # norms and biases start alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if name.endswith("untied"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def batch():
    rng = np.random.default_rng(0)
    return rng.integers(3, 200, (3, 11)), rng.integers(3, 200, (3, 7))


def their_logits(model, inputs, targets):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(targets), use_cache=False
        ).logits.numpy()


def ours(weights, inputs, targets):
    model = t5.t5(weights.config)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree.unflatten(weights.leaves))
    features = {
        "encoder_input_tokens": jnp.asarray(inputs, jnp.int32),
        "decoder_input_tokens": jnp.asarray(targets, jnp.int32),
        "decoder_target_tokens": jnp.ones(targets.shape, jnp.int32),
    }
    return model, params, features


def check_beams(theirs, model, params, features):
    """Compare four beams by each rule of generate()."""
    inputs = torch.tensor(np.asarray(features["encoder_input_tokens"]))
    for early_stopping, alpha in [(False, 1.0), (True, 2.0), ("never", 0.6)]:
        with torch.no_grad():
            wanted = theirs.generate(
                inputs,
                max_new_tokens=8,
                num_beams=4,
                num_return_sequences=4,
                do_sample=False,
                early_stopping=early_stopping,
                length_penalty=alpha,
                return_dict_in_generate=True,
                output_scores=True,
            )
        with jax.default_matmul_precision("highest"):
            found = decode.beam_search(
                model,
                params,
                features,
                max_length=8,
                normaliser=decode.huggingface_length(alpha),
                stopping=decode.huggingface_stopping(early_stopping, alpha=alpha),
            )
        tokens = wanted.sequences.numpy()[:, 1:].reshape(len(inputs), 4, -1)
        has_ended = np.cumsum(tokens == 1, axis=-1) - (tokens == 1) > 0
        tokens = np.where(has_ended, 0, tokens)  # transformers fills up with EOS where padding is 0
        np.testing.assert_array_equal(found.tokens[..., : tokens.shape[-1]], tokens)
        scores = wanted.sequences_scores.numpy().reshape(len(inputs), 4)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_both_directions_give_the_same_outputs(name, tmp_path):
    theirs, (inputs, targets) = random_model(name), batch()
    theirs.save_pretrained(tmp_path / "theirs")
    weights = huggingface.read(tmp_path / "theirs")
    model, params, features = ours(weights, inputs, targets)
    with jax.default_matmul_precision("highest"):
        logits_BLV = np.asarray(model.apply(params, features).logits_BLV)
        greedy = decode.greedy(model, params, features, max_length=8)
    wanted_BLV = their_logits(theirs, inputs, targets)
    is_misscaled = name.startswith("umt5") and int(transformers.__version__.split(".")[0]) >= 5
    if is_misscaled:
        wanted_BLV = wanted_BLV * SIZES["d_model"] ** 0.5  # its version 5 scales them by mistake
    np.testing.assert_allclose(logits_BLV, wanted_BLV, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        generated = theirs.generate(torch.tensor(inputs), max_new_tokens=8, do_sample=False).numpy()[:, 1:]
    np.testing.assert_array_equal(greedy.tokens[:, : generated.shape[1]], generated)
    if not is_misscaled:  # greedy tokens do not change with the scale, beams do
        check_beams(theirs, model, params, features)

    convert.write_model_directory(weights, tmp_path / "ours")
    again = tmp_path / "again"
    again.mkdir()
    huggingface.write(convert.read_model_directory(tmp_path / "ours"), again)
    back = type(theirs).from_pretrained(again).eval()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key
    np.testing.assert_array_equal(their_logits(back, inputs, targets), their_logits(theirs, inputs, targets))


def test_a_model_of_ours_opens_in_transformers(tmp_path):
    config = t5.T5Config(
        vocab_size=64,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=2,
    )
    params = t5.t5(config).init(jax.random.key(0))
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    huggingface.write(convert.Weights(config, leaves, {}), tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    inputs, targets = (1 + ids % 63 for ids in batch())  # 0 is padding
    _, _, features = ours(convert.Weights(config, leaves, {}), inputs, targets)
    with jax.default_matmul_precision("highest"):
        logits_BLV = t5.t5(config).apply(params, features).logits_BLV
    np.testing.assert_allclose(logits_BLV, their_logits(model, inputs, targets), atol=1e-4)


def test_switch_transformers_in_both_directions(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}
    theirs = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**sizes, num_decoder_layers=2)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    inputs, targets = batch()
    weights = huggingface.read(tmp_path / "theirs")
    model, params, features = ours(weights, inputs, targets)
    with jax.default_matmul_precision("highest"):
        logits_BLV = np.asarray(model.apply(params, features).logits_BLV)
        greedy = decode.greedy(model, params, features, max_length=8)
    np.testing.assert_allclose(logits_BLV, their_logits(theirs, inputs, targets), atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        generated = theirs.generate(torch.tensor(inputs), max_new_tokens=8, do_sample=False).numpy()[:, 1:]
    np.testing.assert_array_equal(greedy.tokens[:, : generated.shape[1]], generated)
    convert.write_model_directory(weights, tmp_path / "ours")
    (tmp_path / "again").mkdir()
    huggingface.write(convert.read_model_directory(tmp_path / "ours"), tmp_path / "again")
    back = type(theirs).from_pretrained(tmp_path / "again").eval()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key


def test_a_sparse_model_of_ours_opens_in_transformers(tmp_path):
    sparse = moe.MoeConfig(4, 2, encoder_router=routers.Switch(), decoder_router=routers.Switch())
    config = t5.T5Config(
        vocab_size=64,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=4,
        num_decoder_layers=2,
        mlp_activations=("gelu",),
        moe=sparse,
    )
    params = t5.t5(config).init(jax.random.key(0))
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    huggingface.write(convert.Weights(config, leaves, {}), tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    inputs, targets = (1 + ids % 63 for ids in batch())  # 0 is padding
    _, _, features = ours(convert.Weights(config, leaves, {}), inputs, targets)
    with jax.default_matmul_precision("highest"):
        logits_BLV = t5.t5(config).apply(params, features).logits_BLV
    np.testing.assert_allclose(logits_BLV, their_logits(model, inputs, targets), atol=1e-4)
