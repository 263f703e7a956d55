"""metrics.jsonl, event files and the console: what a run says, also after it was killed and resumed."""

import io
import json
import struct

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtjax import log


def lines(model_dir):
    return [json.loads(line) for line in (model_dir / log.METRICS).read_text("utf-8").splitlines()]


def events(folder):
    """Read {(name, step): value} from event files: records of length, checksum, Event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = {}, []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                purged.append(event.step)
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found, purged


def test_a_line_a_step_is_on_disk_at_once(tmp_path):
    writer = log.JsonLines(str(tmp_path / "new"), resume_step=0)
    writer.scalars(10, {"train/loss": np.float32(1.5), "nan": float("nan"), "task/ü/tokens": 3})
    assert lines(tmp_path / "new") == [{"step": 10, "train/loss": 1.5, "nan": None, "task/ü/tokens": 3.0}]
    writer.text("no line")
    writer.close()
    assert len(lines(tmp_path / "new")) == 1


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    writer = log.JsonLines(str(tmp_path), resume_step=0)
    for step in (10, 20, 30):
        writer.scalars(step, {"loss": step / 10})
    writer.close()
    with (tmp_path / log.METRICS).open("a") as file:
        file.write('5\n{"step": 15, "lo')
    writer = log.JsonLines(str(tmp_path), resume_step=20)
    writer.scalars(30, {"loss": 7.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 1.0), (20, 2.0), (30, 7.0)]
    assert [f.name for f in tmp_path.iterdir()] == [log.METRICS]


@hypothesis.given(cut=st.integers(0, 200), resume=st.integers(0, 6))
@hypothesis.settings(
    deadline=None, max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_run_cut_anywhere_and_resumed_leaves_each_step_once(tmp_path, cut, resume):
    whole = "".join(json.dumps({"step": step, "loss": step * 1.0}) + "\n" for step in range(1, 7))
    cut = min(cut, len(whole))
    (tmp_path / log.METRICS).write_text(whole[:cut])
    writer = log.JsonLines(str(tmp_path), resume_step=resume)
    for step in range(resume + 1, 7):
        writer.scalars(step, {"loss": step * 1.0})
    writer.close()
    complete = whole[:cut].count("\n")  # a checkpoint is no older than its lines, so none is missing in a run
    kept = list(range(1, min(complete, resume) + 1))
    assert [line["step"] for line in lines(tmp_path)] in (
        kept + list(range(resume + 1, 7)),
        list(range(1, min(complete + 1, resume) + 1))
        + list(range(resume + 1, 7)),  # only the newline was cut
    )


def test_event_files_hold_the_scalars_and_purge_what_is_taken_again(tmp_path):
    writer = log.TensorBoard(str(tmp_path), resume_step=0)
    writer.scalars(10, {"train/loss": 1.5, "validation/loss": 2.0})
    writer.text("no event")
    writer.close()
    found, _ = events(tmp_path / "tensorboard")
    assert found == {("train/loss", 10): 1.5, ("validation/loss", 10): 2.0}
    log.TensorBoard(str(tmp_path), resume_step=10).close()
    assert 11 in events(tmp_path / "tensorboard")[1]


TRAINING = {
    "train/loss": 3.14159,
    "train/tokens_per_second": 12345.6,
    "family/code/tokens": 75.0,
    "family/text/qa/tokens": 25.0,
    "family/code/loss": 9.0,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_piped_output_is_a_plain_line_a_step():
    stream = io.StringIO()
    console = log.Console(train_steps=200, resume_step=0, file=stream)
    console.scalars(100, TRAINING)
    console.scalars(100, {"validation/loss": 2.0, "validation/accuracy": 0.5, "other": 1.0})
    console.text("Tasks [a, b] of {'x': 1} [bold]stay[/bold]")
    console.close()
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("step 100/200  loss 3.1416  12,346 tokens/s  targets: code 75% text/qa 25%  0:0")
    assert first.endswith(" left")
    assert second == "step 100  validation/loss 2.0000  validation/accuracy 0.5000"
    assert third == "Tasks [a, b] of {'x': 1} [bold]stay[/bold]"


def test_examples_by_family_are_preferred_to_tokens():
    stream = io.StringIO()
    log.Console(train_steps=2, resume_step=0, file=stream).scalars(
        1, TRAINING | {"family/code/examples": 1.0, "family/math/examples": 3.0}
    )
    assert "math 75% code 25%" in stream.getvalue()


def test_a_terminal_shows_one_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    console = log.Console(train_steps=200, resume_step=0, file=stream)
    for step in (100, 150):
        console.scalars(step, TRAINING)
    console.text("a message [above]")
    console.close()
    shown = stream.getvalue()
    assert "step 100/200" in shown and "step 150/200" in shown and "a message [above]" in shown
    # Each refresh returns to the start of the same line and clears it.
    assert "\r\x1b[2K" in shown
    assert shown.rindex("step 150/200") > shown.rindex("a message"), "the live line stays last"


def test_the_time_left_is_that_of_the_steps_of_this_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = log.Console(train_steps=1000, resume_step=900, file=stream)
    now[0] += 3661 / 2
    console.scalars(950, TRAINING)
    assert stream.getvalue().rstrip().endswith("30:30 left")
    assert log._duration(3661) == "1:01:01"


@pytest.mark.parametrize("process", [0, 1])
def test_only_the_first_process_writes(tmp_path, monkeypatch, process, capsys):
    monkeypatch.setattr(log.jax, "process_index", lambda: process)
    with log.writers(str(tmp_path), resume_step=0, train_steps=10) as writer:
        writer.scalars(5, TRAINING)
        writer.text("hello")
    written = sorted(f.name for f in tmp_path.iterdir())
    assert written == ([log.METRICS, "tensorboard"] if process == 0 else [])
    assert ("hello" in capsys.readouterr().err) == (process == 0)


def test_writers_are_closed_when_training_fails(tmp_path):
    with pytest.raises(RuntimeError), log.writers(str(tmp_path), resume_step=0, train_steps=10) as writer:
        writer.scalars(5, TRAINING)
        raise RuntimeError
    assert writer.writers[0].file.closed
    assert lines(tmp_path)[0]["step"] == 5
