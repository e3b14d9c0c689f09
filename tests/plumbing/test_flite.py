"""The flite corpus: sentences of a grammar, spoken, with the times of their words."""
import ctypes
import random
import re
import sys

import pytest

from corpora import flite
from cli import BadInput
from conftest import engine
from data import load_audio, load_manifest

needs_flite = pytest.mark.skipif(engine is None, reason="needs apt install flite")


def test_sentences_are_a_function_of_the_seed_and_of_plain_lower_case_words():
    first, again, other = ([flite.sentence(random.Random(seed + i)) for i in range(300)]
                           for seed in (0, 0, 1000))
    assert first == again != other
    assert len(set(first)) > 280
    for text in first:
        assert 3 <= len(text.split()) <= 14 and text.replace(" ", "").isalpha() and text.islower()
        assert not re.search(r"\ba [aeiou]", text)  # "an apple"


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch):
    def missing(name, **options):
        raise OSError(f"{name}: cannot open shared object file")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BadInput, match="apt install flite"):
        flite.Flite()


@needs_flite
@pytest.mark.parametrize("voice", flite.VOICES)
def test_every_voice_tells_where_its_words_are(voice):
    wav, rate, words = engine.speak("the old farmer opened a box", voice)
    assert [w for w, _, _ in words] == "the old farmer opened a box".split()
    times = [t for _, start, end in words for t in (start, end)]
    assert times == sorted(times) and 0 < times[0] and times[-1] < len(wav) / rate
    start, end = (int(t * rate) for t in words[2][1:])
    loud, quiet = (abs(w.astype(float)).mean() for w in (wav[start:end], wav[-rate // 50:]))
    assert loud > 5 * quiet


@needs_flite
def test_the_corpus_holds_out_sentences_and_comes_out_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(flite, "HELD_OUT", 3)
    monkeypatch.setattr(sys, "argv", ["corpora.flite", str(tmp_path), "--hours", "0.003",
                                      "--voices", "slt,kal16", "--processes", "1"])
    flite.main()
    train, valid = (load_manifest(tmp_path / f"{n}.jsonl") for n in ("train", "valid"))
    assert len(valid) == 6 and len(train) >= 4
    assert not {c.text for c in train} & {c.text for c in valid}
    clip = train[0]
    assert clip.words and clip.speaker in ("slt", "kal16") and clip.text
    assert load_audio(clip.audio, 16000).shape[1] == round(clip.duration * 16000)
    before = (tmp_path / "train.jsonl").read_text()
    flite.main()
    assert (tmp_path / "train.jsonl").read_text() == before


def test_an_unknown_voice_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["corpora.flite", "x", "--voices", "bob"])
    with pytest.raises(BadInput, match="bob.*slt"):
        flite.main()
