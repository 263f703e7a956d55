"""Train: feed a Program with a Stream, log every task, save and resume bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mtjax import (
    checkpoint,
    evaluate,
    feedback,
    health,
    host_memory,
    hosts,
    log,
    monitor,
    optim,
    program,
    sharding,
    start,
    tree,
    validation,
)
from mtjax.data import cache, pipeline, vocabulary
from mtjax.losses import LossConfig
from mtjax.mixing import rates
from mtjax.models import routers
from mtjax.program import Program, StepMetrics, TaskTable, TrainState
from mtjax.types import Balancer, Model, Peft

FINISHED = "finished.json"  # in a model directory whose training has ended


class Stopped(BaseException):
    """Training was asked to stop; its last step is saved, and the same call goes on from there.

    No Exception: whoever names what failed (a damaged checkpoint, a broken task) must not take it for a failure.
    """


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluate while training: target loss and accuracy per task on fixed validation batches.

    every: steps between evaluations, 0 = never. examples: validation examples a task. decode: of these,
    how many to decode greedily and score by the task's metrics. patience: stop after this many evaluations
    without a better `metric`, 0 = never.
    """

    every: int = 0
    split: str = "validation"
    examples: int = 32
    decode: int = 0
    metric: str = "validation/loss"
    mode: str = "min"
    patience: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise tree.unknown_name("mode of the evaluation metric", self.mode, ["min", "max"])


@dataclasses.dataclass(frozen=True)
class Saving:
    """Save every `every` steps (0 = at the end only); keep the last n, every k-th step, and the best n.

    fall_back: resume from the newest whole checkpoint where newer ones are damaged, instead of stopping.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: int = 1
    asynchronous: bool = True
    fall_back: bool = False


def task_table(tasks: Sequence[cache.CachedTask]) -> TaskTable:
    """Return the names and families of cached tasks, in their order."""
    return TaskTable(tuple(task.name for task in tasks), tuple(task.family for task in tasks))


def _check_tasks(model: Model, tasks: Sequence[cache.CachedTask]) -> None:
    """Refuse tasks with more ids than the model has, or other ones than it describes."""
    routers.check_descriptions(model.config, [task.name for task in tasks])
    for task in tasks:
        size = task.vocabulary("targets").size
        if model.config.vocab_size < size:
            raise ValueError(
                f"The model has vocab_size={model.config.vocab_size}, but the vocabulary of task {task.name!r} "
                f"has {size} ids. Set vocab_size to at least {size} (a multiple of 128 is fast)."
            )


def _check_classes(model: Model, tasks: Sequence[cache.CachedTask], loss: LossConfig | None) -> None:
    """Refuse heads that are not the tasks', and smoothing over classes that a task does not have."""
    num_classes = getattr(model.config, "num_classes", None)
    if num_classes is None:
        return
    wanted = {task.name: len(task.metadata["options"] or ()) for task in tasks}
    if list(num_classes) != list(wanted.values()):
        raise ValueError(
            f"The model's num_classes are {list(num_classes)}, the tasks have so many options: {wanted}. Set "
            f"num_classes to {tuple(wanted.values())}."
        )
    if loss is not None and loss.label_smoothing and len(set(num_classes)) > 1:
        raise ValueError("label_smoothing needs tasks of equally many classes; set it to 0.")


def _check_metrics(
    run: Program,
    stream: pipeline.Stream,
    data: pipeline.TrainData,
    evaluation: Evaluation,
    observe_every: int,
) -> None:
    """Refuse, before the first step, metrics that nothing will measure."""
    measured = None
    if evaluation.every:
        measured = feedback.validation_names(
            run.tasks, stream.tasks, split=evaluation.split, decode=bool(evaluation.decode)
        )
        measured.check("evaluation metric", evaluation.metric)
    feedback.check(stream, run.tasks, data, validation=measured, every=observe_every)


def prepare(
    *,
    model: Model,
    data: pipeline.TrainData,
    optimizer: optim.Optimizer,
    tasks: TaskTable | None = None,
    balancer: Balancer | None = None,
    peft: Peft | None = None,
    loss: LossConfig | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    rules: sharding.Rules = sharding.PARAMETER_RULES,
    activation_rules: sharding.Rules = sharding.ACTIVATION_RULES,
    microbatches: int = 1,
    group_by: str | Mapping[str, str] = "task",
    ema_decay: float | None = None,
) -> Program:
    """Build the Program of a run; the tasks come from the cache unless given.

    Raises ValueError for what cannot train: vocabulary, mesh, batch, groups.
    """
    if tasks is None:
        cached = cache.open_mixture(data.cache_dirs, data.mixture).tasks
        _check_tasks(model, cached)
        _check_classes(model, cached, loss)
        tasks = task_table(cached)
    return program.program(
        model=model,
        optimizer=optimizer,
        tasks=tasks,
        batch_size=data.batch_size,
        balancer=balancer,
        peft=peft,
        loss=loss,
        mesh=mesh,
        rules=rules,
        activation_rules=activation_rules,
        microbatches=microbatches,
        group_by=group_by,
        ema_decay=ema_decay,
    )


def program_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of `fit` that `prepare` takes."""
    names = inspect.signature(prepare).parameters
    return {name: value for name, value in arguments.items() if name in names}


class _Profiler:
    """Trace the steps [first, last) with jax.profiler; the trace is written however training ends."""

    def __init__(self, steps: Sequence[int], directory: str) -> None:
        if len(steps) not in (0, 2) or (steps and not 0 <= steps[0] < steps[1]):
            raise ValueError(f"profile_steps must be (first, last) with first < last, got {list(steps)}.")
        self.steps = tuple(steps)
        self.directory = directory
        self.is_on = False

    def __call__(self, step: int) -> None:
        """Start before the first step, stop before the last."""
        if not self.steps:
            return
        is_in = self.steps[0] <= step < self.steps[1]
        if is_in and not self.is_on:
            jax.profiler.start_trace(self.directory)
            self.is_on = True
        elif not is_in:
            self.close()

    def close(self) -> None:
        """Write the trace if it is still on."""
        if self.is_on:
            jax.profiler.stop_trace()
            self.is_on = False


def _keep_vocabulary(model_dir: str, task: cache.CachedTask) -> None:
    """Write how text becomes ids beside the checkpoints: predicting then needs no cache."""
    if jax.process_index() == 0:
        features = {
            name: (task.vocabulary(name), spec["add_eos"]) for name, spec in task.metadata["features"].items()
        }
        vocabulary.write(Path(model_dir) / vocabulary.FOLDER, features)


def fit(
    *,
    model_dir: str,
    model: Model,
    data: pipeline.TrainData,
    optimizer: optim.Optimizer,
    train_steps: int,
    balancer: Balancer | None = None,
    peft: Peft | None = None,
    loss: LossConfig | None = None,
    mesh: Mapping[str, int] | None = None,
    rules: sharding.Rules = sharding.PARAMETER_RULES,
    activation_rules: sharding.Rules = sharding.ACTIVATION_RULES,
    microbatches: int = 1,
    group_by: str | Mapping[str, str] = "task",
    ema_decay: float | None = None,
    evaluation: Evaluation | None = None,
    saving: Saving | None = None,
    log_every: int = 50,
    observe_every: int = 50,
    seed: int = 0,
    initial_checkpoint: str | None = None,
    initial_state: str = "parameters",
    max_skipped: int = 0,
    profile_steps: Sequence[int] = (),
    config_text: str = "",
    should_stop: Callable[[int], bool] = lambda step: False,
) -> dict[str, float]:
    """Train to `train_steps`, or resume what model_dir holds, and return the last logged scalars.

    observe_every: the steps whose mean losses closed-loop rates see at a time; they also see every evaluation.
    initial_state: what to take of initial_checkpoint: 'parameters', or 'optimizer' too, with its step, so that
    what was trained there (by T5X perhaps, and converted) goes on here, on this data.
    max_skipped: how many steps with a non-finite loss or gradient to skip, all in all; one more ends training.
    should_stop is asked after every step and before every batch of an evaluation, and must answer alike on all
    hosts; where it says True, that step is saved and Stopped raised. An evaluation that is cut short is made when
    the run goes on. Raises ValueError for a run that cannot start and health.NonFiniteError for one that diverged.
    """
    if train_steps < 1:
        raise ValueError(f"train_steps must be at least 1, got {train_steps}.")
    evaluation, saving = evaluation or Evaluation(), saving or Saving()
    devices = sharding.make_mesh(mesh)
    num_hosts, host = sharding.data_hosts(devices)
    stream = pipeline.open_stream(data, num_hosts=num_hosts, host=host)
    _check_tasks(model, stream.tasks)
    _check_classes(model, stream.tasks, loss)
    run = prepare(
        model=model,
        data=data,
        optimizer=optimizer,
        tasks=task_table(stream.tasks),
        balancer=balancer,
        peft=peft,
        loss=loss,
        mesh=devices,
        rules=rules,
        activation_rules=activation_rules,
        microbatches=microbatches,
        group_by=group_by,
        ema_decay=ema_decay,
    )
    profiler = _Profiler(profile_steps, os.path.join(model_dir, "profile"))
    _check_metrics(run, stream, data, evaluation, observe_every)
    meta = start.meta(run, model, stream.tasks, config_text)
    checkpointer = checkpoint.Checkpointer(
        model_dir,
        keep_last=saving.keep_last,
        keep_every=saving.keep_every,
        keep_best=saving.keep_best,
        best_metric=evaluation.metric if evaluation.every else None,
        best_mode=evaluation.mode,
        asynchronous=saving.asynchronous,
    )
    with program.compiling(
        run, sharding.global_batch(devices, pipeline.empty_batch(data, num_hosts=num_hosts))
    ):
        state, position, saved = start.state(
            run,
            checkpointer,
            seed=seed,
            initial_checkpoint=initial_checkpoint,
            initial_state=initial_state,
            meta=meta,
            fall_back=saving.fall_back,
        )
    meta = start.inherited(meta, saved)
    patience = monitor.Patience(metric=evaluation.metric, mode=evaluation.mode, patience=evaluation.patience)
    window = monitor.Window(run.tasks)
    told = feedback.Feedback(stream, run.tasks, every=observe_every)
    judge = health.Health(run.tasks, max_skipped=max_skipped)
    first = int(state.step)
    if position is None and first >= train_steps:
        raise ValueError(
            f"train_steps={train_steps} (TRAIN_STEPS) counts from step 0, and {initial_checkpoint!r} is at {first}."
        )
    with (
        contextlib.closing(checkpointer),
        contextlib.closing(profiler),
        stream,
        log.writers(model_dir, resume_step=first, train_steps=train_steps) as writer,
    ):
        if position is not None:
            start.check_resume(saved, meta, writer=writer)
            stream.restore(position["data"])
            patience.restore(position["patience"])
            window.restore(position["window"])
            told.restore(position["feedback"])
            judge.restore(position["health"])
        elif initial_checkpoint is not None and (changes := start.task_changes(run, initial_checkpoint)):
            writer.text(changes)
        is_due = position is not None and position.get("is_evaluation_due", False)
        if not is_due and (first >= train_steps or patience.has_run_out()):
            _mark_finished(model_dir, first)
            writer.text(f"{model_dir} is already trained, to step {first} of {train_steps}.")
            return {}
        validate = validation.nothing
        if evaluation.every:
            validate = validation.validation(
                run,
                model,
                data,
                stream.tasks,
                split=evaluation.split,
                examples=evaluation.examples,
                decode=evaluation.decode,
            )
        _mark_finished(model_dir, None)
        _keep_vocabulary(model_dir, stream.tasks[0])
        scalars = _loop(
            run,
            state,
            stream,
            writer=writer,
            checkpointer=checkpointer,
            patience=patience,
            window=window,
            told=told,
            judge=judge,
            meta=meta,
            steps=range(first, train_steps),
            is_due=is_due,
            validate=validate,
            evaluation=evaluation,
            saving=saving,
            log_every=log_every,
            profile=profiler,
            should_stop=should_stop,
        )
        checkpointer.wait()
        _mark_finished(model_dir, checkpointer.latest())
        return scalars


def _mark_finished(model_dir: str, step: int | None) -> None:
    """Say that training ended at a step (or goes on), for who watches the checkpoints."""
    if jax.process_index() == 0:
        path = Path(model_dir) / FINISHED
        path.unlink(missing_ok=True) if step is None else path.write_text(json.dumps({"step": step}), "utf-8")


def has_finished(model_dir: str | os.PathLike) -> bool:
    """Tell whether the run in model_dir took its last step; what stopped it may be early stopping."""
    return (Path(model_dir) / FINISHED).exists()


def _loop(
    run: Program,
    state: TrainState,
    stream: pipeline.Stream,
    *,
    writer: log.Writer,
    checkpointer: checkpoint.Checkpointer,
    patience: monitor.Patience,
    window: monitor.Window,
    told: feedback.Feedback,
    judge: health.Health,
    meta: Mapping[str, Any],
    steps: range,
    is_due: bool,
    validate: validation.Validate,
    evaluation: Evaluation,
    saving: Saving,
    log_every: int,
    profile: Callable[[int], None],
    should_stop: Callable[[int], bool],
) -> dict[str, float]:
    """Take the steps; log, evaluate and save between them. is_due: first make the evaluation that was cut short."""
    scalars: dict[str, float] = {}
    metrics: dict[str, float] = {}  # of the last evaluation, which may be some steps ago
    last: StepMetrics | None = None
    is_over = False

    def evaluated(done: int) -> bool:
        """Evaluate after `done` steps; False where that was cut short, to be made when the run goes on."""
        nonlocal metrics

        def check() -> None:
            if should_stop(done):
                raise evaluate.Interrupted

        try:
            metrics = validate(run.merge(state), check)
        except evaluate.Interrupted:
            return False
        writer.scalars(done, metrics)
        told.evaluated(done, metrics)
        patience.note(metrics)
        return True

    def host(*, is_evaluation_due: bool) -> dict[str, Any]:
        return {
            "health": judge.state(),
            "window": window.state(),
            "feedback": told.state(),  # shows the stream what is due, so it comes first
            "data": pipeline.merge_states(hosts.gather(stream.state())),
            "patience": patience.state(),
            "is_evaluation_due": is_evaluation_due,
        }

    if is_due:
        if not evaluated(steps.start):
            raise Stopped(
                f"Stopped at step {steps.start}, which is saved; the same command goes on from there."
            )
        checkpointer.amend(steps.start, host=host(is_evaluation_due=False), metrics=metrics)
        if patience.has_run_out():
            writer.text(_is_over(steps.start, evaluation, patience))
            return metrics
    for step in steps:
        profile(step)
        checkpointer.check()
        batch = sharding.global_batch(run.mesh, next(stream))
        state, now = run.step(state, batch)
        window.add(now, positions=_positions(batch))
        told.add(step + 1, now)
        host_memory.settle(now, trim=step < steps.start + 3)
        # The host looks one step behind, so the device never waits for it.
        if last is not None:
            judge.look(step, last, writer)
        last, done = now, step + 1
        is_last = done == steps.stop
        if done % log_every == 0 or is_last:
            judge.look(done, now, writer)
            totals = pipeline.merge_totals(hosts.gather(stream.totals()))
            scalars = window.close() | monitor.seen(stream.report(totals))
            scalars |= judge.scalars()
            scalars |= {rates.SHARE.format(task=name): share for name, share in stream.rates.items()}
            writer.scalars(done, scalars)
        is_due = bool(evaluation.every) and (done % evaluation.every == 0 or is_last)
        is_evaluated = is_due and evaluated(done)
        is_over = is_evaluated and patience.has_run_out()
        is_cut_short = is_due and not is_evaluated
        is_stopped = is_cut_short or (should_stop(done) and not is_last)
        if (saving.every and done % saving.every == 0) or is_last or is_over or is_stopped:
            judge.look(done, now, writer)
            checkpointer.save(
                done,
                state,
                host=host(is_evaluation_due=is_cut_short),
                meta=meta,
                metrics=metrics if is_evaluated else None,
            )
        if is_over:
            writer.text(_is_over(done, evaluation, patience))
            break
        if is_stopped:
            checkpointer.wait()
            raise Stopped(f"Stopped at step {done}, which is saved; the same command goes on from there.")
    return scalars | metrics


def _is_over(done: int, evaluation: Evaluation, patience: monitor.Patience) -> str:
    return f"Stopped at step {done}: {evaluation.metric} has not improved {patience.waited} times."


def _positions(batch: Mapping[str, jax.Array]) -> int:
    """Count the input and target positions of a global batch, padding included."""
    return sum(batch[n].size for n in ("encoder_input_tokens", "decoder_target_tokens") if n in batch)
