"""Report a run: metrics.jsonl, TensorBoard event files, and one live line on a terminal (plain lines when piped)."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import rich.console
import rich.live
import rich.text

METRICS = "metrics.jsonl"


class Writer(Protocol):
    """Takes scalars by name at a step, and messages."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, message: str) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: an object a line, {"step": ..., name: value, ...}; NaN and infinities become null."""

    def __init__(self, model_dir: str, *, resume_step: int):
        path = Path(model_dir) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_after(path, resume_step)
        self.file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line and flush it."""
        finite = {name: float(x) if math.isfinite(x) else None for name, x in values.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def text(self, message: str) -> None:
        """Leave messages to the console."""

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _drop_after(path: Path, step: int) -> None:
    """Drop lines of steps after `step`, which will be taken again, and a torn last line."""
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), "utf-8")
    partial.replace(path)


class TensorBoard:
    """TensorBoard event files in the model directory, written without TensorFlow."""

    def __init__(self, model_dir: str, *, resume_step: int):
        from tensorboardX import SummaryWriter  # imports protobuf: half a second that only runs pay

        # A thread of its own writes; TensorBoard hides what an earlier process logged after resume_step.
        self.writer = SummaryWriter(
            str(Path(model_dir) / "tensorboard"), purge_step=resume_step + 1, flush_secs=5
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event per scalar."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, message: str) -> None:
        """Leave messages to the console."""

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class Console:
    """One live line on a terminal; a line per log step where output is piped."""

    def __init__(self, *, train_steps: int, resume_step: int, file=None):
        self.console = rich.console.Console(file=file or sys.stderr, highlight=False, markup=False)
        self.train_steps, self.first_step, self.started = train_steps, resume_step, time.monotonic()
        self.live = None
        if self.console.is_terminal:
            self.live = rich.live.Live(console=self.console, auto_refresh=False, transient=False)
            self.live.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show step, loss, speed, the families' shares and the time left; or an evaluation."""
        is_training = "train/loss" in values
        line = self._training(step, values) if is_training else _evaluation(step, values)
        if self.live is None:
            self.console.print(line, soft_wrap=True)
        elif is_training:
            self.live.update(rich.text.Text(line, overflow="ellipsis", no_wrap=True), refresh=True)
        else:
            self.live.console.print(line, soft_wrap=True)

    def _training(self, step: int, values: Mapping[str, float]) -> str:
        done = max(step - self.first_step, 1)
        left = (time.monotonic() - self.started) / done * (self.train_steps - step)
        examples = _by_family(values, "examples")
        counts = examples or _by_family(values, "tokens")
        total = sum(counts.values()) or 1.0
        largest = sorted(counts, key=counts.__getitem__, reverse=True)[:4]
        shares = " ".join(f"{name} {100 * counts[name] / total:.0f}%" for name in largest)
        return (
            f"step {step}/{self.train_steps}  loss {values['train/loss']:.4f}  "
            f"{values.get('train/tokens_per_second', 0):,.0f} tokens/s  {'examples' if examples else 'targets'}: {shares}  {_duration(left)} left"
        )

    def text(self, message: str) -> None:
        """Print a message above the live line."""
        (self.live.console if self.live else self.console).print(message, soft_wrap=True)

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self.live is not None:
            self.live.stop()


def _by_family(values: Mapping[str, float], what: str) -> dict[str, float]:
    """Pick family/<name>/<what> out of scalars: {name: value}."""
    ends = ("family/", f"/{what}")
    return {
        name[len(ends[0]) : -len(ends[1])]: value
        for name, value in values.items()
        if name.startswith(ends[0]) and name.endswith(ends[1])
    }


def _evaluation(step: int, values: Mapping[str, float]) -> str:
    shown = ("validation/loss", "validation/mean_task_loss", "validation/accuracy")
    return f"step {step}  " + "  ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Many:
    """Pass everything on to several writers."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = writers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars everywhere."""
        for writer in self.writers:
            writer.scalars(step, values)

    def text(self, message: str) -> None:
        """Write a message everywhere."""
        for writer in self.writers:
            writer.text(message)

    def close(self) -> None:
        """Close all."""
        for writer in self.writers:
            writer.close()


@contextlib.contextmanager
def writers(model_dir: str, *, resume_step: int, train_steps: int) -> Iterator[Many]:
    """Open all of a run's writers; in processes other than 0, none."""
    if jax.process_index() != 0:
        yield Many([])
        return
    many = Many(
        [
            JsonLines(model_dir, resume_step=resume_step),
            TensorBoard(model_dir, resume_step=resume_step),
            Console(train_steps=train_steps, resume_step=resume_step),
        ]
    )
    try:
        yield many
    finally:
        many.close()
