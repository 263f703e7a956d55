"""`mtjax infer`: JSON lines in, JSON lines with a prediction or score out, in the same order."""

from __future__ import annotations

import argparse

from mtjax.launch import model_dir

EXAMPLES = """
examples:
  mtjax infer --model_dir=runs/first --input=questions.jsonl --output=answers.jsonl
  mtjax infer --model_dir=runs/first --mode=score --input=pairs.jsonl --output=scores.jsonl

A line has `inputs`, to be scored also `targets`, to be ranked (--decode=rank) `choices`, and may name its
`task`, one that the checkpoint was trained on. The output keeps all fields and adds `prediction`, or `score`,
the log-probability of the targets in nats. The same command goes on where a killed one stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax infer`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON lines to read")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument(
        "--mode", default="predict", metavar="MODE", help="predict, or score the line's targets"
    )
    parser.add_argument(
        "--checkpoint", default="latest", metavar="STEP", help="latest, best, or a step (default: latest)"
    )
    model_dir.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Predict or score a file."""
    import dataclasses

    from mtjax import infer, tree
    from mtjax.launch import screen

    if args.mode not in infer.ADDED:
        raise tree.unknown_name("mode", args.mode, list(infer.ADDED))
    opened = model_dir.open_run(args)
    if args.checkpoint == "all" or len(steps := model_dir.chosen_steps(opened, args.checkpoint)) != 1:
        raise ValueError(f"--checkpoint={args.checkpoint} is not one checkpoint.")
    codec = infer.text_codec(opened.directory, opened.data.lengths)
    params, meta = model_dir.restore(opened, steps[0])
    predictor = model_dir.predictor(opened, args)
    settings = {
        "model_dir": str(opened.directory.resolve()),
        "step": steps[0],
        "batch_size": opened.data.batch_size,
        "gin_bindings": args.gin_bindings,
    }
    if args.mode == "predict":
        settings |= dataclasses.asdict(predictor.config)
    with screen.progress(args.mode) as update:
        summary = infer.infer(
            predictor,
            params,
            input_path=args.input,
            output_path=args.output,
            mode=args.mode,
            codec=codec,
            batch_size=opened.data.batch_size,
            task_ids=model_dir.task_ids(opened, meta),
            settings=settings,
            progress=update,
        )
    print(f"{summary.lines} lines in {args.output}, {summary.done_before} of them from an earlier run")
    if summary.cut_inputs:
        print(f"{summary.cut_inputs} inputs were longer than {opened.data.lengths['inputs']} tokens, and cut")
    if summary.unknown_tasks:
        hint = tree.unknown_name("task", summary.first_unknown, list(model_dir.task_ids(opened, meta)))
        print(
            f"{summary.unknown_tasks} lines name a task that the checkpoint was not trained on, and were answered "
            f"without one. {hint}"
        )
    return 0
