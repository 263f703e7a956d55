"""Write switch: a small random Switch Transformer and its outputs, by transformers.

    python tests/golden/huggingface/make_switch.py        # transformers 5.23.0, torch 2.13.0, CPU

Run it anew only for another set of cases; what our model computes never changes these files.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "switch"
LENGTHS = (24, 17, 9, 3)  # of the rows
SMALL_CAPACITY = 4  # tokens of a row that an expert takes; the folder's own config drops none
SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "expert_capacity": 64,
    "dense_act_fn": "relu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def main() -> None:
    """Write the model and what it gives for one batch."""
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**SIZES)
    ).eval()
    with torch.no_grad():  # norms and biases start alike
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    inputs = rng.integers(3, 96, (len(LENGTHS), max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    targets = rng.integers(3, 96, inputs.shape)
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    tensors = {"input_ids": torch.tensor(inputs * mask), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        said = model(**tensors, decoder_input_ids=torch.tensor(shifted), labels=torch.tensor(targets))
        greedy = model.generate(**tensors, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for module in model.modules():
            if hasattr(module, "expert_capacity"):
                module.expert_capacity = SMALL_CAPACITY
        dropping = model(**tensors, decoder_input_ids=torch.tensor(shifted))
    assert not torch.allclose(said.logits, dropping.logits)
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink()
    np.savez_compressed(
        FOLDER / "expected.npz",
        input_ids=inputs * mask,
        decoder_input_ids=shifted,
        labels=targets,
        logits=said.logits.numpy(),
        loss=said.loss.numpy(),
        greedy_sequences=greedy.numpy(),
        small_capacity=SMALL_CAPACITY,
        dropping_logits=dropping.logits.numpy(),
    )


if __name__ == "__main__":
    main()
