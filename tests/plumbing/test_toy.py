"""The toy corpus is what it says it is: texts, held-out pairs, files, and no surprises."""
import json

import numpy as np
import pytest
import soundfile as sf

from cli import BadInput
from corpora import synth, toy
from corpora.synth import DIGITS, KINDS, WORDS
from corpora.toy import HELD_OUT, ToyConfig
from schema import build

SMALL = ToyConfig(clips=24, valid_clips=12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    train, valid = toy.make(SMALL, tmp_path_factory.mktemp("toy"))
    return [[json.loads(line) for line in p.read_text().splitlines()] for p in (train, valid)] \
        + [train.parent]


def pairs(text):
    words = text.split()
    return {(DIGITS.index(a), DIGITS.index(b)) for a, b in zip(words, words[1:])
            if a in DIGITS and b in DIGITS}


@pytest.mark.parametrize("kind", KINDS)
def test_no_clip_is_silent_clipped_broken_or_too_long(kind):
    cfg = ToyConfig(clips=40, voices=6, kinds=[kind], shares=[1.0])
    for c in toy.clips(cfg, "train"):
        wav, _ = synth.synthesise(**c)
        assert np.isfinite(wav).all() and 0.5 < np.abs(wav).max() < 0.95
        assert 0.3 < len(wav) / 16000 <= cfg.max_seconds and abs(wav.mean()) < 0.01
        assert len(c["text"].encode()) <= 48
        assert np.abs(wav[-100:]).max() < 0.05 and np.abs(wav[:100]).max() < 0.05


def test_held_out_pairs_leave_every_digit_in_both_places():
    assert 15 <= len(HELD_OUT) <= 20
    assert {a for a, _ in HELD_OUT} == {b for _, b in HELD_OUT} == set(range(10))


@pytest.mark.parametrize("least,most", [(1, 4), (2, 2), (3, 6)])
def test_held_out_pairs_are_never_trained_and_always_validated(least, most):
    cfg = ToyConfig(clips=2000, valid_clips=400, digits_min=least, digits_max=most, words=True,
                    kinds=["speech"], shares=[1.0], max_seconds=4.0)
    train = [c["text"] for c in toy.clips(cfg, "train")]
    valid = [c["text"] for c in toy.clips(cfg, "valid")]
    assert not any(pairs(t) & HELD_OUT for t in train)
    assert all(pairs(t) & HELD_OUT for t in valid)
    seen = set().union(*map(pairs, train))
    assert len(seen) == 100 - len(HELD_OUT)             # all others do occur
    assert {w for t in train for w in t.split()} == set(DIGITS + WORDS)
    assert all(least <= len(t.split()) <= most for t in train)


def test_kinds_come_in_their_shares():
    kinds = [c["kind"] for c in toy.clips(ToyConfig(clips=1000), "train")]
    assert [kinds.count(k) for k in KINDS] == [500, 250, 250]


def test_make_writes_what_the_manifest_says(corpus):
    train, valid, folder = corpus
    assert (len(train), len(valid)) == (SMALL.clips, SMALL.valid_clips)
    assert len({line["id"] for line in train + valid}) == len(train) + len(valid)
    for line in train + valid:
        wav, rate = sf.read(folder / line["audio"], dtype="float32")
        assert rate == 16000 and abs(len(wav) / rate - line["duration"]) < 1e-3
        assert line["kind"] in KINDS and synth.attributes(line["text"], line["kind"])
        if line["kind"] == "speech":
            assert [w for w, _, _ in line["words"]] == line["text"].split() and line["speaker"]


def test_make_does_nothing_the_second_time_and_starts_anew_for_another_recipe(corpus, tmp_path):
    folder = tmp_path / "copy"
    first = toy.make(ToyConfig(clips=3, valid_clips=1), folder)
    stamp = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert toy.make(ToyConfig(clips=3, valid_clips=1), folder) == first
    assert stamp == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    toy.make(ToyConfig(clips=2, valid_clips=1), folder)
    assert len(list((folder / "wav").iterdir())) == 3
    first[1].unlink()                                   # a damaged corpus is made again
    toy.make(ToyConfig(clips=2, valid_clips=1), folder)
    assert first[1].exists()


def test_make_never_overwrites_files_of_the_users(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text("{}\n")
    (tmp_path / "b" / "wav").mkdir(parents=True)
    (tmp_path / "b" / "wav" / "mine.wav").write_text("precious")
    for folder in ("a", "b"):
        with pytest.raises(BadInput, match="did not write"):
            toy.make(SMALL, tmp_path / folder)
    assert (tmp_path / "a" / "train.jsonl").read_text() == "{}\n"
    assert (tmp_path / "b" / "wav" / "mine.wav").read_text() == "precious"


@pytest.mark.parametrize("bad,name", [
    (dict(clips=0), "clips"), (dict(voices=7), "voices"), (dict(digits_min=5), "digits_max"),
    (dict(kinds=["noise"]), "kinds"), (dict(kinds=[]), "kinds"), (dict(shares=[1.0]), "shares"),
    (dict(shares=[0.5, 0.4, 0.2]), "shares"), (dict(max_seconds=1.0), "max_seconds"),
    (dict(seed=-1), "seed")])
def test_an_impossible_setting_is_named(bad, name):
    with pytest.raises(BadInput, match=f"^toy.{name}: "):
        build(ToyConfig, bad, "toy")


@pytest.mark.parametrize("call", [
    lambda: synth.synthesise("eleven", "speech"), lambda: synth.synthesise("one", "poem"),
    lambda: synth.synthesise("", "sound"), lambda: synth.synthesise("five clicks", "sound"),
    lambda: synth.synthesise("a loud song", "music"), lambda: synth.synthesise("one", "speech", voice=6),
    lambda: synth.synthesise("one", "speech", rate=8000), lambda: toy.main([]),
    lambda: toy.main(["--say", "eleven", "--out", "x.wav"]), lambda: toy.main(["--check", "1"])])
def test_what_the_toy_cannot_do_is_bad_input(call):
    with pytest.raises(BadInput):
        call()


def test_the_command_line_says_a_text(tmp_path, capsys):
    toy.main(["--say", "seven three", "--voice", "1", "--out", str(tmp_path / "new" / "x.wav")])
    assert "'seven three'" in capsys.readouterr().out
    assert sf.info(tmp_path / "new" / "x.wav").samplerate == 16000
