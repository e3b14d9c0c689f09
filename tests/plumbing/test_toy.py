"""The toy corpus is what it says it is, and its oracle can be trusted.

    text --synth--> wav --(degrade)--> oracle --> right / total     high on its own text, chance
                                                                    on noise and on other texts
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from corpora import toy
from cli import BadInput
from corpora.toy import CAPTIONS, DIGITS, HELD_OUT, KINDS, WORDS, ToyConfig
from schema import build

SMALL = ToyConfig(clips=24, valid_clips=12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    train, valid = toy.make(SMALL, tmp_path_factory.mktemp("toy"))
    return [[json.loads(line) for line in p.read_text().splitlines()] for p in (train, valid)] \
        + [train.parent]


@pytest.fixture(scope="module")
def share():
    return toy.check(20)


def pairs(text):
    words = text.split()
    return {(DIGITS.index(a), DIGITS.index(b)) for a, b in zip(words, words[1:])
            if a in DIGITS and b in DIGITS}


@pytest.mark.parametrize("kind,text", [("speech", "seven three"), ("sound", "two noise bursts"),
                                       ("music", "a fast arpeggio, low, pluck")])
@pytest.mark.parametrize("rate", toy.RATES)
def test_same_seed_same_bytes_and_another_seed_differs(kind, text, rate):
    a, b, c = (toy.synth(text, kind, seed=s, sample_rate=rate)[0] for s in (5, 5, 6))
    assert a.dtype == np.float32 and a.tobytes() == b.tobytes()
    assert len(a) != len(c) or np.abs(a - c).max() > .05


def test_voices_differ_in_pitch_and_in_the_spectrum():
    means, bands = [], []
    for voice in range(len(toy.VOICES)):
        f0, log = [], []
        for seed in range(6):
            wav, ((_, a, b),) = toy.synth("nine", "speech", voice=voice, seed=seed)
            ac = np.fft.irfft(np.abs(np.fft.rfft(wav, 2 ** 15)) ** 2)
            f0.append(16000 / (62 + ac[62:240].argmax()))
            log.append(toy._ears(wav, 16000)[round(a * 80):round(b * 80)].mean(0))
        means.append(np.median(f0)), bands.append(np.mean(log, 0))
    assert np.diff(sorted(means)).min() > 5 and max(means) / min(means) > 2
    assert min(np.abs(a - b).max() for i, a in enumerate(bands) for b in bands[:i]) > .2    # 2 dB


def test_word_times_cover_the_energy_and_nothing_else_does():
    wav, words = toy.synth("seven three stop nine", "speech", voice=2, seed=1)
    assert [w for w, _, _ in words] == "seven three stop nine".split()
    spoken = np.zeros(len(wav), bool)
    for _, a, b in words:
        assert 0 < a < b < len(wav) / 16000 and .15 < b - a < .6
        spoken[int((a - .015) * 16000):int((b + .025) * 16000)] = True
    assert np.square(wav[spoken]).mean() > 1e3 * np.square(wav[~spoken]).mean()
    for (_, _, end), (_, start, _) in zip(words, words[1:]):
        assert .039 < start - end < .121


@pytest.mark.parametrize("kind", KINDS)
def test_no_clip_is_silent_clipped_broken_or_too_long(kind):
    cfg = ToyConfig(clips=40, voices=6, kinds=[kind], shares=[1.0])
    for c in toy.clips(cfg, "train"):
        wav, _ = toy.synth(**c)
        assert np.isfinite(wav).all() and .5 < np.abs(wav).max() < .95
        assert .3 < len(wav) / 16000 <= cfg.max_seconds and abs(wav.mean()) < .01
        assert len(c["text"].encode()) <= 48
        assert np.abs(wav[-100:]).max() < .05 and np.abs(wav[:100]).max() < .05


def test_held_out_pairs_leave_every_digit_in_both_places():
    assert 15 <= len(HELD_OUT) <= 20
    assert {a for a, _ in HELD_OUT} == {b for _, b in HELD_OUT} == set(range(10))


@pytest.mark.parametrize("least,most", [(1, 4), (2, 2), (3, 6)])
def test_held_out_pairs_are_never_trained_and_always_validated(least, most):
    cfg = ToyConfig(clips=2000, valid_clips=400, digits_min=least, digits_max=most,
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
    kinds = [c["kind"] for c in toy.clips(ToyConfig(), "train")]
    assert [kinds.count(k) for k in KINDS] == [500, 250, 250]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["clean", "noise", "phase", "smear"])
def test_the_oracle_hears_clean_and_degraded_clips(share, kind, how):
    assert share[kind, how] >= (.98 if how == "clean" else .95)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["other text", "nothing"])
def test_the_oracle_is_near_chance_on_another_text_and_on_noise(share, kind, how):
    assert abs(share[kind, how] - share[kind, "chance"]) < .15


def test_the_oracle_hears_both_sample_rates_and_ignores_level_and_silence_around():
    for kind, text in (("speech", "four nine two"), ("sound", "three high beeps"),
                       ("music", "a slow falling scale, high, organ")):
        wav, _ = toy.synth(text, kind, voice=1, seed=3, sample_rate=24000)
        for x in (wav, wav * .01, np.pad(wav, (5000, 90000))):
            assert toy.oracle(x, text, kind, 24000)["heard"] == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_survives_any_audio(kind):
    text = {"speech": "one two", "sound": "one click", "music": "a slow arpeggio, low, organ"}[kind]
    n = 16000
    t = np.arange(n) / n
    for wav in (np.zeros(n), np.zeros(10), np.full(n, np.nan), np.full(n, .5), t == .5,
                np.sin(5e4 * t ** 2), np.sin(2e3 * t[:1700]), 1e6 * np.sign(np.sin(900 * t))):
        r = toy.oracle(wav, text, kind)
        assert 0 <= r["right"] <= r["total"] and isinstance(r["heard"], str)
    assert toy.oracle(np.zeros(n), text, kind)["heard"] == ""


def test_every_caption_has_facts_of_its_own():
    for kind in ("sound", "music"):
        every = [c for group in CAPTIONS[kind] for c in group]
        claims = [tuple(sorted(toy.facts(c, kind).items())) for c in every]
        assert len(set(claims)) == len(every) and min(map(len, claims)) >= 2
        assert all(0 < toy.chance(c, kind) < .6 for c in every)
    assert toy.chance("one two", "speech") == .1


def test_make_writes_what_the_manifest_says(corpus):
    train, valid, folder = corpus
    assert (len(train), len(valid)) == (SMALL.clips, SMALL.valid_clips)
    assert len({line["id"] for line in train + valid}) == len(train) + len(valid)
    for line in train + valid:
        wav, rate = sf.read(folder / line["audio"], dtype="float32")
        assert rate == 16000 and abs(len(wav) / rate - line["duration"]) < 1e-3
        assert line["kind"] in KINDS and toy.facts(line["text"], line["kind"])
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
    (dict(shares=[.5, .4, .2]), "shares"), (dict(max_seconds=1.0), "max_seconds"),
    (dict(seed=-1), "seed")])
def test_an_impossible_setting_is_named(bad, name):
    with pytest.raises(BadInput, match=f"^toy.{name}: "):
        build(ToyConfig, bad, "toy")


@pytest.mark.parametrize("call", [
    lambda: toy.synth("eleven", "speech"), lambda: toy.synth("one", "poem"),
    lambda: toy.synth("", "sound"), lambda: toy.synth("five clicks", "sound"),
    lambda: toy.synth("a loud song", "music"), lambda: toy.synth("one", "speech", voice=6),
    lambda: toy.synth("one", "speech", sample_rate=8000), lambda: toy.main([]),
    lambda: toy.main(["--say", "eleven", "--out", "x.wav"]), lambda: toy.main(["--check", "1"])])
def test_what_the_toy_cannot_do_is_bad_input(call):
    with pytest.raises(BadInput):
        call()


def test_the_command_line_says_a_text(tmp_path, capsys):
    toy.main(["--say", "seven three", "--voice", "1", "--out", str(tmp_path / "new" / "x.wav")])
    assert "'seven three'" in capsys.readouterr().out
    assert sf.info(tmp_path / "new" / "x.wav").samplerate == 16000
