"""Ids and text agree with SeqIO's vocabularies; damaged models and wrong layouts are named."""

from __future__ import annotations

import io
import pathlib

import pytest
import sentencepiece as sentencepiece_lib
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data import vocabulary

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A second sentence, with numbers 123 and punctuation!",
    "naïve café — ünïcödé ✓ 漢字",
    "mixed <extra_id_0> sentinels <extra_id_1> here <extra_id_9>",
    "  leading and   repeated spaces \t tabs\nlines ",
    "",
]


def train_model(**options) -> bytes:
    text = [f"sentence number {i} is about the {word}" for i in range(40) for word in ("fox", "dog", "code")]
    writer = io.BytesIO()
    layout = {
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "vocab_size": 100,
        "hard_vocab_limit": False,
    }
    sentencepiece_lib.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=writer, minloglevel=2, **(layout | options)
    )
    return writer.getvalue()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    path.write_bytes(train_model())
    return path


@pytest.mark.parametrize("extra_ids", [0, 10])
def test_sentencepiece_agrees_with_seqio(model_file, extra_ids):
    seqio = pytest.importorskip("seqio")
    ours = vocabulary.sentencepiece(model_file, extra_ids)
    theirs = seqio.SentencePieceVocabulary(str(model_file), extra_ids)
    assert (ours.size, ours.eos_id, ours.unk_id) == (theirs.vocab_size, theirs.eos_id, theirs.unk_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == list(theirs.encode(text)) == theirs.encode_tf(text).numpy().tolist()
        assert ours.decode(ids) == theirs.decode(ids)
    for ids in ([5, 6, 1, 7], [5, ours.size + 3, 6], [0, 0, 5]):
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("extra_ids", [0, 125])
def test_byte_agrees_with_seqio(extra_ids):
    seqio = pytest.importorskip("seqio")
    ours, theirs = vocabulary.byte(extra_ids), seqio.ByteVocabulary(extra_ids)
    assert (ours.size, ours.eos_id, ours.unk_id) == (theirs.vocab_size, theirs.eos_id, theirs.unk_id)
    for text in TEXTS:
        assert ours.encode(text) == list(theirs.encode(text))
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    for ids in ([70, 1, 71], [70, 300, 71], [2, 0, 70, 258]):
        assert ours.decode(ids) == theirs.decode(ids)


@given(st.text())
@settings(deadline=None)
def test_bytes_round_trip(text):
    v = vocabulary.byte()
    assert v.decode(v.encode(text)) == text


def test_first_sentinel_is_the_highest_id(model_file):
    v = vocabulary.sentencepiece(model_file, extra_ids=10)
    assert v.encode("<extra_id_0>") == [v.size - 1] == [v.sentinel(0)]
    assert v.encode("<extra_id_9>") == [v.size - 10] == [v.sentinel(9)]


def test_fingerprint_tells_vocabularies_apart(model_file):
    kinds = [
        vocabulary.byte(),
        vocabulary.byte(1),
        vocabulary.sentencepiece(model_file),
        vocabulary.sentencepiece(model_file, 10),
        vocabulary.sentencepiece_from_bytes(train_model(model_type="char")),
    ]
    assert len({v.fingerprint for v in kinds}) == len(kinds)


def test_spec_opens_the_same_vocabulary(model_file, tmp_path):
    v = vocabulary.sentencepiece(model_file, 10)
    vocabulary.model_path(v.fingerprint, tmp_path).write_bytes(v.model)
    again = vocabulary.from_spec(v.spec(), tmp_path)
    assert again.fingerprint == v.fingerprint and again.encode(TEXTS[0]) == v.encode(TEXTS[0])
    assert vocabulary.from_spec(vocabulary.byte(3).spec(), tmp_path).size == vocabulary.byte(3).size


def test_bad_models_are_named(model_file, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.model"):
        vocabulary.sentencepiece(tmp_path / "missing.model")
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"\xff" + model_file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"damaged\.model"):
        vocabulary.sentencepiece(damaged)
    with pytest.raises(ValueError, match="pad id -1"):
        vocabulary.sentencepiece_from_bytes(train_model(pad_id=-1, unk_id=0, bos_id=1, eos_id=2))
    v = vocabulary.sentencepiece(model_file, 10)
    vocabulary.model_path(v.fingerprint, tmp_path).write_bytes(train_model(model_type="char"))
    with pytest.raises(ValueError, match="fingerprint"):
        vocabulary.from_spec(v.spec(), tmp_path)


def test_a_run_keeps_its_vocabularies(tmp_path):
    written = {
        "inputs": (vocabulary.sentencepiece_from_bytes(train_model(), extra_ids=3), False),
        "targets": (vocabulary.byte(5), True),
    }
    vocabulary.write(tmp_path / "kept", written)
    found = vocabulary.read(tmp_path / "kept")
    assert {name: (kept.spec(), eos) for name, (kept, eos) in found.items()} == {
        name: (kept.spec(), eos) for name, (kept, eos) in written.items()
    }
    assert found["inputs"][0].encode(TEXTS[0]) == written["inputs"][0].encode(TEXTS[0])
    (tmp_path / "kept" / vocabulary.FEATURES).write_text("{")
    with pytest.raises(ValueError, match=r"features\.json.*is damaged"):
        vocabulary.read(tmp_path / "kept")
    with pytest.raises(ValueError, match="No vocabulary"):
        vocabulary.read(tmp_path)
