"""`mtjax eval`: checkpoints of a run → results a task, predictions, a table and a plot."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from mtjax.launch import flags, model_dir

EXAMPLES = """
examples:
  mtjax eval --model_dir=runs/first --split=test
  mtjax eval --model_dir=runs/first --checkpoints=100,200,latest --decode=beam
  mtjax eval --model_dir=runs/first --checkpoints=all --watch      beside a training that goes on
  mtjax eval --model_dir=runs/first --mixture=other --decode=rank

Writes MODEL_DIR/eval/MIXTURE.jsonl and .png, and eval/predictions/MIXTURE/STEP-SPLIT-DECODE/TASK.jsonl.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mtjax eval`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--mixture", metavar="NAME", help="cached mixture or task (default: the one trained on)"
    )
    parser.add_argument("--split", default="validation", metavar="NAME", help="default: validation")
    parser.add_argument(
        "--checkpoints",
        default="latest",
        metavar="STEPS",
        help="latest, best, all, or steps between commas (default: latest)",
    )
    parser.add_argument(
        "--max_examples", type=int, metavar="N", help="N of every task, evenly spread (default: all)"
    )
    parser.add_argument("--no_baselines", action="store_true", help="leave out the trivial baselines")
    parser.add_argument("--no_predictions", action="store_true", help="do not write predictions")
    parser.add_argument("--watch", action="store_true", help="go on with new checkpoints until the last step")
    parser.add_argument(
        "--timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="stop watching when no checkpoint comes for so long (default: %(default)g)",
    )
    model_dir.add_arguments(parser)
    flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate the chosen checkpoints; the exit code is 1 where a task failed."""
    if args.max_examples is not None and args.max_examples < 1:
        raise ValueError(f"--max_examples must be at least 1, got {args.max_examples}.")
    from mtjax import tree
    from mtjax.data import cache
    from mtjax.launch import prepare

    folders = [*([args.cache_dir] if args.cache_dir else []), *flags.additional_cache_dirs(args)]
    opened = model_dir.open_run(args, cache_dirs=folders)
    mixture = cache.open_mixture(opened.cache_dirs, args.mixture or opened.data.mixture)
    prepare.warn_of_changes(mixture, opened.cache_dirs)
    predictor = model_dir.predictor(opened, args)
    if without := [task.name for task in mixture.tasks if args.split not in task.splits]:
        kept = tuple(task for task in mixture.tasks if args.split in task.splits)
        if not kept:
            known = sorted({split for task in mixture.tasks for split in task.splits})
            raise tree.unknown_name(f"split of {mixture.name!r}", args.split, known)
        print(f"No split {args.split!r}, so not evaluated: {', '.join(without)}")
        mixture = mixture._replace(tasks=kept)
    baselines: dict[str, Any] = {}
    failed: list[str] = []
    for step in _steps(opened, args):
        results = _evaluate(opened, args, mixture, predictor, step, baselines)
        failed += [f"{result.task} at step {step}: {result.error}" for result in results if result.error]
    _show_series(opened, args, mixture.name)
    print(f"{predictor.num_compilations()} shapes were compiled.")
    if failed:
        print(f"{len(failed)} evaluations failed:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


def _steps(opened: model_dir.Run, args: argparse.Namespace) -> Iterator[int]:
    """Yield the chosen steps and then, watching, every new one up to the end of training."""
    from mtjax import checkpoint, train

    if not args.watch:
        yield from model_dir.chosen_steps(opened, args.checkpoints)
        return
    last = opened.arguments["train_steps"]
    seen = set(checkpoint.checkpoint_steps(opened.directory))
    if seen:
        chosen = model_dir.chosen_steps(opened, args.checkpoints)
        yield from chosen
    while last not in seen and not (
        train.has_finished(opened.directory)
        and seen.issuperset(checkpoint.checkpoint_steps(opened.directory))
    ):
        step = checkpoint.wait_for_new_checkpoint(opened.directory, seen, timeout=args.timeout)
        if step is None:
            print(f"No new checkpoint for {args.timeout:g} s; the last step would be {last}.")
            return
        seen.add(step)
        yield step


def _evaluate(
    opened: model_dir.Run,
    args: argparse.Namespace,
    mixture: Any,
    predictor: Any,
    step: int,
    baselines: dict[str, Any],
) -> Sequence[Any]:
    """Evaluate one checkpoint, write and print its results."""
    import jax

    from mtjax import checkpoint, evaluate
    from mtjax.launch import screen

    try:
        params, meta = model_dir.restore(opened, step)
    except ValueError:
        if not args.watch or step in checkpoint.checkpoint_steps(opened.directory):
            raise
        print(
            f"Step {step} was deleted by the training before it could be read; KEEP_CHECKPOINTS keeps more."
        )
        return []
    model_dir.check_vocabulary(opened, meta, mixture.tasks)
    folder = None
    if not args.no_predictions:
        folder = evaluate.predictions_path(
            opened.directory, mixture.name, step, split=args.split, decode=args.decode
        )
    with screen.progress(f"step {step}") as update:
        results = evaluate.evaluate_mixture(
            opened.model,
            params,
            mixture.tasks,
            split=args.split,
            lengths=opened.data.lengths,
            batch_size=opened.data.batch_size,
            mesh=opened.mesh,
            architecture=opened.data.architecture,
            max_examples=args.max_examples,
            predictions_dir=folder,
            with_baselines=not args.no_baselines
            and any(task.name not in baselines for task in mixture.tasks),
            task_ids=model_dir.task_ids(opened, meta),
            predictor=predictor,
            progress=update,
        )
    # Baselines do not depend on the checkpoint.
    baselines.update(
        {
            result.task: result.baselines
            for result in results
            if not (result.error or result.task in baselines)
        }
    )
    results = [dataclasses.replace(r, baselines={} if r.error else baselines[r.task]) for r in results]
    if jax.process_index() == 0:
        path = evaluate.results_path(opened.directory, mixture.name)
        evaluate.write_results(path, results, step=step, split=args.split, decode=args.decode)
    screen.console().print(results_table(results, f"step {step}, {args.split}, {args.decode}"))
    print(_verdict(results))
    return results


def results_table(results: Sequence[Any], title: str) -> Any:
    """Build the table of one checkpoint: a row a task and score."""
    from mtjax.launch import screen

    rows: list[tuple[Any, ...]] = []
    for result in results:
        if result.error:
            rows.append((result.task, result.family, "FAILED", "-", "", "", "-", "-"))
        for name, score in result.scores.items():
            baseline = result.baselines.get(name)
            better = {True: "yes", False: "no", None: ""}[result.beats_baseline(name)]
            trivial = f"{baseline.score:.4g} {baseline.name}" if baseline else ""
            sizes = (result.num_examples, result.num_tokens)
            rows.append((result.task, result.family, name, score, trivial, better, *sizes))
    columns = (
        "task",
        "family",
        "metric",
        "score",
        "trivial baseline",
        "clearly better",
        "examples",
        "tokens",
    )
    return screen.table(title, columns, rows)


def _verdict(results: Sequence[Any]) -> str:
    """Say how many tasks are clearly better than their trivial baseline by their first score."""
    firsts = {result.task: next(iter(result.scores), "") for result in results}
    better = {result.task: result.beats_baseline(firsts[result.task]) for result in results}
    compared = [task for task, is_better in better.items() if is_better is not None]
    if not compared:
        return ""
    others = [task for task in compared if not better[task]]
    return (
        f"{len(compared) - len(others)} of {len(compared)} tasks are better than their trivial baseline's 95 % "
        "bootstrap interval" + (f"; not {', '.join(others)}" if others else "")
    )


def _show_series(opened: model_dir.Run, args: argparse.Namespace, mixture: str) -> None:
    """Plot all checkpoints evaluated so far in the same way, and print the families' means."""
    import jax

    from mtjax import evaluate
    from mtjax.launch import plots, screen

    if jax.process_index() != 0:
        return
    path = evaluate.results_path(opened.directory, mixture)
    same = (args.split, args.decode)
    lines = [line for line in evaluate.read_results(path) if (line["split"], line["mode"]) == same]
    if not lines:
        return
    plot = path.with_suffix(".png")
    plots.series(plot, lines, title=f"{mixture}, {args.split}, {args.decode}")
    steps = sorted({line["step"] for line in lines})
    if len(steps) > 1:
        means = plots.family_means(lines)
        bits = plots.family_means(lines, lambda line: line["scores"].get("bits_per_byte"))
        means |= {f"{family}, bits per byte": points for family, points in bits.items()}
        rows = [(family, *(points.get(step, "-") for step in steps)) for family, points in means.items()]
        columns = ("family", *(f"step {step}" for step in steps))
        screen.console().print(screen.table("mean score of each family's tasks", columns, rows))
    print(f"Results: {path}, plot: {plot}")
