import functools
import json

import jax
import numpy as np
import pytest

from mtjax import infer, predict, sharding
from mtjax.data import vocabulary
from mtjax.models.t5 import T5Config, t5

LENGTHS = {"inputs": 40, "targets": 16}
BYTES = vocabulary.byte()
CODEC = infer.TextCodec(BYTES, BYTES, LENGTHS["inputs"])
MODEL = t5(
    T5Config(
        vocab_size=259,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
)
BATCH = 2
WINDOW = BATCH * infer.BATCHES_PER_WINDOW


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 1.5, MODEL.init(jax.random.key(0)))


@functools.cache
def predictor(mode="greedy"):
    """Compile once for all tests."""
    return predict.predictor(
        MODEL,
        predict.DecodeConfig(mode, max_length=5),
        lengths=LENGTHS,
        batch_size=BATCH,
        mesh=sharding.make_mesh({"data": -1}),
    )


def requests(count):
    return [
        {
            "id": i,
            "inputs": f"line {i}" + " é" * (i % 5),
            "targets": "abc"[: 1 + i % 3],
            "extra": {"deep": [i]},
        }
        for i in range(count)
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def run(params, source, target, *, mode="predict", decode="greedy", **options):
    return infer.infer(
        predictor(decode),
        params,
        input_path=source,
        output_path=target,
        mode=mode,
        codec=CODEC,
        batch_size=BATCH,
        **options,
    )


def example(text, target="", task_id=-1):
    return predict.Example(
        np.array([*BYTES.encode(text)[: LENGTHS["inputs"] - 1], 1], np.int32),
        np.array([*BYTES.encode(target), 1], np.int32),
        task_id,
    )


def test_predicts_every_line_in_order_and_keeps_all_fields(params, tmp_path):
    lines = requests(WINDOW + 5)
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "new" / "out.jsonl"
    summary = run(params, source, target)
    assert summary == infer.Summary(lines=WINDOW + 5, done_before=0, cut_inputs=0, unknown_tasks=0)
    found = read(target)
    assert [{k: v for k, v in line.items() if k != "prediction"} for line in found] == lines
    expected = predictor().decode(params, [example(line["inputs"]) for line in lines])
    assert [line["prediction"] for line in found] == [BYTES.decode(ids) for ids in expected]
    assert len({line["prediction"] for line in found}) > 5  # order can be told


def test_scores_targets(params, tmp_path):
    lines = requests(7)
    run(params, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", mode="score")
    expected = predictor().score(params, [example(x["inputs"], x["targets"]) for x in lines]).logprob
    np.testing.assert_allclose([line["score"] for line in read(tmp_path / "out.jsonl")], expected, rtol=1e-6)


def test_ranks_choices(params, tmp_path):
    lines = [line | {"choices": ["pqr", "xyz", "ABC", "   "][line["id"] % 2 :]} for line in requests(5)]
    run(params, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", decode="rank")
    for line in read(tmp_path / "out.jsonl"):
        pairs = [example(line["inputs"], choice) for choice in line["choices"]]
        best = int(np.argmax(predictor().score(params, pairs).logprob))
        assert line["prediction"] == line["choices"][best]


@pytest.mark.parametrize("mode", ["predict", "score"])
@pytest.mark.parametrize("kept", [0, 3, WINDOW, WINDOW + 4])
@pytest.mark.parametrize("torn", [0, 9])
def test_resume_after_truncation_equals_the_straight_run(params, tmp_path, mode, kept, torn):
    source = write(tmp_path / "in.jsonl", requests(WINDOW + 6))
    run(params, source, tmp_path / "straight.jsonl", mode=mode)
    straight = (tmp_path / "straight.jsonl").read_bytes()
    lines = straight.splitlines(keepends=True)
    target = tmp_path / "out.jsonl"
    target.write_bytes(b"".join(lines[:kept]) + lines[kept][:torn])
    summary = run(params, source, target, mode=mode)
    assert target.read_bytes() == straight
    assert (summary.lines, summary.done_before) == (WINDOW + 6, kept)


def test_resumed_samples_are_those_of_the_straight_run(params, tmp_path):
    source = write(tmp_path / "in.jsonl", requests(WINDOW + 6))
    run(params, source, tmp_path / "straight.jsonl", decode="sample")
    straight = (tmp_path / "straight.jsonl").read_bytes()
    target = tmp_path / "out.jsonl"
    target.write_bytes(b"".join(straight.splitlines(keepends=True)[: WINDOW + 3]))
    run(params, source, target, decode="sample")
    assert target.read_bytes() == straight


def test_a_finished_run_does_nothing(params, tmp_path):
    source, target = write(tmp_path / "in.jsonl", requests(3)), tmp_path / "out.jsonl"
    run(params, source, target)
    before = target.read_bytes()
    assert run(None, source, target).done_before == 3
    assert target.read_bytes() == before


def test_an_output_of_other_inputs_is_refused(params, tmp_path):
    source, target = write(tmp_path / "in.jsonl", requests(4)), tmp_path / "out.jsonl"
    run(params, source, target)
    before = target.read_bytes()
    changed = requests(4)
    changed[2]["inputs"] = "another"
    with pytest.raises(ValueError, match=r"out\.jsonl:3: belongs to another input than line 3"):
        run(params, write(tmp_path / "in.jsonl", changed), target)
    with pytest.raises(ValueError, match=r"out\.jsonl:4: belongs to another input"):
        run(params, write(tmp_path / "in.jsonl", requests(3)), target)
    with pytest.raises(ValueError, match=r"out\.jsonl:1: no 'score'"):
        run(params, write(tmp_path / "in.jsonl", requests(4)), target, mode="score")
    assert target.read_bytes() == before


def test_other_settings_are_refused(params, tmp_path):
    source, target = write(tmp_path / "in.jsonl", requests(4)), tmp_path / "out.jsonl"
    run(params, source, target, settings={"step": 100})
    with pytest.raises(ValueError, match=r"other settings \(step: 100 -> 200\)"):
        run(params, source, target, settings={"step": 200})
    target.unlink()
    run(params, source, target, settings={"step": 200})
    assert json.loads(infer.settings_path(target).read_text()) == {"mode": "predict", "step": 200}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"inputs": "a"', "not JSON"),
        ('["a"]', "expected an object with 'inputs', got list"),
        ('{"input": "a"}', "predict needs a text 'inputs'; the line has 'input'"),
        ('{"inputs": 3}', "needs a text 'inputs'"),
        (r'{"inputs": "a\ud800"}', "not text"),
        ('{"inputs": "a", "prediction": "b"}', "the field 'prediction' is what predict adds"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(params, tmp_path, line, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"inputs": "good"}}\n\n{line}\n', "utf-8")
    with pytest.raises(ValueError, match=rf"in\.jsonl:3: .*{message}"):
        run(params, source, target)
    assert not target.exists()


def test_bad_bytes_and_missing_fields_of_other_modes_are_named(params, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"inputs": "a"}\n{"inputs": "\xff"}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:2: not UTF-8"):
        run(params, source, target)
    write(source, [{"inputs": "a"}])
    with pytest.raises(ValueError, match=r"in\.jsonl:1: score needs a text 'targets'"):
        run(params, source, target, mode="score")
    with pytest.raises(ValueError, match=r"in\.jsonl:1: to rank, a line needs 'choices'"):
        run(params, source, target, decode="rank")
    with pytest.raises(ValueError, match="Did you mean 'score'"):
        run(params, source, target, mode="scores")
    with pytest.raises(ValueError, match="both input and output"):
        run(params, source, source)


def test_tasks_of_the_checkpoint_become_ids():
    lines = [{"inputs": "a", "task": "known"}, {"inputs": "a", "task": "new"}, {"inputs": "a"}]
    found, _ = infer.encode(lines, CODEC, {"known": 4}, with_targets=False)
    assert [one.task_id for one in found] == [4, -1, -1]


def test_long_inputs_are_cut_with_eos_and_counted(params, tmp_path):
    (one,), were_cut = infer.encode([{"inputs": "x" * 100}], CODEC, {}, with_targets=False)
    assert len(one.inputs) == LENGTHS["inputs"] and one.inputs[-1] == 1 and were_cut == [True]
    lines = [{"inputs": "x" * 100, "task": "new"}, {"inputs": "x" * 39}]
    summary = run(params, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", task_ids={"known": 0})
    assert (summary.cut_inputs, summary.unknown_tasks) == (1, 1)
    assert summary.first_unknown


def test_separators_inside_texts_are_no_line_ends(params, tmp_path):
    lines = [{"inputs": "a\u2028b\x85c", "x": float("nan")}, {"inputs": "d"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    run(params, source, target)
    whole = target.read_bytes()
    target.write_bytes(whole[:-3])
    assert run(params, source, target).done_before == 1
    assert target.read_bytes() == whole


def test_progress_counts_lines(params, tmp_path):
    seen = []
    source = write(tmp_path / "in.jsonl", requests(WINDOW + 3))
    run(params, source, tmp_path / "out.jsonl", progress=lambda *update: seen.append(update))
    assert seen[-1] == (WINDOW + 3, WINDOW + 3) and seen == sorted(seen)
