"""Write longt5_local and longt5_tglobal: small random LongT5s and their outputs, by transformers.

    python tests/golden/huggingface/make_longt5.py        # transformers 5.23.0, torch 2.13.0, CPU

Run it anew only for another set of cases; what our model computes never changes these files.
"""

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
LENGTHS = (37, 24, 18, 3)  # of the rows; 3 is shorter than a global block
SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "feed_forward_proj": "gated-gelu",
    "local_radius": 4,
    "global_block_size": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def make(name: str, attention: str, *, tied: bool) -> None:
    """Write one model and what it gives for one batch."""
    torch.manual_seed(0)
    config = transformers.LongT5Config(**SIZES, encoder_attention_type=attention, tie_word_embeddings=tied)
    model = transformers.LongT5ForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms and biases start alike
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    rng = np.random.default_rng(0)
    inputs = rng.integers(3, 96, (len(LENGTHS), max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    targets = rng.integers(3, 96, (len(LENGTHS), 6))
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    tensors = {
        "input_ids": torch.tensor(inputs * mask),
        "attention_mask": torch.tensor(mask),
    }
    with torch.no_grad():
        said = model(**tensors, decoder_input_ids=torch.tensor(shifted), labels=torch.tensor(targets))
        greedy = model.generate(**tensors, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    np.savez_compressed(
        folder / "expected.npz",
        input_ids=inputs * mask,
        decoder_input_ids=shifted,
        labels=targets,
        encoded=said.encoder_last_hidden_state.numpy() * mask[..., None],
        logits=said.logits.numpy(),
        loss=said.loss.numpy(),
        greedy_sequences=greedy.numpy(),
    )


if __name__ == "__main__":
    make("longt5_local", "local", tied=True)
    make("longt5_tglobal", "transient-global", tied=False)
