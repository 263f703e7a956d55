"""`mtjax vocab`: train a SentencePiece vocabulary on the text of a mixture."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mtjax.launch import flags

EXAMPLES = """
example:
  mtjax vocab --mixture=python_docs --size=8000 --output=runs/vocab.model
  mtjax cache --mixture=python_docs --vocabulary=runs/vocab.model

Ids as in T5: pad 0, end of sequence 1, unknown 2; the sentinels <extra_id_0>, ... lie on top of the model's
pieces (100 of them, or as many as --vocabulary=MODEL:N says).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax vocab`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--mixture", required=True, metavar="NAME", help="mixture or task whose text is read")
    parser.add_argument("--output", required=True, metavar="FILE", help="where the model is written")
    parser.add_argument("--size", type=int, default=32000, metavar="N", help="pieces (default: %(default)s)")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument(
        "--model_type", choices=["unigram", "bpe"], default="unigram", help="default: %(default)s"
    )
    parser.add_argument(
        "--max_examples",
        type=int,
        default=20000,
        metavar="N",
        help="examples read per task, so that no task drowns the others (default: %(default)s)",
    )
    parser.add_argument(
        "--character_coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the text's characters that get a piece (default: %(default)s)",
    )
    parser.add_argument(
        "--byte_fallback", action="store_true", help="spell other characters in bytes: nothing is unknown"
    )
    parser.add_argument(
        "--normalization",
        choices=["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "identity"],
        default="nmt_nfkc",
        help="as SentencePiece names them; T5 uses the default, %(default)s",
    )
    flags.add_tasks(parser)


def run(args: argparse.Namespace) -> int:
    """Train and write the vocabulary."""
    # The text is read before any tokenizer; bytes need no model, which would be what we are about to make.
    os.environ["MTJAX_VOCABULARY"] = args.vocabulary = "byte"
    output = Path(args.output)
    if output.is_dir():
        raise ValueError(f"--output={output} is a directory; name a file, e.g. {output / 'vocab.model'}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    flags.import_tasks(args)
    from mtjax.launch import registry, screen

    tasks = registry.tasks_of(registry.lookup(args.mixture))
    tasks = [task for task in tasks if args.split in task.splits]
    if not tasks:
        raise ValueError(f"No task of {args.mixture!r} has a split {args.split!r}.")
    with screen.progress("reading text") as update:
        lines = list(_lines(tasks, args.split, max_examples=args.max_examples, update=update))
    characters = sum(map(len, lines))
    print(
        f"{characters:,} characters from {len(tasks)} tasks; training {args.size:,} pieces ...",
        file=sys.stderr,
    )
    model = train(
        lines,
        size=args.size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        byte_fallback=args.byte_fallback,
        normalization=args.normalization,
    )
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(model)
    partial.replace(output)
    _report(output, lines)
    return 0


def _lines(
    tasks: Sequence[Any], split: str, *, max_examples: int, update: Callable[[int, int, str], None]
) -> Iterator[str]:
    """Yield the non-empty lines of all tasks' inputs and targets."""
    from mtjax.launch import registry

    for i, task in enumerate(tasks):
        update(i, len(tasks), task.name)
        for text in itertools.islice(registry.example_texts(task, split), 2 * max_examples):
            yield from (line for line in text.splitlines() if line.strip())
    update(len(tasks), len(tasks), "")


def train(
    lines: Sequence[str],
    *,
    size: int,
    model_type: str = "unigram",
    character_coverage: float = 0.9995,
    byte_fallback: bool = False,
    normalization: str = "nmt_nfkc",
) -> bytes:
    """Train a SentencePiece model in T5's layout and return it serialised.

    Raises ValueError where the text cannot fill, or does not fit, `size` pieces.
    """
    import io

    import sentencepiece

    if not lines:
        raise ValueError("There is no text to train a vocabulary on: every input and target is empty.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            normalization_rule_name=normalization,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            max_sentence_length=1 << 16,  # longer lines would be left out in silence
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        at_most = re.search(r"value <= (\d+)", str(error))
        at_least = re.search(r"smaller than required_chars\S*\s*(?:\(?)(\d+)", str(error))
        if at_most:
            fix = f"This text yields at most {at_most[1]} pieces: use --size={at_most[1]} or less, or more text."
        elif at_least:
            fix = "Each character needs a piece: raise --size, or lower --character_coverage."
        else:
            fix = f"SentencePiece says: {error}"
        raise ValueError(f"--size={size} does not work. {fix}") from error
    return model.getvalue()


def _report(output: Path, lines: Sequence[str]) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    sample = lines[:: max(1, len(lines) // 2000)]
    pieces = sum(len(ids) for ids in processor.encode(list(sample)))
    unknown = sum(ids.count(processor.unk_id()) for ids in processor.encode(list(sample)))
    print(
        f"{output}: {processor.get_piece_size():,} pieces, {sum(map(len, sample)) / pieces:.2f} characters a piece, "
        f"{unknown / pieces:.3%} unknown. Next: mtjax cache --vocabulary={output} ..."
    )
