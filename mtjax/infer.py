"""Predict or score JSON lines: same order out as in, and an interrupted run goes on where it stopped.

A line has `inputs`, `targets` to score, `choices` to rank and perhaps `task`, a task of the checkpoint; all
fields are kept. Lines are worked on in windows that start at fixed positions in the file, so that a resumed
run puts the same examples into the same batches and writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtjax import predict, tree
from mtjax.data import vocabulary
from mtjax.data.vocabulary import Vocabulary
from mtjax.predict import Example, Predictor
from mtjax.types import Params

ADDED = {"predict": "prediction", "score": "score"}  # the field that each mode adds
BATCHES_PER_WINDOW = 16


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """How text becomes the model's ids and back, and the longest input in tokens."""

    inputs: Vocabulary
    targets: Vocabulary
    input_length: int
    inputs_eos: bool = True
    targets_eos: bool = True

    def encode_inputs(self, text: str) -> tuple[list[int], bool]:
        """Return ids, cut to input_length with EOS kept, and whether they were cut."""
        ids, end = self.inputs.encode(text), [self.inputs.eos_id] * self.inputs_eos
        room = self.input_length - len(end)
        return [*ids[:room], *end], len(ids) > room

    def encode_targets(self, text: str) -> list[int]:
        """Return the ids of a target, whole: a score is of all of it."""
        return [*self.targets.encode(text), *[self.targets.eos_id] * self.targets_eos]


def text_codec(model_dir: str | os.PathLike, lengths: Mapping[str, int]) -> TextCodec:
    """Open the codec of a trained run; training kept it in its model directory, so no cache is needed."""
    features = vocabulary.read(Path(model_dir) / vocabulary.FOLDER)
    targets, targets_eos = features["targets"]
    inputs, inputs_eos = features.get("inputs", features["targets"])
    return TextCodec(inputs, targets, lengths["inputs"], inputs_eos, targets_eos)


class Summary(NamedTuple):
    """What a run did, in lines."""

    lines: int  # of the input
    done_before: int
    cut_inputs: int  # of the lines done now
    unknown_tasks: int  # of the lines done now: named a task that the checkpoint has not
    first_unknown: str = ""  # the first such name


def infer(
    predictor: Predictor,
    params: Params,
    *,
    input_path: str | os.PathLike,
    output_path: str | os.PathLike,
    mode: str,
    codec: TextCodec,
    batch_size: int,
    task_ids: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: predict.Progress | None = None,
) -> Summary:
    """Add a `prediction` or a `score` (log-probability of `targets`, in nats) to every line of a file.

    settings: what else the results depend on (checkpoint, decoding); kept beside the output, and compared
    when a run is resumed. Raises ValueError, naming file and line, on a line that is not usable, and where
    the output holds other lines than the input, or was made with other settings.
    """
    if mode not in ADDED:
        raise tree.unknown_name("mode", mode, list(ADDED))
    input_path, output_path = Path(input_path), Path(output_path)
    if output_path.exists() and output_path.samefile(input_path):
        raise ValueError(f"{str(input_path)!r} is both input and output; give the output another name.")
    is_rank = mode == "predict" and predictor.config.mode == "rank"
    task_ids = task_ids or {}
    total = sum(1 for _ in read_requests(input_path, mode=mode, is_rank=is_rank))
    done = resume_at(input_path, output_path, mode=mode)
    _check_settings(output_path, {"mode": mode, **(settings or {})}, is_resumed=done > 0)
    size = BATCHES_PER_WINDOW * batch_size
    # A window that was begun is made again whole: same batches, same bytes.
    begun = range(done // size * size, total if done < total else 0, size)
    requests = read_requests(input_path, mode=mode, is_rank=is_rank)
    requests = itertools.islice(requests, begun.start, None)
    num_cut, unknown = 0, []
    with open(output_path, "ab") as file:
        for start in begun:
            window = list(itertools.islice(requests, size))
            examples, were_cut = encode(window, codec, task_ids, with_targets=mode == "score")
            values = _answers(
                predictor,
                params,
                window,
                examples,
                codec=codec,
                mode=mode,
                seed=start // size,
                progress=_counted(progress, start=start, size=len(window), total=total),
            )
            new = range(max(done - start, 0), len(window))
            _append(file, [window[i] | {ADDED[mode]: values[i]} for i in new])
            num_cut += sum(were_cut[i] for i in new)
            unknown += [window[i]["task"] for i in new if "task" in window[i] and examples[i].task_id < 0]
    return Summary(total, done, num_cut, len(unknown), unknown[0] if unknown else "")


def read_requests(path: Path, *, mode: str, is_rank: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, checked; empty lines are passed over."""
    for number, line in _numbered(path):
        try:
            request = json.loads(line)
            if "\\u" in line:
                _as_line(request)  # half of a surrogate pair can be read but not written
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}:{number}: not text: {error}.") from error
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}.") from error
        if fault := _fault(request, mode=mode, is_rank=is_rank):
            raise ValueError(f"{path}:{number}: {fault}.")
        yield request


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of the lines that are not blank."""
    with open(path, "rb") as file:  # text mode would name no line when it meets a bad byte
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: {error}.") from error
            if text.strip():
                yield number, text


def _fault(request: Any, *, mode: str, is_rank: bool) -> str | None:
    """Say what is wrong with a request, or None."""
    if not isinstance(request, dict):
        return f"expected an object with 'inputs', got {type(request).__name__}"
    for name in ["inputs", "targets"] if mode == "score" else ["inputs"]:
        if not isinstance(request.get(name), str):
            return f"{mode} needs a text {name!r}; the line has {', '.join(map(repr, request)) or 'no field'}"
    choices = request.get("choices")
    if is_rank and not (
        isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices)
    ):
        return "to rank, a line needs 'choices', a list of texts"
    if ADDED[mode] in request:
        return f"the field {ADDED[mode]!r} is what {mode} adds; rename it"
    return None


def encode(
    requests: Sequence[Mapping[str, Any]],
    codec: TextCodec,
    task_ids: Mapping[str, int],
    *,
    with_targets: bool,
) -> tuple[list[Example], list[bool]]:
    """Turn requests into examples, and tell which inputs were cut. An unknown task is -1."""
    examples, were_cut = [], []
    for request in requests:
        inputs, is_cut = codec.encode_inputs(request["inputs"])
        targets = codec.encode_targets(request["targets"]) if with_targets else []
        task = request.get("task")
        task_id = task_ids.get(task, -1) if isinstance(task, str) else -1
        examples.append(Example(np.array(inputs, np.int32), np.array(targets, np.int32), task_id))
        were_cut.append(is_cut)
    return examples, were_cut


def _answers(
    predictor: Predictor,
    params: Params,
    requests: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    *,
    codec: TextCodec,
    mode: str,
    seed: int,
    progress: predict.Progress | None,
) -> list[Any]:
    """Return what is added to each request."""
    if mode == "score":
        scores = predictor.score(params, examples, progress=progress).logprob
        if not np.isfinite(scores).all():
            raise ValueError("a score is not finite: these parameters have diverged.")
        return scores.tolist()
    if predictor.config.mode == "rank":
        options = [[codec.encode_targets(choice) for choice in request["choices"]] for request in requests]
        best = predict.rank(predictor, params, examples, options, progress=progress).best
        return [request["choices"][i] for request, i in zip(requests, best, strict=True)]
    decoded = predictor.decode(params, examples, seed=seed, progress=progress)
    return [codec.targets.decode(ids) for ids in decoded]


def _counted(
    progress: predict.Progress | None, *, start: int, size: int, total: int
) -> predict.Progress | None:
    """Count a window's examples (or the options it ranks) as lines of the file."""
    if progress is None:
        return None
    return lambda done, of: progress(start + size * done // of, total)


# The output.


def resume_at(input_path: Path, output_path: Path, *, mode: str) -> int:
    """Count the lines that the output already holds, each compared with the input's line.

    What a killed run left of a last line is cut off. Raises ValueError on any other difference.
    """
    if not output_path.exists():
        return 0
    _drop_torn_line(output_path)
    requests = read_requests(input_path, mode=mode)
    count = 0
    for number, text in _numbered(output_path):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{output_path}:{number}: not JSON: {error}. Delete the output.") from error
        expected = next(requests, None)
        if not isinstance(line, dict) or ADDED[mode] not in line:
            raise ValueError(
                f"{output_path}:{number}: no {ADDED[mode]!r}, so this is not an output of {mode}. "
                "Choose another output."
            )
        given = {name: value for name, value in line.items() if name != ADDED[mode]}
        if expected is None or _as_line(given) != _as_line(expected):
            raise ValueError(
                f"{output_path}:{number}: belongs to another input than line {count + 1} of "
                f"{str(input_path)!r}. Choose another output, or delete this one."
            )
        count += 1
    return count


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline."""
    with open(path, "rb+") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(position - 65536, 0)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _append(file: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines in one write, and flush them to disk."""
    file.write(b"".join(map(_as_line, lines)))
    file.flush()
    os.fsync(file.fileno())


def _as_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def settings_path(output_path: str | os.PathLike) -> Path:
    """Name the file beside an output that says how it was made."""
    return Path(f"{os.fspath(output_path)}.settings.json")


def _check_settings(output_path: Path, settings: Mapping[str, Any], *, is_resumed: bool) -> None:
    """Compare with the settings that the lines already there were made with, or write new ones."""
    path = settings_path(output_path)
    settings = json.loads(json.dumps(settings))
    if is_resumed and path.exists():
        before = json.loads(path.read_text("utf-8"))
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if names:
            changed = ", ".join(f"{name}: {before.get(name)!r} -> {settings.get(name)!r}" for name in names)
            raise ValueError(
                f"{str(output_path)!r} was begun with other settings ({changed}). Go on with the same ones, "
                "or choose another output."
            )
        return
    output_path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
