"""`mtjax bench decode`: seconds to decode greedily and by beam search, beside transformers on the same weights."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = """
example of decode (with `pip install mtjax[interop]` beside transformers' generate):
  mtjax bench decode --gin_file=models/t5_1_1_small.gin --gin_file=runs/pretrain.gin --gin.ACTIVATION_DTYPE=float32
  mtjax bench decode --gin_file=runs/finetune.gin --gin.INITIAL_CHECKPOINT_PATH=hf:flan-t5-small --json

Random inputs; nothing ends early, so that all decode --output_length tokens. Both sides take turns in one
process. A row of --json: mode, batch, seconds and tokens_per_s (medians of --repeats turns), compile_s, and
where transformers is installed transformers_s, speedup (the median of the turns' ratios) and same_tokens, the
share of rows that both decode alike.
"""
BATCHES = (1, 32)
NUM_BEAMS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax bench decode`."""
    group = parser.add_argument_group("decode")
    group.add_argument("--input_length", type=int, default=128, metavar="N", help="default: %(default)s")
    group.add_argument("--output_length", type=int, default=64, metavar="N", help="default: %(default)s")
    group.add_argument("--repeats", type=int, default=5, metavar="N", help="turns (default: %(default)s)")
    group.add_argument(
        "--alone", action="store_true", help="leave transformers out, as where it is not installed"
    )


class _Timed(NamedTuple):
    seconds: list[float]
    tokens: Any


def run(args: argparse.Namespace, arguments: Mapping[str, Any]) -> int:
    """Measure and print; `arguments` are those of train.fit."""
    import jax

    for name in ("input_length", "output_length", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    model = arguments["model"]
    params = _parameters(model, arguments.get("initial_checkpoint"))
    theirs = None if args.alone else _transformers(model, params)
    rows = [
        _measure(args, model, jax.device_put(params), theirs, mode=mode, batch_size=batch_size)
        for mode in ("greedy", f"beam-{NUM_BEAMS}")
        for batch_size in BATCHES
    ]
    if args.json:
        print(
            json.dumps({"input_length": args.input_length, "output_length": args.output_length, "rows": rows})
        )
    else:
        _print(args, rows)
    return 0


def _parameters(model: Any, initial_checkpoint: str | None) -> Any:
    import jax

    from mtjax import checkpoint

    if initial_checkpoint is None:
        return jax.jit(model.init)(jax.random.key(0))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return checkpoint.restore_parameters(initial_checkpoint, abstract)


def _transformers(model: Any, params: Any) -> Any:
    """Open the same weights in transformers; None where it is not installed or knows no such model."""
    import numpy as np

    from mtjax import convert, tree
    from mtjax.convert import huggingface, weights

    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    found = convert.Weights(model.config, weights.unstacked(model.config, leaves), {})
    with tempfile.TemporaryDirectory(prefix="mtjax-") as folder:
        huggingface.write(found, Path(folder))
        opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    opened.generation_config.eos_token_id = None
    return opened.eval()


def _measure(
    args: argparse.Namespace, model: Any, params: Any, theirs: Any, *, mode: str, batch_size: int
) -> dict[str, Any]:
    import numpy as np

    inputs = np.random.default_rng(0).integers(2, model.config.vocab_size, (batch_size, args.input_length))
    turns: list[Callable[[], Any]] = [_ours(args, model, params, mode=mode, inputs=inputs)]
    if theirs is not None:
        turns.append(_theirs(args, theirs, mode=mode, inputs=inputs))
    started = time.perf_counter()
    turns[0]()
    compile_s = time.perf_counter() - started
    for turn in turns[1:]:
        turn()
    found = _take_turns(turns, args.repeats)
    ours = found[0]
    seconds = statistics.median(ours.seconds)
    row: dict[str, Any] = {
        "mode": mode,
        "batch": batch_size,
        "seconds": seconds,
        "tokens_per_s": batch_size * args.output_length / seconds,
        "compile_s": compile_s - seconds,
    }
    if theirs is not None:
        ratios = [b / a for a, b in zip(ours.seconds, found[1].seconds, strict=True)]
        row |= {
            "transformers_s": statistics.median(found[1].seconds),
            "speedup": statistics.median(ratios),
            "same_tokens": float((np.asarray(ours.tokens) == found[1].tokens).all(-1).mean()),
        }
    return row


def _take_turns(turns: list[Callable[[], Any]], repeats: int) -> list[_Timed]:
    """Time every turn `repeats` times, one after the other each time, so that all see the same machine."""
    found = [_Timed([], turn()) for turn in turns]
    for _ in range(repeats):
        for turn, timed in zip(turns, found, strict=True):
            started = time.perf_counter()
            turn()
            timed.seconds.append(time.perf_counter() - started)
    return found


def _ours(args: argparse.Namespace, model: Any, params: Any, *, mode: str, inputs: Any) -> Callable[[], Any]:
    import functools

    import jax
    import jax.numpy as jnp

    from mtjax import decode

    batch = {"encoder_input_tokens": jnp.asarray(inputs, jnp.int32)}
    never = model.config.vocab_size
    if mode == "greedy":
        search = functools.partial(decode.greedy, model, max_length=args.output_length, eos_id=never)
    else:
        search = functools.partial(
            decode.beam_search,
            model,
            max_length=args.output_length,
            num_beams=NUM_BEAMS,
            eos_id=never,
            normaliser=decode.huggingface_length(1.0),
            stopping=decode.huggingface_stopping(),
        )
    call = jax.jit(search)

    def turn() -> Any:
        tokens = jax.device_get(call(params, batch).tokens)
        return tokens if mode == "greedy" else tokens[:, 0]

    return turn


def _theirs(args: argparse.Namespace, theirs: Any, *, mode: str, inputs: Any) -> Callable[[], Any]:
    import torch  # pyright: ignore[reportMissingImports]

    ids = torch.tensor(inputs)
    settings = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "num_beams": 1 if mode == "greedy" else NUM_BEAMS,
        "max_new_tokens": args.output_length,
    }

    def turn() -> Any:
        with torch.inference_mode():
            return theirs.generate(ids, **settings).numpy()[:, 1:]

    return turn


def _print(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from mtjax.launch import screen

    title = f"decode {args.output_length} tokens after {args.input_length}"
    columns = list(rows[0])
    screen.console().print(screen.table(title, columns, [[row[name] for name in columns] for row in rows]))
    if "transformers_s" not in rows[0]:
        print("Without transformers beside it (pip install mtjax[interop]).")
